"""RWKV-7's recurrence on Hopper GPUs: Pallas kernels over chunks of 64 tokens.

`hopper_system` takes all chunks at once: it solves each one's triangular system, before any state
is known, and folds the answer into what a walk over chunks reads,
    o = W v + Q S,    S' = e^(G_C) S + P S + X^T v,
which is that of a linear recurrence whose keys decay by themselves and whose state also goes
through a matrix P; the kernel of `linear_recurrence` walks. Backwards the same is formed again, the
same kernel walks with queries and keys exchanged, giving dv and the gradients of states, and from
both walks' states all other gradients follow for all chunks at once (`hopper_gradients`). Kept for
that are the inputs and the states before each chunk, in bfloat16.

Products are bfloat16 with float32 sums, as is what is read of a state. `read` and `write` may be
float32, and are rounded; so are log-decays, as `linear_recurrence.hopper_vector` says. A document
begins with a decay to 0, and its first token reads nothing. K and V are filled up to multiples of
64, T to a multiple of the chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.devices import refuse_hopper
from effjax.kernels.documents import spread
from effjax.kernels.dplr.hopper_plan import CHUNK, KEYS, Plan, plan_for
from effjax.kernels.dplr.problem import Problem, with_documents
from effjax.kernels.linear_recurrence.problem import first_tokens


def refuse(q: Any, k: Any, v: Any) -> str | None:
    """Returns why the kernels cannot run this call here, or None.

    Args:
      q: queries [B, T, H, K], or their shape and dtype.
      k: keys, of the shape of q.
      v: values [B, T, H, V].
    """
    if (why := refuse_hopper()) is not None:
        return why
    for x in (q, k, v):
        if x.dtype.name != 'bfloat16':
            return f'it takes bfloat16, not {x.dtype.name}'
    if not (q.size and v.size):
        return f'it takes no empty arrays, as {list(q.shape)} and {list(v.shape)}'
    if _plan(q, v) is None:
        return f'K = {q.shape[3]} is more than {KEYS}'
    return None


def _plan(q: Any, v: Any) -> Plan | None:
    return plan_for(q.shape[2], q.shape[3], v.shape[3])


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token)."""
    del chunk  # 'xla's; the kernels have their own
    q, v, state = problem.q, problem.v, problem.state
    plan = _plan(q, v)
    assert plan is not None
    length, (key_dim, value_dim) = q.shape[1], state.shape[2:]
    more = -length % CHUNK
    columns = (0, plan.key_dim - key_dim), (0, plan.value_dim - value_dim)

    def fill(x: jax.Array, columns: tuple[int, int]) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, more), (0, 0), columns])

    read, log_decay = problem.read, with_documents(problem)
    if problem.documents is not None:
        first = spread(first_tokens(problem.documents), read)
        read = jnp.where(first, 0, read)  # of the state before, which a decay keeps from others
    keys = (q, problem.k, read, problem.write)
    q, k, read, write = (fill(x, columns[0]) for x in keys)
    o, last = _recurrence(
        plan,
        q,
        k,
        fill(v, columns[1]),
        read,
        write,
        fill(log_decay, columns[0]),
        jnp.pad(state, [(0, 0), (0, 0), *columns]),
    )
    return o[:, :length, :, :value_dim], last[:, :, :key_dim, :value_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    read: jax.Array,
    write: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(o [B, N * C, H, V], last state [B, H, K, V]) of arrays in whole chunks.

    Args:
      plan: of the call.
      q, k, read, write: bfloat16 [B, N * C, H, K].
      v: bfloat16 [B, N * C, H, V].
      log_decay: float32 [B, N * C, H, K].
      state: float32 [B, H, K, V].
    """
    out = _walk(plan, q, k, v, read, write, log_decay, state, save=False)
    return out.o, out.last


def _walk(plan, q, k, v, read, write, log_decay, state, *, save):
    from effjax.kernels.dplr import hopper_system  # Pallas takes long to import
    from effjax.kernels.linear_recurrence import hopper_kernels

    chunks = hopper_system.run(plan, q, k, read, write, log_decay)
    walk, given = plan.forward(save=save), (chunks.weights, chunks.kept, chunks.across)
    return hopper_kernels.run(walk, chunks.queries, chunks.keys, v, None, state, None, *given)


def _forward(plan, q, k, v, read, write, log_decay, state):
    inputs = q, k, v, read, write, log_decay
    out = _walk(plan, *inputs, state, save=True)
    o = checkpoint_name(out.o, 'dplr_out')
    states = checkpoint_name(out.states, 'dplr_states')
    return (o, out.last), (*inputs, states)


def _backward(plan, saved, gradients):
    from effjax.kernels.dplr import hopper_gradients, hopper_solved, hopper_system
    from effjax.kernels.linear_recurrence import hopper_kernels

    *inputs, states = saved
    do, dlast = gradients
    # Else XLA keeps what the forward pass formed, more than what is kept for this one.
    *inputs, do = jax.lax.optimization_barrier((*inputs, do))
    q, k, v, read, write, log_decay = inputs
    chunks = hopper_system.run(plan, q, k, read, write, log_decay, save=True)
    walk, given = plan.values(save=True), (chunks.weights, chunks.kept, chunks.across)
    back = hopper_kernels.run(walk, chunks.keys, chunks.queries, do, None, dlast, None, *given)
    solved = hopper_solved.run(plan, chunks, v, do, states, back.states)
    values, both = [v, do, *solved], [states, back.states]
    known = hopper_gradients.Known([q, k, read, write], log_decay, chunks.kept, values, both)
    dq, dk, dread, dwrite, ddecay = hopper_gradients.run(plan, known)
    return dq, dk, back.o, dread, dwrite, ddecay, back.last


_recurrence.defvjp(_forward, _backward)
