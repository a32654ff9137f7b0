"""Linear recurrences on TPUs: Pallas kernels over chunks, forward and backward.

A grid step takes one chunk of a few heads of one row. The chunks of a row follow one another, so
that a head's state stays in VMEM in float32 from the first to the last; only the states before
each chunk go to memory, and those only where a backward pass follows. It walks the chunks from the
end, with the gradient of the state in VMEM, and forms all else again.

Nothing overflows: running sums of log-decays are formed outside, exactly (`kernels.decays`), and
the kernels take the exponential of differences towards the past only. The beginning of a
document is a decay to 0. Heads lie side by side, [B, T, H * K], so that no array is transposed;
K and V are filled up to multiples of 128 lanes, T to a multiple of the chunk.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from effjax.kernels import choice
from effjax.kernels.decays import Sum, before, running
from effjax.kernels.linear_recurrence import tpu_scalar as scalar
from effjax.kernels.linear_recurrence.problem import Problem
from effjax.kernels.linear_recurrence.tpu_plan import LANES, Plan, plan_for

_LIMIT = 56 * 2**20  # what the compiler may use in all: v5p has 64 MiB, v5e and v6e 128
_RESET = -128.0  # exp of it is 0 in float32


def refuse(q: Any, v: Any, decay: str, bonus: bool) -> str | None:
    """Returns why the kernels cannot run this call here, or None.

    Args:
      q: queries [B, T, G, K], or their shape and dtype.
      v: values [B, T, H, V].
      decay: 'none', 'head', 'scalar' or 'vector'.
      bonus: whether there is one.
    """
    if choice.platform() != 'tpu':
        return f'it needs a TPU, not {choice.platform()}'
    if q.dtype.name not in ('bfloat16', 'float32'):
        return f'it takes bfloat16 or float32, not {q.dtype.name}'
    if not (q.size and v.size):
        return f'it takes no empty arrays, as {list(q.shape)} and {list(v.shape)}'
    if decay == 'vector':
        return 'it has no decay for each key dimension'
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = [a for a, kind in kinds if kind != AxisType.Manual and mesh.shape[a] > 1]
    if free:
        return f'XLA cannot cut it along the mesh axes {", ".join(free)}: call it in a shard_map'
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
    q, k, v, state, bonus = problem.q, problem.k, problem.v, problem.state, problem.bonus
    log_decay = _with_documents(problem)
    kind = 'none' if log_decay is None else 'scalar'
    plan = _plan(q, v, kind, bonus is not None)
    assert plan is not None
    length, (key_dim, value_dim) = q.shape[1], state.shape[2:]
    sums = None if log_decay is None else _sums(plan, log_decay, problem.documents)
    lanes = [(0, 0), (0, 0), (0, plan.key_dim - key_dim), (0, plan.value_dim - value_dim)]
    q_, k_, v_ = (_side_by_side(plan, x) for x in (q, k, v))
    o, last = _recurrence(plan, q_, k_, v_, sums, jnp.pad(state, lanes))
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)[:, :length, :, :value_dim]
    if bonus is not None:
        repeat = plan.heads // plan.groups
        own = jnp.repeat(q.astype(o.dtype) * k.astype(o.dtype), repeat, axis=2) * bonus
        o = o + jnp.sum(own, axis=-1, keepdims=True) * v
    return o, last[:, :, :key_dim, :value_dim]


def _with_documents(problem: Problem) -> jax.Array | None:
    """The log-decays, infinite where a document begins."""
    if problem.documents is None:
        return problem.log_decay
    begins = _begins(problem.documents)[..., None]
    if problem.log_decay is None:
        return jnp.where(begins, -jnp.inf, jnp.zeros(problem.v.shape[:3], problem.state.dtype))
    return jnp.where(begins, -jnp.inf, problem.log_decay)


def _begins(documents: jax.Array) -> jax.Array:
    return jnp.diff(documents, axis=1, prepend=0) != 0


def _side_by_side(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, N * C, H * K] in whole chunks and lanes."""
    more = -x.shape[1] % plan.size, -x.shape[3] % LANES
    x = jnp.pad(x, [(0, 0), (0, more[0]), (0, 0), (0, more[1])])
    return x.reshape(*x.shape[:2], -1)


