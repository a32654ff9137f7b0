"""The same operations by other libraries: jax-linear-attention, fla (Triton, PyTorch), jax itself.

A peer that is not installed, or that refuses a call, is reported with its own words.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.kernels.cases import Case
from experiments.benchmarks.kernels.timing import median

# Peers that compute something else of the same size: what they give is not compared.
OTHERS = ('cudnn attention', 'one dense product')


def jax_peers(case: Case) -> dict[str, Callable[..., jax.Array]]:
    """Returns the peers of a case that are functions of jax arrays, by name."""
    peers: dict[str, Callable[..., jax.Array]] = {}
    if case.op.endswith('decay') or case.op in ('delta rule', 'selective scan'):
        peers['jla'] = lambda *arrays: _jla(case, *arrays)
    if case.op == 'diagonal scan':
        peers['associative_scan'] = _associative
    if case.op == 'selective scan':
        peers['associative_scan'] = _associative_mamba
    if case.op.endswith('decay'):
        peers['cudnn attention'] = _cudnn
    if case.op == 'grouped product':
        peers['one dense product'] = lambda x, w: x @ w[0]
    return peers


def _jla(case: Case, *arrays: jax.Array) -> jax.Array:
    """jax-linear-attention's Mosaic GPU kernel."""
    from jla.ops import linear_attention

    if case.op == 'selective scan':
        u, dt, a, write, read = arrays
        dt = dt.astype(u.dtype)  # it takes no other
        return linear_attention('mamba1', read, write, u, dt=dt, a=a, impl='mosaic_gpu')[0]
    if case.op == 'delta rule':
        q, k, v, beta, g = arrays
        gates = {'g': g, 'beta': beta, 'scale': 1.0}
        return linear_attention('gated_deltanet', q, k, v, **gates, impl='mosaic_gpu')[0]
    q, k, v, *decay = arrays
    kind = 'gla' if case.op == 'vector decay' else 'simple_gla'
    # It has neither no decay nor one of a head alone.
    g = decay[0] if decay else jnp.asarray(case.context.get('log_decay', 0.0), jnp.float32)
    g = g if decay else jnp.broadcast_to(g, v.shape[:3])
    return linear_attention(kind, q, k, v, g=g, scale=1.0, impl='mosaic_gpu')[0]


def _associative(x: jax.Array, log_decay: jax.Array) -> jax.Array:
    """jax's parallel prefix."""

    def join(left: tuple, right: tuple) -> tuple:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(join, (jnp.exp(log_decay), x), axis=1)[1]


def _associative_mamba(
    u: jax.Array, dt: jax.Array, a: jax.Array, write: jax.Array, read: jax.Array
) -> jax.Array:
    """The states of all tokens by jax's parallel prefix, then their reading."""
    u, write, read = (x.astype(jnp.float32) for x in (u, write, read))
    x = (dt * u)[..., None] * write[:, :, None]
    h = _associative(x, dt[..., None] * a)
    return jnp.einsum('btdn,btn->btd', h, read).astype(jnp.bfloat16)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *decay: jax.Array) -> jax.Array:
    """Causal softmax attention of the same shape."""
    del decay
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')


def fla_times(case: Case, calls: int, rounds: int) -> tuple[float, float]:
    """Returns the seconds of fla's Triton kernel, forward and forward + backward.

    Raises:
      ImportError: fla or PyTorch is not installed.
      NotImplementedError: fla has no such operation.
      RuntimeError: (or another error of fla's) it refuses the call; forward alone is then lost too.
    """
    import torch

    op = _fla_op(case)
    leaves = [x.requires_grad_() for x in _fla_tensors(case)]

    def forward() -> Any:
        with torch.no_grad():
            return op(*leaves)[0]

    def both() -> Any:
        o = op(*leaves)[0]
        return torch.autograd.grad(o, leaves, weight)

    weight = torch.randn_like(forward())
    wait = lambda _: torch.cuda.synchronize()  # noqa: E731
    return median(forward, wait, calls, rounds), median(both, wait, calls, rounds)


def _fla_op(case: Case) -> Callable[..., Any]:
    """fla's function of a case's arrays, which returns (output, state)."""
    if case.op == 'none decay':
        from fla.ops.linear_attn import chunk_linear_attn

        return lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)
    if case.op == 'fixed decay':
        from fla.ops.retention import chunk_retention  # whose decays are those of the case

        return lambda q, k, v: chunk_retention(q, k, v, scale=1.0)
    if case.op == 'scalar decay':
        from fla.ops.simple_gla import chunk_simple_gla

        return lambda q, k, v, g: chunk_simple_gla(q, k, v, g, scale=1.0)
    if case.op == 'vector decay':
        from fla.ops.gla import chunk_gla

        return lambda q, k, v, g: chunk_gla(q, k, v, g, scale=1.0)
    if case.op == 'delta rule':
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return lambda q, k, v, beta, g: chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)
    if case.op == 'diagonal and rank one':
        from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

        return lambda q, k, v, a, b, g: chunk_dplr_delta_rule(q, k, v, a, b, g, scale=1.0)
    raise NotImplementedError('no such operation')


def _fla_tensors(case: Case) -> list[Any]:
    """Random tensors of the shapes of a case's arrays, with decays, keys and steps in bounds."""
    import torch

    functions = torch.nn.functional
    arrays = jax.eval_shape(case.make, jax.random.key(0))
    torch.manual_seed(0)
    tensors = [
        torch.randn(x.shape, device='cuda', dtype=getattr(torch, x.dtype.name)) for x in arrays
    ]
    if case.op == 'delta rule':
        tensors[1] = functions.normalize(tensors[1], dim=-1)
        tensors[3] = tensors[3].sigmoid()
    if case.op == 'diagonal and rank one':
        tensors[3] = functions.normalize(tensors[3], dim=-1)
        tensors[4] = -tensors[3] * tensors[4].sigmoid()
    if len(tensors) > 3:
        tensors[-1] = -functions.softplus(tensors[-1] - 2)
    return tensors
