"""The delta rule on TPUs: Pallas kernels over chunks, forward and backward (arXiv 2406.06484).

A step takes one chunk of one or two heads of one row. The chunks of a row follow one another, so
that a head's state stays in VMEM in float32 from the first to the last; only the states before
each chunk go to memory, and those only where a backward pass follows. It walks the chunks from the
end, with the gradient of the state in VMEM, and forms all else again, inverses included.

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

from effjax.kernels.decays import Sum, running
from effjax.kernels.delta_rule.problem import Problem, with_documents
from effjax.kernels.delta_rule.tpu_plan import Plan, plan_for
from effjax.kernels.devices import refuse_tpu
from effjax.kernels.linear_recurrence.tpu import side_by_side


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
    q, v, state = problem.q, problem.v, problem.state
    plan = _plan(q, v)
    assert plan is not None
    length, (key_dim, value_dim) = q.shape[1], state.shape[2:]
    log_decay = with_documents(problem)
    sums = None if log_decay is None else running(_rows(plan, log_decay), axis=4)
    lanes = [(0, 0), (0, 0), (0, plan.key_dim - key_dim), (0, plan.value_dim - value_dim)]
    q_, k_, v_ = (side_by_side(plan.size, x) for x in (q, problem.k, v))
    o, last = _rule(plan, q_, k_, v_, _rows(plan, problem.beta), sums, jnp.pad(state, lanes))
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)[:, :length, :, :value_dim]
    return o, last[:, :, :key_dim, :value_dim]


def _rows(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, H] -> [B, steps, N, block, C] in whole chunks; zeros neither decay nor write."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % plan.size), (0, 0)])
    x = x.reshape(x.shape[0], -1, plan.size, plan.steps, plan.block)
    return x.transpose(0, 3, 1, 4, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    sums: Sum | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(o [B, N * C, H * V], last state [B, H, K, V]) of arrays in whole chunks."""
    from effjax.kernels.delta_rule import tpu_kernels  # Pallas takes long to import

    o, last = tpu_kernels.forward(plan, q, k, v, beta, sums, state, save=False)
    return o, last


def _rule_forward(plan, q, k, v, beta, sums, state):
    from effjax.kernels.delta_rule import tpu_kernels

    o, last, states = tpu_kernels.forward(plan, q, k, v, beta, sums, state, save=True)
    o = checkpoint_name(o, 'delta_rule_out')
    states = checkpoint_name(states, 'delta_rule_states')
    return (o, last), (q, k, v, beta, sums, states)


def _rule_backward(plan, saved, gradients):
    from effjax.kernels.delta_rule import tpu_kernels

    sums = saved[4]
    dq, dk, dv, dbeta, dstate, dfine = tpu_kernels.backward(plan, *saved, *gradients)
    dsums = None if sums is None else Sum(jnp.zeros_like(sums.coarse), *dfine)
    return dq, dk, dv, dbeta, dsums, dstate


_rule.defvjp(_rule_forward, _rule_backward)