def _sums(plan: Plan, log_decay: jax.Array, documents: jax.Array | None) -> Sum:
    """Running sums in each chunk, [B, steps, N, rows, C]; rows of what is seen last if strict."""

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % plan.size), (0, 0)])
        return x.reshape(x.shape[0], -1, plan.size, x.shape[2])

    total = running(split(log_decay), axis=2)
    parts = [total]
    if plan.strict:
        seen = before(total, axis=2)
        if documents is not None:  # the first token of a document sees nothing before it
            first = split(_begins(documents)[..., None])
            seen = Sum(jnp.where(first, seen.coarse + _RESET, seen.coarse), seen.fine)
        parts.append(seen)

    def rows(*xs: jax.Array) -> jax.Array:
        # [B, N, C, H] -> [B, N, C, kinds, steps, block] -> [B, steps, N, kinds * block, C]
        x = jnp.stack([x.reshape(*x.shape[:3], plan.steps, plan.block) for x in xs], axis=3)
        x = x.transpose(0, 4, 1, 3, 5, 2)
        return x.reshape(*x.shape[:3], -1, plan.size)

    return Sum(rows(*(p.coarse for p in parts)), rows(*(p.fine for p in parts)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, sums: Sum | None, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(o [B, N * C, H * V], last state [B, H, K, V]) of arrays in whole chunks."""
    o, last = _forward(plan, q, k, v, sums, state, save=False)
    return o, last


def _recurrence_forward(plan, q, k, v, sums, state):
    o, last, states = _forward(plan, q, k, v, sums, state, save=True)
    o = checkpoint_name(o, 'linear_recurrence_out')
    states = checkpoint_name(states, 'linear_recurrence_states')
    return (o, last), (q, k, v, sums, states)


def _recurrence_backward(plan, saved, gradients):
    q, k, v, sums, states = saved
    do, dlast = gradients
    dq, dk, dv, dfine, dstate = _backward(plan, q, k, v, sums, states, do, dlast)
    partial = plan.steps * plan.group_block // plan.groups
    if partial > 1:  # several steps share a query head
        dq, dk = (
            x.reshape(*x.shape[:2], plan.groups, partial, -1)
            .sum(3)
            .reshape(q.shape)
            .astype(q.dtype)
            for x in (dq, dk)
        )
    dsums = None
    if sums is not None:
        if sums.fine.shape[0] == 1:
            dfine = jnp.sum(dfine, axis=0, keepdims=True)
        dsums = Sum(jnp.zeros_like(sums.coarse), dfine)
    return dq, dk, dv, dsums, dstate


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


class _Blocks:
    """The blocks of a kernel's arrays, over a grid of (row, step over heads, chunk)."""

    def __init__(self, plan: Plan, chunks: int, reverse: bool):
        self.plan = plan
        self.at: Callable[[Any], Any] = (lambda n: chunks - 1 - n) if reverse else (lambda n: n)

    def tokens(self, width: int, index: Callable[[Any], Any] = lambda j: j) -> pl.BlockSpec:
        """Of [B, T, heads * width]."""
        shape = (None, self.plan.size, width)
        return pl.BlockSpec(shape, lambda b, j, n: (b, self.at(n), index(j)))

    def keys(self) -> pl.BlockSpec:
        """Of queries and keys, which several steps may read."""
        width, sharing = self.plan.group_block * self.plan.key_dim, self.plan.sharing
        if sharing == 1:
            return self.tokens(width)
        return self.tokens(width, lambda j: jax.lax.div(j, jnp.int32(sharing)))

    def values(self) -> pl.BlockSpec:
        return self.tokens(self.plan.block * self.plan.value_dim)

    def sums(self, array: Any) -> pl.BlockSpec:
        """Of running sums, which rows may share."""
        row = (lambda b: b) if array.shape[0] > 1 else (lambda b: 0)
        shape = (None, None, None, *array.shape[3:])
        return pl.BlockSpec(shape, lambda b, j, n: (row(b), j, self.at(n), 0, 0))

    def ends(self) -> pl.BlockSpec:
        """Of states [B, H, K, V] at a row's begin or end."""
        plan = self.plan
        shape = (None, plan.block, plan.key_dim, plan.value_dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, j, 0, 0))

    def states(self) -> pl.BlockSpec:
        """Of states before each chunk [B, N, H, K, V]."""
        plan = self.plan
        shape = (None, None, plan.block, plan.key_dim, plan.value_dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, self.at(n), j, 0, 0))


def _call(plan: Plan, name: str, body: Any, grid: tuple[int, ...], args, in_specs, out, flops):
    """Runs a kernel; `out` is a list of (array's shape and dtype, block)."""
    shapes, out_specs = zip(*out, strict=True)
    moved = sum(x.size * x.dtype.itemsize for x in (*args, *shapes))
    decays = 0 if plan.decay == 'none' else grid[0] * plan.heads * grid[2] * plan.size**2
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((plan.block, plan.key_dim, plan.value_dim), jnp.float32)],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(flops), bytes_accessed=moved, transcendentals=decays
        ),
        name=f'linear_recurrence_{name}',
    )(*args)


