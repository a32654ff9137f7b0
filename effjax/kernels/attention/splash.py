"""Splash attention on TPUs: jax's own Pallas kernel, which skips the blocks that a mask excludes.

Blocks of 512 x 1024 with the fused backward kernel; the kernel's default of 128 is several times
slower. It lowers for TPU on any machine (`effjax.kernels.target('tpu')`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels import choice
from effjax.kernels.attention.cost import pairs
from effjax.kernels.attention.problem import Extras, Problem

_LANES = 128


def refuse(problem: Problem) -> str | None:
    """Returns why splash attention cannot run this call here, or None."""
    _, q_len, kv_len, *_ = problem.shape
    if choice.platform() != 'tpu':
        return f'it needs a TPU, not {choice.platform()}'
    if problem.dtype not in ('bfloat16', 'float32'):
        return f'it takes bfloat16 or float32, not {problem.dtype}'
    if problem.dropout:
        return 'it has no dropout of attention weights'
    if problem.mask in ('array', 'sparse') or problem.positions:
        return 'its masks are static: causal, full or a window'
    if problem.mask == 'causal' and q_len != kv_len:
        return 'a causal mask needs as many queries as keys'
    if q_len % _LANES or kv_len % _LANES:
        return f'lengths must be multiples of {_LANES}, not {q_len} and {kv_len}'
    return None


def attend(
    problem: Problem, extras: Extras, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array
) -> jax.Array:
    """Returns attention's output [B, T, H, D] in the dtype of q."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, q_len, kv_len, heads, *_ = problem.shape
    kernel = _kernel(q_len, kv_len, heads, problem.mask, problem.window, problem.soft_cap)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD * problem.scale, k_BSGD, v_BSGD))
    q = q.astype(q_BTHD.dtype)
    scored = pairs(q_len, kv_len, mask=problem.mask, window=problem.window)
    with jax.named_scope(f'pairs={scored}'):  # for `effjax.costs.walk`: its shapes do not tell
        if extras.q_segments is not None and extras.kv_segments is not None:
            ids = splash.SegmentIds(q=extras.q_segments, kv=extras.kv_segments)
            o = jax.vmap(kernel)(q, k, v, ids)
        else:
            o = jax.vmap(kernel)(q, k, v)
    o_BTHD = jnp.swapaxes(o, 1, 2)
    if extras.q_segments is not None:
        o_BTHD = jnp.where((extras.q_segments != 0)[:, :, None, None], o_BTHD, 0)
    return checkpoint_name(o_BTHD, 'attention_out')


def _block(length: int, most: int) -> int:
    """The largest power of two times 128, at most `most`, that divides the length."""
    size = _LANES
    while size * 2 <= most and length % (size * 2) == 0:
        size *= 2
    return size


@functools.lru_cache(maxsize=32)  # making the mask's block tables costs seconds at long lengths
def _kernel(
    q_len: int, kv_len: int, heads: int, mask: str, window: int | None, soft_cap: float | None
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (q_len, kv_len)
    head_mask: Any = splash.FullMask(shape)
    if mask == 'causal' and window is None:
        head_mask = splash.CausalMask(shape)
    elif window is not None:
        head_mask = splash.LocalMask(shape, (window - 1, 0), 0)
    rows, columns = _block(q_len, 512), _block(kv_len, 1024)
    inner = min(columns, 512)
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=inner,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=inner,
        use_fused_bwd_kernel=True,
    )
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            mask=splash.MultiHeadMask([head_mask] * heads),
            block_sizes=sizes,
            attn_logits_soft_cap=soft_cap,
            residual_checkpoint_name='attention_lse',
            head_shards=1,
            q_seq_shards=1,
        )
