"""Splash attention on TPUs: jax's own Pallas kernel, which skips the blocks that a mask excludes.

Blocks of 512 x 1024 with the fused backward kernel; the kernel's default of 128 is several times
slower. Sparse masks have blocks of their own (`blocks.block_sizes`). It lowers for TPU on any
machine (`effjax.kernels.target('tpu')`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels import choice
from effjax.kernels.attention.blocks import TILE, block_sizes, filled
from effjax.kernels.attention.cost import executed_pairs
from effjax.kernels.attention.mask import MaskSpec
from effjax.kernels.attention.problem import Extras, Problem


def refuse(problem: Problem) -> str | None:
    """Returns why splash attention cannot run this call here, or None."""
    _, q_len, kv_len, *_ = problem.shape
    if choice.platform() != 'tpu':
        return f'it needs a TPU, not {choice.platform()}'
    if problem.dtype not in ('bfloat16', 'float32'):
        return f'it takes bfloat16 or float32, not {problem.dtype}'
    if problem.dropout:
        return 'it has no dropout of attention weights'
    if problem.mask == 'array' or problem.positions:
        return 'its masks are static: causal, full, a window or a MaskSpec of places in the row'
    if problem.mask in ('causal', 'sparse') and q_len != kv_len:
        return f'a {problem.mask} mask needs as many queries as keys'
    if problem.spec is not None and problem.spec.branches:
        return 'it has one softmax, and a mask of branches mixes several'
    if problem.spec is not None and problem.spec.offset is not None:
        return 'each of its queries must see a key, and a mask with an offset leaves some out'
    if q_len % TILE or kv_len % TILE:
        return f'lengths must be multiples of {TILE}, not {q_len} and {kv_len}'
    return None


def attend(
    problem: Problem, extras: Extras, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array
) -> jax.Array:
    """Returns attention's output [B, T, H, D] in the dtype of q."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, q_len, kv_len, heads, *_ = problem.shape
    kernel = _kernel(
        (q_len, kv_len), heads, problem.mask, problem.window, problem.spec, problem.soft_cap
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD * problem.scale, k_BSGD, v_BSGD))
    q = q.astype(q_BTHD.dtype)
    scored = executed_pairs(
        'splash', q_len, kv_len, mask=problem.mask, window=problem.window, spec=problem.spec
    )
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
    size = TILE
    while size * 2 <= most and length % (size * 2) == 0:
        size *= 2
    return size


@functools.lru_cache(maxsize=32)  # making the mask's block tables costs seconds at long lengths
def _kernel(
    shape: tuple[int, int],
    heads: int,
    mask: str,
    window: int | None,
    spec: MaskSpec | None,
    soft_cap: float | None,
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    rows, columns = _block(shape[0], 512), _block(shape[1], 1024)
    head_mask: Any = splash.FullMask(shape)
    if spec is not None:
        head_mask = _said(spec, shape[0])
        rows, columns = block_sizes(spec, shape[0])
    elif mask == 'causal' and window is None:
        head_mask = splash.CausalMask(shape)
    elif window is not None:
        head_mask = splash.LocalMask(shape, (window - 1, 0), 0)
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


def _said(spec: MaskSpec, length: int) -> Any:
    """A `MaskSpec` as splash reads masks: block by block, those that hold nothing unseen."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    tiles = filled(spec, length)

    @dataclasses.dataclass(frozen=True)  # equal ones are made into tables once
    class Said(splash.Mask):
        spec: MaskSpec

        @property
        def shape(self) -> tuple[int, int]:
            return length, length

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            i, j = (np.arange(length)[at] for at in index)
            if not tiles[i[0] // TILE : i[-1] // TILE + 1, j[0] // TILE : j[-1] // TILE + 1].any():
                return np.zeros((len(i), len(j)), bool)
            return self.spec.allowed(i[:, None], j[None, :], np.full((1, 1), length))

    return Said(spec)
