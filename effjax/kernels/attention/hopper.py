"""Attention on Hopper GPUs: own Pallas kernels, which visit only blocks that hold an allowed pair.

FlashAttention-2 (Dao, arXiv 2307.08691) over lists of blocks of 128 x 128 pairs, in bfloat16 with
softmax and sums in float32. Blocks that are wholly allowed run without a mask. Kept for the
backward pass are the output and the log-sum-exp; it forms the weights anew, once for the gradients
of keys and values, where a block of threads has a block of keys, and once for that of the queries:
so no sum depends on the order in which blocks of threads run.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.attention import hopper_backward, hopper_forward
from effjax.kernels.attention.blocks import TILE
from effjax.kernels.attention.hopper_blocks import Facts
from effjax.kernels.attention.hopper_plan import Mask, lists, mask_of, visited
from effjax.kernels.attention.problem import Extras, Problem
from effjax.kernels.devices import refuse_hopper
from effjax.kernels.sizes import tuned

STAGED = False  # weights go through shared memory: pallas' interpreter has no other way
DIMS = (64, 128)
# Entries of a ring in shared memory and tokens of each, by kernel and head dimension, for devices
# without a table.
SIZES = {
    ('forward', 64): (4, 128),
    ('forward', 128): (2, 128),
    ('queries', 64): (3, 128),
    ('queries', 128): (2, 128),
    ('keys', 64): (4, 64),
    ('keys', 128): (3, 64),
}


def refuse(problem: Problem) -> str | None:
    """Returns why the kernels cannot run this call here, or None."""
    *_, head_dim = problem.shape
    if (why := refuse_hopper()) is not None:
        return why
    if problem.dtype != 'bfloat16':
        return f'it takes bfloat16, not {problem.dtype}'
    if head_dim not in DIMS:
        return f'it takes a head_dim of 64 or 128, not {head_dim}'
    if problem.dropout:
        return 'it has no dropout of attention weights'
    if problem.mask == 'array' or problem.positions:
        return 'its masks are static: causal, full, a window or a MaskSpec of places in the row'
    if problem.mask in ('causal', 'sparse') and problem.shape[1] != problem.shape[2]:
        return f'a {problem.mask} mask needs as many queries as keys'
    if problem.spec is not None and problem.spec.branches:
        return 'it has one softmax, and a mask of branches mixes several'
    if problem.scale <= 0:
        return f'it needs a scale above 0, not {problem.scale}'
    if not all(problem.shape):
        return f'it takes no empty arrays, as of {problem.shape}'
    return None


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call, over lengths that are filled up to whole blocks.

    `sizes` are those of `sizes_for`, looked up once for both passes.
    """

    mask: Mask
    scale: float
    soft_cap: float | None
    share: int
    sizes: tuple[tuple[str, int, int], ...]

    def facts(self, kernel: str, segments: bool) -> Facts:
        stages, step = next(rest for name, *rest in self.sizes if name == kernel)
        return Facts(
            self.mask, self.scale, self.soft_cap, segments, self.share, STAGED, stages, step
        )


def sizes_for(head_dim: int) -> tuple[tuple[str, int, int], ...]:
    """Returns (kernel, stages, step) of each kernel."""
    out = []
    for kernel in ('forward', 'queries', 'keys'):
        stages, step = SIZES[kernel, head_dim]
        rule = {'stages': stages, 'step': step}
        found = tuned(f'attention.{kernel}', f'head_dim={head_dim}', rule)
        out.append((kernel, found['stages'], found['step']))
    return tuple(out)


def attend(
    problem: Problem, extras: Extras, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array
) -> jax.Array:
    """Returns attention's output [B, T, H, D] in the dtype of q."""
    _, q_len, kv_len, heads, kv_heads, head_dim = problem.shape
    mask = mask_of(problem.mask, problem.window, problem.spec, q_len, kv_len)
    call = Call(mask, problem.scale, problem.soft_cap, heads // kv_heads, sizes_for(head_dim))
    q_ids, kv_ids = extras.q_segments, extras.kv_segments
    if q_ids is not None and kv_ids is not None:
        q_ids, kv_ids = (_whole(x.astype(jnp.int32)) for x in (q_ids, kv_ids))
    scored = visited(mask) * TILE**2
    with jax.named_scope(f'pairs={scored}'):  # for `effjax.costs.walk`: its shapes do not tell
        o_BTHD = _attention(call, *map(_whole, (q_BTHD, k_BSGD, v_BSGD)), q_ids, kv_ids)
    o_BTHD = o_BTHD[:, :q_len]
    if extras.q_segments is not None:
        o_BTHD = jnp.where((extras.q_segments != 0)[:, :, None, None], o_BTHD, 0)
    return o_BTHD


def _whole(x: jax.Array) -> jax.Array:
    """Fills [B, T, ...] up to whole blocks."""
    more = -x.shape[1] % TILE
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x


def _lists(call: Call, *, by_keys: bool) -> dict[str, Any]:
    made = lists(call.mask, by_keys)
    patterns = jnp.asarray(made.patterns) if len(made.patterns) else None
    return {
        'heads': jnp.asarray(made.heads), 'items': jnp.asarray(made.items), 'patterns': patterns
    }  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    call: Call, q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Any, kv_ids: Any
) -> jax.Array:
    return _forward(call, q, k, v, q_ids, kv_ids)[0]


def _forward(call, q, k, v, q_ids, kv_ids):
    inputs = hopper_forward.Inputs(
        q, k, v, q_ids=q_ids, kv_ids=kv_ids, **_lists(call, by_keys=False)
    )
    o, lse = hopper_forward.run(call.facts('forward', q_ids is not None), inputs)
    o = checkpoint_name(o, 'attention_out')
    lse = checkpoint_name(lse, 'attention_lse')
    return o, (q, k, v, q_ids, kv_ids, o, lse)


def _backward(call, kept, do):
    q, k, v, q_ids, kv_ids, o, lse = kept
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    inputs = hopper_backward.Inputs(
        q, do, k, v, lse, delta, q_ids=q_ids, kv_ids=kv_ids, **_lists(call, by_keys=False)
    )
    segments = q_ids is not None
    dq = hopper_backward.queries(call.facts('queries', segments), inputs)
    inputs = inputs._replace(**_lists(call, by_keys=True))
    dk, dv = hopper_backward.keys(call.facts('keys', segments), inputs)
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)
