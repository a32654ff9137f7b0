"""Linear recurrences on TPUs: Pallas kernels over chunks, forward and backward.

A step takes one chunk of a few heads of one row. The chunks of a row follow one another, so
that a head's state stays in VMEM in float32 from the first to the last; only the states before
each chunk go to memory, and those only where a backward pass follows. It walks the chunks from the
end, with the gradient of the state in VMEM, and forms all else again.

Nothing overflows: running sums of log-decays are formed outside, exactly (`kernels.decays`), and
the kernels take the exponential of differences towards the past only. The beginning of a
document is a decay to 0. Heads lie side by side, [B, T, H * K], so that no array is transposed;
K and V are filled up to multiples of 128 lanes, T to a multiple of the chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.decays import Sum, before, running
from effjax.kernels.devices import refuse_tpu
from effjax.kernels.linear_recurrence.problem import Problem, first_tokens, with_documents
from effjax.kernels.linear_recurrence.tpu_plan import LANES, Plan, plan_for

_RESET = -128.0  # exp of it is 0 in float32


def refuse(q: Any, v: Any, decay: str, bonus: bool) -> str | None:
    """Returns why the kernels cannot run this call here, or None.

    Args:
      q: queries [B, T, G, K], or their shape and dtype.
      v: values [B, T, H, V].
      decay: 'none', 'head', 'scalar' or 'vector'.
      bonus: whether there is one.
    """
    if (why := refuse_tpu()) is not None:
        return why
    if q.dtype.name not in ('bfloat16', 'float32'):
        return f'it takes bfloat16 or float32, not {q.dtype.name}'
    if not (q.size and v.size):
        return f'it takes no empty arrays, as {list(q.shape)} and {list(v.shape)}'
    if _plan(q, v, decay, bonus) is None:
        return f'a state of {q.shape[3]} x {v.shape[3]} leaves too little VMEM'
    return None


def _plan(q: Any, v: Any, decay: str, bonus: bool) -> Plan | None:
    (_, length, groups, key_dim), (*_, heads, value_dim) = q.shape, v.shape
    itemsize = q.dtype.itemsize
    dims = (length, heads, groups, key_dim, value_dim)
    return plan_for(*dims, decay=decay, strict=bonus, itemsize=itemsize)


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token)."""
    del chunk  # 'xla's; the kernels have `chunk_size`
    if problem.vector:
        problem = problem.with_heads()
    q, k, v, state, bonus = problem.q, problem.k, problem.v, problem.state, problem.bonus
    log_decay = with_documents(problem)
    kind = 'none' if log_decay is None else 'vector' if problem.vector else 'scalar'
    plan = _plan(q, v, kind, bonus is not None)
    assert plan is not None
    length, (key_dim, value_dim) = q.shape[1], state.shape[2:]
    sums = None if log_decay is None else running_sums(plan, log_decay, problem.documents)
    lanes = [(0, 0), (0, 0), (0, plan.key_dim - key_dim), (0, plan.value_dim - value_dim)]
    q_, k_, v_ = (side_by_side(plan.size, x) for x in (q, k, v))
    o, last = _recurrence(plan, q_, k_, v_, sums, jnp.pad(state, lanes))
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)[:, :length, :, :value_dim]
    if bonus is not None:
        repeat = plan.heads // plan.groups
        own = jnp.repeat(q.astype(o.dtype) * k.astype(o.dtype), repeat, axis=2) * bonus
        o = o + jnp.sum(own, axis=-1, keepdims=True) * v
    return o, last[:, :, :key_dim, :value_dim]


def side_by_side(size: int, x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, N * C, H * K] in whole chunks of so many tokens, and whole lanes."""
    more = -x.shape[1] % size, -x.shape[3] % LANES
    x = jnp.pad(x, [(0, 0), (0, more[0]), (0, 0), (0, more[1])])
    return x.reshape(*x.shape[:2], -1)


def running_sums(plan: Plan, log_decay: jax.Array, documents: jax.Array | None) -> Sum:
    """Running sums in each chunk as the kernels read them, those of what is seen last if strict."""

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % plan.size)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, plan.size, *x.shape[2:])

    total = running(split(log_decay), axis=2)
    parts = [total]
    if plan.strict:
        seen = before(total, axis=2)
        if documents is not None:  # the first token of a document sees nothing before it
            first = split(first_tokens(documents))
            first = first.reshape(*first.shape, *[1] * (total.fine.ndim - 3))
            seen = Sum(jnp.where(first, seen.coarse + _RESET, seen.coarse), seen.fine)
        parts.append(seen)
    lay = _lanes if plan.decay == 'vector' else _rows
    return Sum(lay(plan, [p.coarse for p in parts]), lay(plan, [p.fine for p in parts]))


def _rows(plan: Plan, parts: list[jax.Array]) -> jax.Array:
    """Kinds of [B, N, C, H] -> [B, steps, N, kinds * block, C]."""
    x = jnp.stack([x.reshape(*x.shape[:3], plan.steps, plan.block) for x in parts], axis=3)
    x = x.transpose(0, 4, 1, 3, 5, 2)
    return x.reshape(*x.shape[:3], -1, plan.size)


def _lanes(plan: Plan, parts: list[jax.Array]) -> jax.Array:
    """Kinds of [B, N, C, H, K] -> [B, N * C, steps * kinds * block * K]."""
    more = plan.key_dim - parts[0].shape[4]
    parts = [jnp.pad(x, [(0, 0)] * 4 + [(0, more)]) for x in parts]
    x = jnp.stack([x.reshape(*x.shape[:3], plan.steps, -1) for x in parts], axis=4)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, sums: Sum | None, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(o [B, N * C, H * V], last state [B, H, K, V]) of arrays in whole chunks."""
    from effjax.kernels.linear_recurrence import tpu_kernels  # Pallas takes long to import

    o, last = tpu_kernels.forward(plan, q, k, v, sums, state, save=False)
    return o, last


def _recurrence_forward(plan, q, k, v, sums, state):
    from effjax.kernels.linear_recurrence import tpu_kernels

    o, last, states = tpu_kernels.forward(plan, q, k, v, sums, state, save=True)
    o = checkpoint_name(o, 'linear_recurrence_out')
    states = checkpoint_name(states, 'linear_recurrence_states')
    return (o, last), (q, k, v, sums, states)


def _recurrence_backward(plan, saved, gradients):
    from effjax.kernels.linear_recurrence import tpu_kernels

    q, k, v, sums, states = saved
    do, dlast = gradients
    grads = tpu_kernels.backward(plan, q, k, v, sums, states, do, dlast)
    dq, dk, dv, dfine, dstate = grads
    if plan.sharing > 1:  # neighbouring steps each have a part of a query head's gradient
        parts = (*q.shape[:2], plan.groups, plan.sharing, plan.key_dim)
        dq, dk = (x.reshape(parts).sum(3).reshape(q.shape).astype(q.dtype) for x in (dq, dk))
    dsums = None
    if sums is not None:
        if sums.fine.shape[0] == 1:
            dfine = jnp.sum(dfine, axis=0, keepdims=True)
        dsums = Sum(jnp.zeros_like(sums.coarse), dfine)
    return dq, dk, dv, dsums, dstate


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)
