"""tokamax's attention kernels on GPUs and TPUs, where the extra `effjax[tokamax]` is installed.

Its Mosaic kernels alone: by itself it goes on to dense XLA where they cannot run, without a word.
"""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels import choice
from effjax.kernels.attention.problem import Extras, Problem, dense
from effjax.kernels.devices import refuse_tokamax

IMPLEMENTATION = 'mosaic'  # of tokamax
_DTYPES = {'gpu': ('bfloat16', 'float16'), 'tpu': ('bfloat16', 'float32')}


def refuse(problem: Problem) -> str | None:
    """Returns why tokamax cannot run this call here, or None."""
    why = refuse_tokamax()
    if why:
        return why
    platform = choice.platform()
    if problem.dtype not in _DTYPES[platform]:
        able = ' or '.join(_DTYPES[platform])
        return f'it takes {able} on a {platform.upper()}, not {problem.dtype}'
    if problem.spec is not None:
        return 'it would compute a sparse mask in full'
    if problem.segments:
        return 'it takes documents as a mask of all pairs only'
    if problem.positions:
        return 'order given by positions would need a mask array for each row'
    if problem.dropout:
        return 'it has no dropout of attention weights'
    if problem.window is not None and platform == 'tpu':
        return 'it has no window on a TPU'
    return None


def attend(
    problem: Problem, extras: Extras, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array
) -> jax.Array:
    """Returns attention's output [B, T, H, D] in the dtype of q."""
    import tokamax  # takes long, and may not be there

    mask = None if extras.mask is None else extras.mask[None, None]
    more = {'logits_soft_cap': problem.soft_cap, 'implementation': IMPLEMENTATION}
    run: Any = functools.partial(tokamax.dot_product_attention, **more)
    o_BTHD = dense(run, problem, mask, q_BTHD, k_BSGD, v_BSGD)
    return checkpoint_name(o_BTHD.astype(q_BTHD.dtype), 'attention_out')