def _forward(plan: Plan, q, k, v, sums: Sum | None, state, *, save: bool) -> Any:
    """(o, last state) and, to `save`, the states before each chunk [B, N, H, K, V]."""
    batch, chunks = q.shape[0], q.shape[1] // plan.size
    blocks = _Blocks(plan, chunks, reverse=False)
    decays = [] if sums is None else [*sums]
    shape = jax.ShapeDtypeStruct
    # With a bonus the token's own product is still to be added: no rounding before.
    out = [
        (shape(v.shape, jnp.float32 if plan.strict else v.dtype), blocks.values()),
        (shape(state.shape, state.dtype), blocks.ends()),
    ]
    if save:
        every = shape((batch, chunks, *state.shape[1:]), state.dtype)
        out.append((every, blocks.states()))
    return _call(
        plan,
        'forward',
        functools.partial(_forward_body, plan, save),
        (batch, plan.steps, chunks),
        [q, k, v, *decays, state],
        [blocks.keys(), blocks.keys(), blocks.values(), *map(blocks.sums, decays), blocks.ends()],
        out,
        batch * chunks * plan.forward_flops,
    )


def _backward(plan: Plan, q, k, v, sums: Sum | None, states, do, dlast) -> Any:
    """(dq, dk, dv, gradient of the sums' fine part, gradient of the initial state).

    Where several steps share a query head, dq and dk are one part a step, in float32.
    """
    batch, chunks = q.shape[0], q.shape[1] // plan.size
    blocks = _Blocks(plan, chunks, reverse=True)
    decays = [] if sums is None else [*sums]
    shape = jax.ShapeDtypeStruct
    width = plan.group_block * plan.key_dim
    parts = shape((*q.shape[:2], plan.steps * width), q.dtype)
    if parts.shape != q.shape:
        parts = shape(parts.shape, jnp.float32)
    out = [
        (parts, blocks.tokens(width)),
        (parts, blocks.tokens(width)),
        (shape(v.shape, v.dtype), blocks.values()),
        (shape(dlast.shape, dlast.dtype), blocks.ends()),
    ]
    if sums is not None:
        fine = shape((batch, *sums.fine.shape[1:]), sums.fine.dtype)
        out.append((fine, blocks.sums(fine)))
    known = [blocks.states(), blocks.values(), blocks.ends()]
    dq, dk, dv, dstate, *dfine = _call(
        plan,
        'backward',
        functools.partial(_backward_body, plan),
        (batch, plan.steps, chunks),
        [q, k, v, *decays, states, do, dlast],
        [blocks.keys(), blocks.keys(), blocks.values(), *map(blocks.sums, decays), *known],
        out,
        batch * chunks * plan.backward_flops,
    )
    return dq, dk, dv, dfine[0] if dfine else None, dstate


def _heads(plan: Plan) -> Iterator[tuple[int, list[int]]]:
    """Each query head of a step with the value heads that share it."""
    each = plan.block // plan.group_block
    for g in range(plan.group_block):
        yield g, list(range(g * each, (g + 1) * each))


def _forward_body(plan: Plan, save: bool, q_ref, k_ref, v_ref, *refs) -> None:
    *decays, state_ref, o_ref, last_ref = refs[: -1 - save]
    carried = refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = state_ref[...]

    if save:
        refs[-2][...] = carried[...]
    for g, heads in _heads(plan):
        keys = pl.ds(g * plan.key_dim, plan.key_dim)
        q, k = q_ref[:, keys], k_ref[:, keys]
        scores = scalar.scores(q, k)
        for h in heads:
            values = pl.ds(h * plan.value_dim, plan.value_dim)
            decay = scalar.decays(plan.size, plan.block, plan.strict, decays, h)
            o, after = scalar.forward(q, k, v_ref[:, values], scores, decay, carried[h])
            o_ref[:, values] = o.astype(o_ref.dtype)
            carried[h] = after

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = carried[...]


def _backward_body(plan: Plan, q_ref, k_ref, v_ref, *refs) -> None:
    decays = refs[: 0 if plan.decay == 'none' else 2]
    states_ref, do_ref, dlast_ref, dq_ref, dk_ref, dv_ref, dstate_ref, *rest = refs[len(decays) :]
    *dfine_ref, carried = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dlast_ref[...]

    for g, heads in _heads(plan):
        keys = pl.ds(g * plan.key_dim, plan.key_dim)
        q, k = q_ref[:, keys], k_ref[:, keys]
        scores, group = scalar.scores(q, k), scalar.Group()
        for h in heads:
            values = pl.ds(h * plan.value_dim, plan.value_dim)
            decay = scalar.decays(plan.size, plan.block, plan.strict, decays, h)
            head = scalar.Head(q, k, v_ref[:, values], do_ref[:, values], states_ref[h], carried[h])
            grads = scalar.backward(head, scores, decay, group)
            dv_ref[:, values] = grads.dv.astype(dv_ref.dtype)
            carried[h] = grads.dstate
            if dfine_ref:
                scalar.write_sums(dfine_ref[0], grads, h, plan.block, plan.strict)
        dq, dk = group.finish(q, k)
        dq_ref[:, keys] = dq.astype(dq_ref.dtype)
        dk_ref[:, keys] = dk.astype(dk_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dstate_ref[...] = carried[...]
