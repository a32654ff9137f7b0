"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Masks: full, causal, causal with a window, or a boolean [T, S]. Documents packed into a row run in
one of two forms:
  packed: cuDNN's ragged layout, which skips what lies between documents. jax has it only inside
    (`jax._src.cudnn`), for up to a static number of documents a row. Where a batch has a row with
    more, the other form runs, by a condition on the device;
  mask: a boolean mask [B, 1, T, T], which cuDNN takes as a bias and computes in full.
Forward and backward on an H200 in bfloat16 (jax 0.11.2), at most 7 and 13 documents a row:
[16, 2048, 16, 128] takes 2.5 ms without documents, 4.4 ms as mask and 2.3 ms packed;
[4, 8192, 16, 128] takes 7.4, 16.2 and 2.6 ms. Packed, the backward pass needs PACKED_DOCUMENTS
float32 copies of the queries for a while (4.3 GiB at both shapes), which is why the number is not
larger. jax's batching rule knows neither form: under `jax.vmap` with documents name 'xla'.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels import choice
from effjax.kernels.attention.problem import Extras, Problem, dense

PACKED_DOCUMENTS = 16


def refuse(problem: Problem) -> str | None:
    """Returns why cuDNN cannot run this call here, or None."""
    _, q_len, kv_len, _, _, head_dim = problem.shape
    if choice.platform() != 'gpu':
        return f'it needs an NVIDIA GPU, not {choice.platform()}'
    if problem.dtype not in ('bfloat16', 'float16'):
        return f'it takes bfloat16 or float16, not {problem.dtype}'
    if problem.spec is not None:
        return 'it would compute a sparse mask in full'
    if problem.soft_cap is not None:
        return 'it has no soft cap on the scores'
    if problem.dropout:
        return 'dropout of attention weights is not exposed by jax'
    if problem.positions:
        return 'order given by positions would need a mask array for each row'
    limit = 256 if _capability() >= (9, 0) else 128
    if head_dim % 8 or head_dim > limit:
        return f'head_dim {head_dim} is not a multiple of 8 up to {limit}'
    if (problem.segments or problem.mask == 'array') and (q_len % 2 or kv_len % 2):
        return f'with a mask array it needs even lengths, not {q_len} and {kv_len}'
    if _capability() < (8, 0):
        return 'it needs compute capability 8.0 or newer'
    return None


def form(problem: Problem) -> str:
    """Returns 'plain', 'packed' (documents in the ragged layout) or 'mask'."""
    if problem.mask != 'array' and not problem.segments:
        return 'plain'
    ragged = problem.shared_segments and problem.mask != 'array' and _capability() >= (9, 0)
    return 'packed' if ragged and _ragged_attention() is not None else 'mask'


def attend(
    problem: Problem, extras: Extras, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array
) -> jax.Array:
    """Returns attention's output [B, T, H, D] in the dtype of q."""
    arrays = (q_BTHD, k_BSGD, v_BSGD, extras)
    run = form(problem)
    if run == 'packed':
        ids = extras.q_segments
        assert ids is not None
        too_many = jnp.any(1 + jnp.sum(ids[:, 1:] != ids[:, :-1], axis=1) > PACKED_DOCUMENTS)
        # Rematerialised, so that the branch that rarely runs keeps nothing: what a condition
        # saves for its backward pass it saves for both branches.
        masked = jax.checkpoint(lambda *a: _masked(problem, *a[:4]))
        packed = functools.partial(_packed, problem)
        o_BTHD = jax.lax.cond(too_many, masked, packed, *arrays, *_documents(ids))
    else:
        o_BTHD = _masked(problem, *arrays)
    if extras.q_segments is not None:
        o_BTHD = jnp.where((extras.q_segments != 0)[:, :, None, None], o_BTHD, 0)
    return checkpoint_name(o_BTHD, 'attention_out')


def _masked(
    problem: Problem, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array, extras: Extras
) -> jax.Array:
    mask = None if extras.mask is None else extras.mask[None, None]
    if problem.segments:
        assert extras.q_segments is not None and extras.kv_segments is not None
        same = extras.q_segments[:, None, :, None] == extras.kv_segments[:, None, None, :]
        mask = same if mask is None else mask & same
    run = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')
    return dense(run, problem, mask, q_BTHD, k_BSGD, v_BSGD)


def _packed(
    problem: Problem,
    q_BTHD: jax.Array,
    k_BSGD: jax.Array,
    v_BSGD: jax.Array,
    extras: Extras,
    offsets: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Each document, and each stretch of padding, is a ragged sequence of its own."""
    library = _ragged_attention()
    assert library is not None
    del extras  # offsets and lengths say the same
    masks = library.MaskType
    return library.dot_product_attention(
        q_BTHD,
        k_BSGD,
        v_BSGD,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=problem.scale,
        mask_type=masks.PADDING_CAUSAL if problem.mask == 'causal' else masks.PADDING,
        sliding_window_length=problem.window,
    )


def _documents(ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where documents begin [B, M + 1] and their lengths [B, M], -1 where there is none."""
    batch, length = ids_BT.shape
    none = jnp.full((batch, 1), -1, jnp.int32)
    first = jnp.concatenate([jnp.ones((batch, 1), bool), ids_BT[:, 1:] != ids_BT[:, :-1]], axis=1)
    place = jnp.where(first, jnp.arange(length), length)
    start = jnp.sort(place, axis=1)[:, :PACKED_DOCUMENTS].astype(jnp.int32)
    start = jnp.pad(start, [(0, 0), (0, PACKED_DOCUMENTS - start.shape[1])], constant_values=length)
    end = jnp.concatenate([start[:, 1:], jnp.full((batch, 1), length, jnp.int32)], axis=1)
    exists = start < length
    offsets = jnp.concatenate([jnp.where(exists, start, -1), none], axis=1)
    return offsets, jnp.where(exists, end - start, -1)


def _ragged_attention() -> Any:
    """jax's internal module with the ragged layout, or None where a version lacks it."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as library
    except ImportError:
        return None
    names = ('dot_product_attention', 'MaskType')
    return library if all(hasattr(library, name) for name in names) else None


def _capability() -> tuple[int, int]:
    """Compute capability of the first GPU; that of Hopper when planning without one."""
    if jax.default_backend() != 'gpu':
        return (9, 0)
    major, minor = str(jax.local_devices(backend='gpu')[0].compute_capability).split('.')
    return int(major), int(minor)
