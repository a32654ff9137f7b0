"""Linear recurrences on Hopper GPUs: one Pallas kernel, walked once forwards and thrice for grads.

Every gradient is a recurrence of the same kind, so that one kernel (`hopper_kernels`) does all:
    o  = walk(q, k, v) forwards from the initial state S_0;
    dv = walk(k, q, do) backwards from the gradient of the last state, ending in that of S_0;
    dq = walk(do, v, k) forwards from S_0^T, and dk = walk(v, do, q) backwards from dS_T^T.
Nothing is kept for the backward pass but the inputs, and each walk reads three arrays and writes
one: as much traffic as one walk with saved states, without partial sums of dq and dk over the
blocks of threads that share a head's queries.

The gradient of log-decays. Let f_t be what of the loss flows through the decay at token t:
    f_t = <S_(t-1) a_t, dS_t>,    f_t - f_(t+1) = q_t dq_t - k_t dk_t.
Summed up from the end of a long row the differences would drift, since products round the state
to bfloat16 in each direction by itself. So both directions keep their states at every
`SAVE`-th border of chunks, <S, dS> gives f there, and sums run from the next border only.

Decays that nothing trains, such as RetNet's, cost none of that.

Few rows and heads leave most of a GPU idle. Then a row is cut into stretches: a walk without
outputs gives what each adds to a state of zeros, from which the states between them follow, and
then all are walked as rows of their own. Backwards a walk over queries and gradients of outputs
does the same for the gradients of states (`hopper_stretches`).

Running sums of log-decays are exact differences as on TPUs (`kernels.decays`), and a document
begins with a decay to 0. Products are bfloat16 with float32 sums, as is what is read of a state.

Where each key dimension decays by itself, `hopper_vector` stands for all of this.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.decays import Sum, graded
from effjax.kernels.devices import refuse_hopper
from effjax.kernels.linear_recurrence import hopper_vector
from effjax.kernels.linear_recurrence.hopper_plan import CHUNK, SAVE, Plan, plan_for, stretches
from effjax.kernels.linear_recurrence.hopper_stretches import at, cut, joined, states
from effjax.kernels.linear_recurrence.problem import Problem, with_documents

STAGED = False  # weights go through shared memory: pallas' interpreter has no other way
_NOTHING = -104.0  # exp of less is 0 in float32


def refuse(q: Any, v: Any, decay: str, bonus: bool) -> str | None:
    """Returns why the kernel cannot run this call here, or None.

    Args:
      q: queries [B, T, G, K], or their shape and dtype.
      v: values [B, T, H, V].
      decay: 'none', 'head', 'scalar' or 'vector'.
      bonus: whether there is one.
    """
    if (why := refuse_hopper()) is not None:
        return why
    if bonus and decay != 'vector':
        return 'it has a bonus only beside a decay of each key dimension'
    if q.dtype.name != 'bfloat16':
        return f'it takes bfloat16, not {q.dtype.name}'
    if not (q.size and v.size):
        return f'it takes no empty arrays, as {list(q.shape)} and {list(v.shape)}'
    if _plan(q, v, decay=decay) is None:
        return f'K = {q.shape[3]} is more than 256'
    return None


def _plan(q: Any, v: Any, **facts: Any) -> Plan | None:
    return plan_for(v.shape[2], q.shape[2], q.shape[3], v.shape[3], staged=STAGED, **facts)


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token).

    Args:
      problem: the call.
      chunk: of 'xla'.
    """
    del chunk  # 'xla's; the kernel has its own
    q, k, v, state = problem.q, problem.k, problem.v, problem.state
    vector, bonus = problem.vector, problem.bonus
    documents = problem.documents is not None
    log_decay = with_documents(problem) if bonus is None else hopper_vector.marked(problem)
    kind = 'none' if log_decay is None else 'vector' if vector else 'scalar'
    strict = bonus is not None
    number = 1 if vector else stretches(*q.shape[:2], *v.shape[2:])
    plan = _plan(q, v, decay=kind, strict=strict, resets=strict and documents, stretches=number)
    assert plan is not None
    length, (key_dim, value_dim) = q.shape[1], state.shape[2:]
    more = -length % (CHUNK * number)
    columns = (0, plan.key_dim - key_dim), (0, plan.value_dim - value_dim)

    def fill(x: jax.Array, columns: tuple[int, int]) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, more), (0, 0), columns])

    if log_decay is not None:
        log_decay = (
            fill(log_decay, columns[0]) if vector else fill(log_decay[..., None], (0, 0))[..., 0]
        )
        if number > 1:  # one for all rows would have to be cut for each of them
            log_decay = jnp.broadcast_to(log_decay, (q.shape[0], *log_decay.shape[1:]))
    o, last = (hopper_vector.recurrence if vector else _recurrence)(
        plan,
        fill(q, columns[0]),
        fill(k, columns[0]),
        fill(v, columns[1]),
        log_decay,
        jnp.pad(state, [(0, 0), (0, 0), *columns]),
    )
    o = o[:, :length, :, :value_dim]
    if bonus is not None:
        o = o + hopper_vector.own(problem)
    return o, last[:, :, :key_dim, :value_dim]


