"""Diagonal plus low-rank recurrences on TPUs: Pallas kernels over chunks, forward and backward.

A step takes one chunk of one or two heads of one row. The chunks of a row follow one another, so
that a head's state stays in VMEM in float32 from the first to the last; only the states before
each chunk go to memory, and those only where a backward pass follows. It walks the chunks from the
end, with the gradient of the state in VMEM, and forms all else again, inverses included.

Arrays and decays lie as the kernels of `linear_recurrence` have them, with running sums with and
without the token itself: nothing overflows, and the beginning of a document is a decay to 0, for
what the transition reads too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.decays import Sum
from effjax.kernels.devices import refuse_tpu
from effjax.kernels.dplr.problem import Problem, with_documents
from effjax.kernels.dplr.tpu_plan import Plan, plan_for
from effjax.kernels.linear_recurrence.tpu import running_sums, side_by_side


def refuse(q: Any, k: Any, v: Any) -> str | None:
    """Returns why the kernels cannot run this call here, or None.

    Args:
      q: queries [B, T, H, K], or their shape and dtype.
      k: keys, of the shape of q.
      v: values [B, T, H, V].
    """
    if (why := refuse_tpu()) is not None:
        return why
    if not q.dtype == k.dtype == v.dtype:
        return f'it takes one dtype, not {q.dtype.name}, {k.dtype.name} and {v.dtype.name}'
    if q.dtype.name not in ('bfloat16', 'float32'):
        return f'it takes bfloat16 or float32, not {q.dtype.name}'
    if not (q.size and v.size):
        return f'it takes no empty arrays, as {list(q.shape)} and {list(v.shape)}'
    if _plan(q, v) is None:
        return f'a state of {q.shape[3]} x {v.shape[3]} leaves too little VMEM'
    return None


def _plan(q: Any, v: Any) -> Plan | None:
    (_, length, heads, key_dim), value_dim = q.shape, v.shape[3]
    return plan_for(length, heads, key_dim, value_dim, q.dtype.itemsize)


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token)."""
    del chunk  # 'xla's; the kernels have `chunk_size`
    p, state = problem, problem.state
    plan = _plan(p.q, p.v)
    assert plan is not None
    length, (key_dim, value_dim) = p.q.shape[1], state.shape[2:]
    sums = running_sums(plan, with_documents(p), p.documents)
    inputs = tuple(side_by_side(plan.size, x) for x in (p.q, p.k, p.v, p.read, p.write))
    more = [(0, 0), (0, 0), (0, plan.key_dim - key_dim), (0, plan.value_dim - value_dim)]
    o, last = _recurrence(plan, inputs, sums, jnp.pad(state, more))
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)[:, :length, :, :value_dim]
    return o, last[:, :, :key_dim, :value_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(
    plan: Plan, inputs: tuple[jax.Array, ...], sums: Sum, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(o [B, N * C, H * V], last state [B, H, K, V]) of arrays in whole chunks."""
    from effjax.kernels.dplr import tpu_chunk, tpu_kernels  # Pallas takes long to import

    o, last = tpu_kernels.forward(plan, tpu_chunk.Head(*inputs), sums, state, save=False)
    return o, last


def _recurrence_forward(plan, inputs, sums, state):
    from effjax.kernels.dplr import tpu_chunk, tpu_kernels

    head = tpu_chunk.Head(*inputs)
    o, last, states = tpu_kernels.forward(plan, head, sums, state, save=True)
    o = checkpoint_name(o, 'dplr_out')
    states = checkpoint_name(states, 'dplr_states')
    return (o, last), (inputs, sums, states)


def _recurrence_backward(plan, saved, gradients):
    from effjax.kernels.dplr import tpu_chunk, tpu_kernels

    inputs, sums, states = saved
    head = tpu_chunk.Head(*inputs)
    given, dstate, dfine = tpu_kernels.backward(plan, head, sums, states, *gradients)
    return tuple(given), Sum(jnp.zeros_like(sums.coarse), dfine), dstate


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)
