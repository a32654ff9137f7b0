"""The truth: the recurrence one token after another, in float32 (float64 for float64 inputs)."""

import functools

import jax
import jax.numpy as jnp

from effjax.kernels.linear_recurrence.problem import Problem

_einsum = functools.partial(jnp.einsum, precision='highest')


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token)."""
    del chunk
    problem = problem.with_heads()
    bonus = problem.bonus

    def token(state, at):
        q, k, v, decay, begins = at
        if begins is not None:
            state = jnp.where(begins[:, None, None, None], 0, state)
        new = k[..., :, None] * v[..., None, :]
        seen = state if bonus is None else state + bonus[..., None] * new
        if decay is not None:
            decay = decay if problem.vector else decay[..., None]
            state = state * jnp.exp(decay)[..., None]
        state = state + new
        return state, _einsum('bhk,bhkv->bhv', q, state if bonus is None else seen)

    begins = None
    if problem.documents is not None:
        begins = jnp.diff(problem.documents, axis=1, prepend=0) != 0
    q, k, v = (x.astype(problem.state.dtype) for x in (problem.q, problem.k, problem.v))
    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, problem.log_decay, begins))
    state, o = jax.lax.scan(token, problem.state, by_token)
    return jnp.moveaxis(o, 0, 1), state
