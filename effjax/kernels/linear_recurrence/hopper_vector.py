"""Linear recurrences on Hopper GPUs where each key dimension decays by itself (GLA, RWKV-6).

The decay stands inside the product of query and key, so that the weights of a chunk's pairs cost
far more than what follows from them. They are formed first, all chunks at once (`hopper_weights`),
and with them queries times their decays from the chunk's begin and keys times theirs to its end;
then the kernel for other decays walks over what is left,
    o = A v + q' S,    S' = e^(G_C) S + k'^T v.
Backwards the same are formed again, the same kernel walks with queries and keys exchanged, giving
dv and the gradients of states, and from both walks' states all chunks' dq, dk and gradients of
log-decays follow at once, without a sum that runs over chunks. Kept for that are the inputs and
the states before each chunk, in bfloat16.

A token's log-decay is rounded to bfloat16, which is less than rounding what it decays: where D is
wrong by 2^-9 of itself, e^-D is by at most 2^-9 D e^-D. A document begins with a decay to 0. With a
bonus (RWKV-6) a token reads what lies before it, and XLA adds what it has of itself.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.documents import spread
from effjax.kernels.linear_recurrence.hopper_plan import Plan
from effjax.kernels.linear_recurrence.problem import Problem, first_tokens

_WEAKEST, _FIRST = -128.0, -1024.0  # exp of both is 0 in float32


def marked(problem: Problem) -> jax.Array:
    """The log-decays, where one begins a document lower than any other."""
    assert problem.log_decay is not None
    if problem.documents is None:
        return problem.log_decay
    bounded = jnp.maximum(problem.log_decay, _WEAKEST)
    return jnp.where(spread(first_tokens(problem.documents), bounded), _FIRST, bounded)


def own(problem: Problem) -> jax.Array:
    """What each token reads of itself through the bonus, float32 [B, T, H, V]."""
    assert problem.bonus is not None
    q, k = (x.astype(problem.bonus.dtype) for x in (problem.q, problem.k))
    product = jnp.repeat(q * k, problem.v.shape[2] // q.shape[2], axis=2)
    return jnp.sum(product * problem.bonus, axis=-1, keepdims=True) * problem.v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(o [B, N * C, H, V], last state [B, H, K, V]) of arrays in whole chunks.

    Args:
      plan: of the call.
      q, k: bfloat16 [B, N * C, G, K].
      v: bfloat16 [B, N * C, H, V].
      log_decay: float32 [B, N * C, H, K].
      state: float32 [B, H, K, V].
    """
    out = _walk(plan, q, k, v, log_decay, state, save=False)
    return out.o, out.last


def _walk(plan, q, k, v, log_decay, state, *, save):
    from effjax.kernels.linear_recurrence import hopper_kernels, hopper_weights  # Pallas: slow

    read, written, weights, kept = hopper_weights.run(plan, q, k, log_decay)
    walk = plan.forward(save=save)
    return hopper_kernels.run(walk, read, written, v, None, state, None, weights, kept)


def _forward(plan, q, k, v, log_decay, state):
    out = _walk(plan, q, k, v, log_decay, state, save=True)
    o = checkpoint_name(out.o, 'linear_recurrence_out')
    states = checkpoint_name(out.states, 'linear_recurrence_states')
    return (o, out.last), (q, k, v, log_decay, states)


def _backward(plan, saved, gradients):
    from effjax.kernels.linear_recurrence import (
        hopper_gradients,
        hopper_kernels,
        hopper_weights,
    )

    q, k, v, log_decay, states = saved
    do, dlast = gradients
    # Else XLA keeps what the forward pass formed, more than what is kept for this one.
    q, k, log_decay, do = jax.lax.optimization_barrier((q, k, log_decay, do))
    read, written, weights, kept = hopper_weights.run(plan, q, k, log_decay)
    walk = plan.values(save=True)
    back = hopper_kernels.run(walk, written, read, do, None, dlast, None, weights, kept)
    dq, dk, ddecay = hopper_gradients.run(plan, q, k, log_decay, kept, v, do, states, back.states)
    if dq.shape != q.shape:
        parts = (*q.shape[:3], plan.heads // plan.groups, q.shape[3])
        dq, dk = (
            jnp.sum(x.reshape(parts), axis=3, dtype=jnp.float32).astype(q.dtype) for x in (dq, dk)
        )
    return dq, dk, back.o, ddecay, back.last


recurrence.defvjp(_forward, _backward)
