"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Masks: full, causal, causal with a window, or a boolean [T, S]. Packed documents go in as a
boolean mask [B, 1, T, S], which cuDNN takes as a bias.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels import choice
from effjax.kernels.attention.problem import Extras, Problem


def refuse(problem: Problem) -> str | None:
    """Returns why cuDNN cannot run this call here, or None."""
    _, q_len, kv_len, _, _, head_dim = problem.shape
    if choice.platform() != 'gpu':
        return f'it needs an NVIDIA GPU, not {choice.platform()}'
    if problem.dtype not in ('bfloat16', 'float16'):
        return f'it takes bfloat16 or float16, not {problem.dtype}'
    if problem.soft_cap is not None:
        return 'it has no soft cap on the scores'
    if problem.dropout:
        return 'dropout of attention weights is not exposed by jax'
    if problem.positions:
        return 'order given by positions needs the dense mask of every row'
    if problem.mask == 'causal' and q_len != kv_len:
        return 'a causal mask needs as many queries as keys'
    limit = 256 if _capability() >= (9, 0) else 128
    if head_dim % 8 or head_dim > limit:
        return f'head_dim {head_dim} is not a multiple of 8 up to {limit}'
    if (problem.segments or problem.mask == 'array') and (q_len % 2 or kv_len % 2):
        return f'with a mask array it needs even lengths, not {q_len} and {kv_len}'
    if _capability() < (8, 0):
        return 'it needs compute capability 8.0 or newer'
    return None


def attend(
    problem: Problem, extras: Extras, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array
) -> jax.Array:
    """Returns attention's output [B, T, H, D] in the dtype of q."""
    mask = None if extras.mask is None else extras.mask[None, None]
    if problem.segments:
        assert extras.q_segments is not None and extras.kv_segments is not None
        same = extras.q_segments[:, None, :, None] == extras.kv_segments[:, None, None, :]
        mask = same if mask is None else mask & same
    o_BTHD = jax.nn.dot_product_attention(
        q_BTHD,
        k_BSGD,
        v_BSGD,
        mask=mask,
        scale=problem.scale,
        is_causal=problem.mask == 'causal',
        local_window_size=None if problem.window is None else (problem.window - 1, 0),
        implementation='cudnn',
    )
    if mask is not None and problem.may_be_empty:
        o_BTHD = jnp.where(mask.any(-1)[:, 0, :, None, None], o_BTHD, 0)
    if extras.q_segments is not None:
        o_BTHD = jnp.where((extras.q_segments != 0)[:, :, None, None], o_BTHD, 0)
    return checkpoint_name(o_BTHD, 'attention_out')


def _capability() -> tuple[int, int]:
    """Compute capability of the first GPU; that of Hopper when planning without one."""
    if jax.default_backend() != 'gpu':
        return (9, 0)
    major, minor = str(jax.local_devices(backend='gpu')[0].compute_capability).split('.')
    return int(major), int(minor)