def _chunks(x: jax.Array) -> jax.Array:
    """[B, N * C, H] -> [B, H, N, C]."""
    x = x.reshape(x.shape[0], -1, CHUNK, x.shape[2])
    return x.transpose(0, 3, 1, 2)


def _sums(log_decay: jax.Array | None) -> jax.Array | None:
    """What the kernel reads of decays, [B, H, N, 4, C]; its `SEEN` and `LEFT` are 2 and 3."""
    if log_decay is None:
        return None
    total = Sum(*(_summed(part) for part in graded(_chunks(log_decay))))
    left = total.map(lambda x: x[..., -1:]).over(total)
    parts = (total.coarse, total.fine, jnp.exp(total.coarse + total.fine), jnp.exp(left))
    return jnp.stack(parts, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: Any, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(o [B, N * C, H, V], last state [B, H, K, V]) of arrays in whole chunks."""
    out = _walk(plan, plan.forward(), q, k, v, log_decay, state)[1]
    return joined(plan, out.o), at(plan, out.last, -1)


def _walk(plan, walk, q, k, v, log_decay, state):
    """(the states before each stretch; what the walk over all stretches gives)."""
    from effjax.kernels.linear_recurrence import hopper_kernels  # Pallas takes long to import

    q, k, v, log_decay = (cut(plan, x) for x in (q, k, v, log_decay))
    sums = _sums(log_decay)
    state = states(plan, k, v, sums, log_decay, state)
    return state, hopper_kernels.run(walk, q, k, v, sums, state)


def _recurrence_forward(plan, *inputs):
    q, k, v, log_decay, state = (None if x is None else x.value for x in inputs)
    trained = log_decay is not None and inputs[3].perturbed
    state, out = _walk(plan, plan.forward(save=trained), q, k, v, log_decay, state)
    o = checkpoint_name(joined(plan, out.o), 'linear_recurrence_out')
    inner = out.states
    if inner is not None:
        inner = checkpoint_name(inner, 'linear_recurrence_states')
    # Last states are kept where decays have a gradient, and say in the backward pass that so.
    kept = q, k, v, log_decay, state, inner, out.last if trained else None
    return (o, at(plan, out.last, -1)), kept


def _recurrence_backward(plan, saved, gradients):
    from effjax.kernels.linear_recurrence import hopper_kernels

    *rows, state, inner, last = saved
    do, dlast = (_array(x) for x in gradients)
    q, k, v, log_decay, do = (cut(plan, x) for x in (*rows, do))
    trained, sums = last is not None, _sums(log_decay)
    dlast = states(plan, q, do, sums, log_decay, dlast, reverse=True)
    back = hopper_kernels.run(plan.values(save=trained), k, q, do, sums, dlast)

    def parts(x):  # [B, T, H, V] -> [B, T, H * parts, V / parts]
        return x.reshape(*x.shape[:2], -1, plan.value_dim // plan.parts)

    def turned(x):  # [B, H, K, V] -> [B, H * parts, V / parts, K]
        x = x.swapaxes(2, 3)
        return x.reshape(x.shape[0], -1, plan.value_dim // plan.parts, x.shape[3])

    do_, v_ = parts(do), parts(v)
    forwards = plan.queries(reverse=False, like=trained)
    backwards = plan.queries(reverse=True, like=trained)
    alike = (q, k) if trained else (None, None)
    of_q = hopper_kernels.run(forwards, do_, v_, k, sums, turned(state), alike[0])
    of_k = hopper_kernels.run(backwards, v_, do_, q, sums, turned(dlast), alike[1])
    dq, dk = (_over_heads(plan, x.o, q) for x in (of_q, of_k))
    ddecay = None
    if trained:
        flow = _of_heads(plan, of_q.rows) - _of_heads(plan, of_k.rows)
        known = jnp.sum(last * dlast, axis=(2, 3))[..., None]
        if inner is not None:
            between = jnp.einsum(
                'bhnkv,bhnkv->bhn', inner, back.states, preferred_element_type=jnp.float32
            )
            known = jnp.concatenate([between, known], axis=2)
        ddecay = _flow_from_ends(flow, known)
        if log_decay.shape[0] == 1:
            ddecay = jnp.sum(ddecay, axis=0, keepdims=True)
        ddecay = joined(plan, jnp.where(log_decay > _NOTHING, ddecay, 0.0))
    dq, dk, dv = (joined(plan, x) for x in (dq, dk, back.o))
    return dq, dk, dv, ddecay, at(plan, back.last, 0)


def _array(x: Any) -> jax.Array:
    """A gradient, which may be a zero that has no array."""
    zero = isinstance(x, jax.custom_derivatives.SymbolicZero)
    return jnp.zeros(x.shape, x.dtype) if zero else x


def _summed(x: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Running sums along the last dimension, as a product: XLA's own start each sum anew."""
    ones = jnp.ones((x.shape[-1],) * 2, x.dtype)
    triangle = jnp.tril(ones) if reverse else jnp.triu(ones)
    return jnp.matmul(x, triangle, precision=jax.lax.Precision.HIGHEST)


def _over_heads(plan: Plan, x: jax.Array, like: jax.Array) -> jax.Array:
    """Sums [B, T, H * parts, K] over the heads and parts that share a query head.

    Each is rounded to bfloat16 before, as their sum is after: in float32 they would take twice the
    time to write and to read, most of what Mamba-2's backward pass does.
    """
    if x.shape == like.shape:
        return x
    x = x.reshape(*like.shape[:3], -1, like.shape[3])
    return jnp.sum(x, axis=3, dtype=jnp.float32).astype(like.dtype)


def _of_heads(plan: Plan, rows: jax.Array) -> jax.Array:
    """Sums [tiles, B, H * parts, N, C] over tiles and parts, to [B, H, N, C]."""
    rows = jnp.sum(rows, axis=0)
    rows = rows.reshape(rows.shape[0], plan.heads, -1, *rows.shape[2:])
    return jnp.sum(rows, axis=2)


def _flow_from_ends(difference: jax.Array, known: jax.Array) -> jax.Array:
    """The flow through the decay at each token, [B, N * C, H].

    Args:
      difference: between a token's flow and the next one's, [B, H, N, C].
      known: the flow behind each group of `SAVE` chunks, [B, H, groups].
    """
    batch, heads, chunks, size = difference.shape
    groups = known.shape[2]
    x = jnp.pad(difference, [(0, 0), (0, 0), (0, groups * SAVE - chunks), (0, 0)])
    x = x.reshape(batch, heads, groups, -1)
    x = _summed(x, reverse=True) + known[..., None]
    return x.reshape(batch, heads, -1)[:, :, : chunks * size].swapaxes(1, 2)


_recurrence.defvjp(_recurrence_forward, _recurrence_backward, symbolic_zeros=True)
