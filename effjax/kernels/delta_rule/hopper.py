"""The delta rule on Hopper GPUs: Pallas kernels over chunks of 64 tokens (arXiv 2406.06484).

Forward, two kernels. `hopper_system` takes all chunks at once, inverts each one's system and
multiplies keys and values by it; `hopper_walk` then goes from chunk to chunk with the state in
registers and forms what the tokens write, the outputs and the states. Backward, the same walk runs
from the end with the gradient of the state; what is left then has no order any more, and
`hopper_grads` forms it for all chunks at once.

For the backward pass the inputs are kept, and under the name 'delta_rule_states' what the tokens
wrote, the inverses, the keys they multiplied and the states before each chunk, in bfloat16.

Running sums of log-decays are exact differences as on TPUs (`kernels.decays`), and a document
begins with a decay to 0. Products are bfloat16 with float32 sums, as is what is read of a state.
K and V are filled up to multiples of 64, T to a multiple of the chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.decays import Sum, graded
from effjax.kernels.delta_rule.hopper_plan import CHUNK, KEYS, VALUES, Plan, plan_for
from effjax.kernels.delta_rule.problem import Problem, with_documents
from effjax.kernels.devices import refuse_hopper


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
        return f'a state of {q.shape[3]} x {v.shape[3]} is more than {KEYS} x {VALUES}'
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

    log_decay = with_documents(problem)
    sums = None
    if log_decay is not None:
        sums = graded(_rows(log_decay)).map(_summed)
    o, last = _rule(
        plan,
        fill(q, columns[0]),
        fill(problem.k, columns[0]),
        fill(v, columns[1]),
        _rows(problem.beta),
        sums,
        jnp.pad(state, [(0, 0), (0, 0), *columns]),
    )
    return o[:, :length, :, :value_dim], last[:, :, :key_dim, :value_dim]


def _rows(x: jax.Array) -> jax.Array:
    """[B, T, H] -> [B, H, N, C] in whole chunks; zeros neither decay nor write."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK), (0, 0)])
    return x.reshape(x.shape[0], -1, CHUNK, x.shape[2]).transpose(0, 3, 1, 2)


def _summed(x: jax.Array) -> jax.Array:
    """Running sums along the last dimension, as a product: XLA's own start each sum anew."""
    triangle = jnp.triu(jnp.ones((x.shape[-1],) * 2, x.dtype))
    return jnp.matmul(x, triangle, precision=jax.lax.Precision.HIGHEST)


def _each(beta: jax.Array, sums: Sum | None) -> jax.Array:
    """The numbers that the kernels read of each token, [B, H, N, ROWS, C]."""
    if sums is None:
        sums = Sum(jnp.zeros_like(beta), jnp.zeros_like(beta))
    left = sums.map(lambda x: x[..., -1:]).over(sums)
    return jnp.stack([*sums, sums.exp(), jnp.exp(left), beta], axis=3)


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
    """(o [B, N * C, H, V], last state [B, H, K, V]) of arrays in whole chunks."""
    walked, _ = _walk(plan, q, k, v, _each(beta, sums), state, save=False)
    return walked.o, walked.last


def _walk(plan, q, k, v, rows, state, *, save):
    # Pallas takes long to import
    from effjax.kernels.delta_rule import hopper_system, hopper_walk

    solved = hopper_system.solve(plan, k, v, rows)
    walk = plan.walk(save=save)
    return hopper_walk.run(walk, q, k, solved.reads, solved.values, rows, state), solved


def _rule_forward(plan, q, k, v, beta, sums, state):
    walked, solved = _walk(plan, q, k, v, _each(beta, sums), state, save=True)
    o = checkpoint_name(walked.o, 'delta_rule_out')
    kept = solved.inverse, solved.reads, walked.new, walked.states
    kept = checkpoint_name(kept, 'delta_rule_states')
    return (o, walked.last), (q, k, v, beta, sums, *kept)


def _rule_backward(plan, saved, gradients):
    from effjax.kernels.delta_rule import hopper_grads, hopper_walk

    q, k, v, beta, sums, inverse, reads, new, states = saved
    do, dlast = gradients
    rows = _each(beta, sums)
    back = hopper_walk.run(plan.walk(reverse=True, save=True), q, k, reads, do, rows, dlast)
    known = hopper_grads.Known(q, k, v, do, new, back.new, states, back.states, inverse, rows)
    grads = hopper_grads.gradients(plan, known)
    dsums = None if sums is None else Sum(jnp.zeros_like(sums.coarse), grads.dsums)
    return grads.dq, grads.dk, grads.dv, grads.dbeta, dsums, back.last


_rule.defvjp(_rule_forward, _rule_backward)
