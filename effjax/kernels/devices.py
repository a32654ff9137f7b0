"""Why a Pallas kernel cannot run at a place, or None."""

import importlib.util

import jax
from jax.sharding import AxisType

from effjax.kernels import choice

SHORT = 16  # tokens of a row that a kernel's blocks are not worth filling up for


def refuse_tpu() -> str | None:
    """Returns why a TPU kernel cannot run here, or None."""
    if choice.platform() != 'tpu':
        return f'it needs a TPU, not {choice.platform()}'
    return refuse_mesh()


def refuse_hopper() -> str | None:
    """Returns why a kernel for Hopper GPUs cannot run here, or None."""
    if choice.platform() != 'gpu':
        return f'it needs a Hopper GPU, not {choice.platform()}'
    if jax.default_backend() == 'gpu':  # else one is planned for
        capability = str(jax.local_devices(backend='gpu')[0].compute_capability)
        if capability != '9.0':
            return f'it needs compute capability 9.0, which Hopper has, not {capability}'
    return refuse_mesh()


def refuse_tokamax() -> str | None:
    """Returns why tokamax's kernels cannot run here, or None."""
    if choice.platform() not in ('gpu', 'tpu'):
        return f'it needs a GPU or a TPU, not {choice.platform()}'
    if importlib.util.find_spec('tokamax') is None:
        return 'it needs the package tokamax, which effjax[tokamax] installs'
    return refuse_mesh()


def refuse_mesh() -> str | None:
    """Returns why no kernel can run under the present mesh, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = [a for a, kind in kinds if kind != AxisType.Manual and mesh.shape[a] > 1]
    if free:
        return f'XLA cannot cut it along the mesh axes {", ".join(free)}: call it in a shard_map'
    return None


def refuse_short(length: int, implementation: str | None) -> str | None:
    """Returns why a kernel should not take rows of so many tokens unasked, or None."""
    if implementation is None and length < SHORT:
        return f'rows of fewer than {SHORT} tokens, as in decoding, fill too little of its blocks'
    return None
