"""Rows cut into stretches for `hopper`, and the states between them.

A stretch gives e^G S + (what it adds to a state of zeros), G its sum of log-decays. So one walk
without outputs over all stretches at once gives the states before each of them, and a walk the
other way, over queries and gradients of outputs, the gradients of the states behind them.
"""

import jax
import jax.numpy as jnp

from effjax.kernels.linear_recurrence.hopper_plan import Plan


def cut(plan: Plan, x: jax.Array | None) -> jax.Array | None:
    """[B, N * C, ...] with stretches as rows."""
    if x is None or plan.stretches == 1:
        return x
    return x.reshape(x.shape[0] * plan.stretches, -1, *x.shape[2:])


def joined(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, N * C, ...] of what `cut` returns."""
    if plan.stretches == 1:
        return x
    return x.reshape(x.shape[0] // plan.stretches, -1, *x.shape[2:])


def at(plan: Plan, x: jax.Array, stretch: int) -> jax.Array:
    """One stretch's of what each has [B * stretches, ...]."""
    return x.reshape(-1, plan.stretches, *x.shape[1:])[:, stretch]


def states(plan: Plan, k, v, sums, log_decay, state: jax.Array, reverse: bool = False) -> jax.Array:
    """The states before each stretch [B * stretches, H, K, V], float32.

    Args:
      plan: of the call.
      k, v: bfloat16, cut; `reverse`: queries and gradients of outputs.
      sums: of log-decays, as the kernel takes them.
      log_decay: float32, cut, or None.
      state: before the first stretch [B, H, K, V]; `reverse`: the gradient of the last state, of
        which those behind each stretch are returned.
      reverse: the other way.
    """
    if plan.stretches == 1:
        return state
    from effjax.kernels.linear_recurrence import hopper_kernels  # Pallas takes long to import

    zero = jnp.zeros((k.shape[0], *state.shape[1:]), state.dtype)
    added = hopper_kernels.run(plan.states(reverse=reverse), None, k, v, sums, zero).last
    kept = jnp.ones(added.shape[:2], state.dtype)
    if log_decay is not None:
        kept = jnp.exp(jnp.sum(log_decay, axis=1))

    def step(state: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        kept, added = at
        return kept[..., None, None] * state + added, state

    parts = [jnp.moveaxis(x.reshape(-1, plan.stretches, *x.shape[1:]), 1, 0) for x in (kept, added)]
    found = jax.lax.scan(step, state, tuple(parts), reverse=reverse)[1]
    return jnp.moveaxis(found, 0, 1).reshape(added.shape)
