"""The Pallas kernel of `hopper` for the gradients of keys and log-decays, all chunks at once.

With what the transitions read as values of their own, `write` as keys and `read` as queries to them
(`hopper_solved`), the recurrence is a linear one with two queries and two keys a token. Let x and y
stand for q and k with the values v and the outputs' gradient do, or for a and b with s and r; then
    dA_xy = do v^T,  dx' = do S^T,  dy' = v Z^T,
and so for the pairs of one side's queries with the other side's keys. With z of x right of borders
and y left of them, times their decays, as in `linear_recurrence.hopper_chunks`, and both sides'
matrices of pairs filled with what goes both ways, a level gives
    dz = D z + E z*,   D = dA_xy + its transpose,   E = dA_xy* + the transposed dA_x*y,
where a star marks the other side. A block of threads has one chunk of one head and a part of the
keys' columns, which do not meet; it has a warpgroup for each side, which give each other z.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.dplr.hopper_plan import CHUNK, PART, Plan
from effjax.kernels.dplr.hopper_system import reaches
from effjax.kernels.hopper_inverse import product
from effjax.kernels.hopper_memory import matrix
from effjax.kernels.linear_recurrence.hopper_chunks import (
    FLOOR,
    SQUARE,
    WGMMA,
    Pairs,
    Place,
    bounded,
    down,
    either,
    number,
    pairs_of_chunk,
    params,
    place,
    read,
)
from effjax.kernels.linear_recurrence.hopper_kernels import COLUMNS, ROWS, along

_SIDES = _QUERY, _READ = 0, 1  # q and k with v; `read` and `write` with what was read


class Known(NamedTuple):
    """What the kernel reads.

    Attributes:
      keys: q, k, `read` and `write`, bfloat16 [B, N * C, H, K].
      log_decay: float32 [B, N * C, H, K].
      kept: decays over chunks, float32 [B, H, N, K].
      values: v, do, s and r, bfloat16 [B, N * C, H, V].
      states: S and Z, bfloat16 [B, H, N, K, V].
    """

    keys: list[Any]
    log_decay: Any
    kept: Any
    values: list[Any]
    states: list[Any]


class _Own(NamedTuple):
    """A side's own matrices [C, C] in shared memory: D and E, whole and of a level; one more."""

    pairs: Any
    others: Any
    level: Any
    level_others: Any
    reach: Any


class _Barriers(NamedTuple):
    """Of keys; of a block of values, and with its states; both sides' turns; a side's last word."""

    keys: Any
    values: Any
    all: Any
    turn: Any
    told: Any


class _Shared(NamedTuple):
    """Shared memory, in blocks of 64 x 64.

    Attributes:
      keys, kept, values, states: as in `Known`.
      decay: log-decays.
      z: of both sides, of one level and the next [2, 2, C, part].
      own: of each side.
      known: what of the loss flows through the chunk's end [part].
      flow: gradients of log-decays through one side, float32 [C, part].
      arrived: barriers.
    """

    keys: list[Any]
    decay: Any
    kept: Any
    values: list[Any]
    states: list[Any]
    z: Any
    own: list[_Own]
    known: Any
    flow: Any
    arrived: _Barriers


def run(plan: Plan, known: Known) -> tuple[jax.Array, ...]:
    """(dq, dk, dread, dwrite, dlog_decay) [B, N * C, H, K]; the last in float32."""
    batch, length, heads, width = known.log_decay.shape
    keys = jax.ShapeDtypeStruct(known.log_decay.shape, jnp.bfloat16)
    square, row = matrix(*SQUARE), plgpu.SMEM((PART,), jnp.float32)
    arrivals = {'keys': 5, 'values': 4, 'all': 6, 'turn': 2, 'told': 1}
    shared = _Shared(
        keys=[square] * 4,
        decay=square,
        kept=row,
        values=[square] * 4,
        states=[square] * 2,
        z=matrix(2, 2, *SQUARE),
        own=[_Own(*[square] * 5) for _ in _SIDES],
        known=row,
        flow=matrix(*SQUARE, dtype=jnp.float32),
        arrived=_Barriers(**{n: plgpu.Barrier(num_arrivals=x) for n, x in arrivals.items()}),
    )
    found = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=[*[keys] * 4, jax.ShapeDtypeStruct(keys.shape, jnp.float32)],
        scratch_types=[shared],
        grid=(width // PART, length // CHUNK, heads, batch),
        grid_names=('part', 'chunk', 'head', 'row'),
        num_threads=len(_SIDES),
        thread_name='side',
        kernel_name='dplr_gradients',
        compiler_params=params(),
    )(*known.keys, known.log_decay, known.kept, *known.values, *known.states)
    return tuple(found)


class _Block(NamedTuple):
    """One side's view of a block of threads."""

    plan: Plan
    side: int
    at: Place
    these: Pairs
    inputs: Known
    out: list[Any]
    shared: _Shared

    @property
    def own(self) -> _Own:
        return self.shared.own[self.side]

    @property
    def part(self) -> Any:
        return pl.ds(lax.axis_index('part') * PART, PART)

    @property
    def keys(self) -> list[Any]:
        """x and y in shared memory."""
        return self.shared.keys[2 * self.side :][:2]

    @property
    def values(self) -> list[Any]:
        """The values of y, the gradients of what x gives, and the other side's."""
        values = self.shared.values
        return values if self.side == _QUERY else [*values[2:], *values[:2]]

    def meet(self) -> None:
        """Waits until the other side is here too, with all that it wrote or read."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.shared.arrived.turn)
        plgpu.barrier_wait(self.shared.arrived.turn)

    def reach(self, sums: jax.Array, which: Any = None) -> jax.Array:
        """Decays of what x reads through, of sums of log-decays that leave its own out."""
        if self.side == _READ:
            return jnp.exp2(sums)
        return reaches(self, sums, self.shared.decay, which)


def _body(plan: Plan, *refs: Any) -> None:
    inputs = Known([*refs[:4]], refs[4], refs[5], [*refs[6:10]], [*refs[10:12]])
    out, shared = [*refs[12:17]], refs[17]
    side = lax.axis_index('side')

    def work(which: int) -> None:
        @pl.when(side == which)
        def _():
            _gradients(_Block(plan, which, place(plan), pairs_of_chunk(plan), inputs, out, shared))

    for which in _SIDES:
        work(which)


def _gradients(block: _Block) -> None:
    shared = block.shared
    if block.side == _QUERY:
        _begin(block)
    once = block.plan.value_dim == PART
    if block.side == _QUERY and once:
        _bring(block, 0, shared.arrived.all, states=True)
    block.meet()
    own = _pairs(block, once)
    plgpu.barrier_wait(shared.arrived.keys)
    levels = _levels(block, own)
    of_rows, of_columns, known = _through_states(block, once)
    found = _finish(block, levels, of_rows, of_columns)
    if block.side == _READ:
        shared.flow[...] = found
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.arrived.told)
    else:
        _write(block, found, known)
    plgpu.wait_smem_to_gmem(0)


def _begin(block: _Block) -> None:
    """Brings in keys and log-decays."""
    inputs, shared, at = block.inputs, block.shared, block.at
    for source, target in zip(inputs.keys, shared.keys, strict=True):
        source = at.tokens(source, at.head, block.part)
        plgpu.copy_gmem_to_smem(source, target, shared.arrived.keys)
    plgpu.copy_gmem_to_smem(at.own(inputs.kept, block.part), shared.kept, shared.arrived.keys)
    decay = bounded(block.plan, at.tokens(inputs.log_decay, at.head, block.part))
    shared.decay[...] = decay.astype(jnp.bfloat16)


def _bring(block: _Block, n: Any, arrived: Any, *, states: bool) -> None:
    """Copies a block of 64 columns of values, and of states, into shared memory."""
    inputs, shared, at, columns = block.inputs, block.shared, block.at, pl.ds(n * PART, PART)
    for source, target in zip(inputs.values, shared.values, strict=True):
        plgpu.copy_gmem_to_smem(at.tokens(source, at.head, columns), target, arrived)
    if states:
        for source, target in zip(inputs.states, shared.states, strict=True):
            plgpu.copy_gmem_to_smem(at.own(source, block.part, columns), target, arrived)


def _over_values(block: _Block, once: bool, body: Any, carry: list[Any], *, states: bool) -> Any:
    """Calls body(carry) with each block of values, and of states, in shared memory."""
    if once:
        return body(carry)
    arrived = block.shared.arrived.all if states else block.shared.arrived.values

    def turn(n: Any, carry: Any) -> Any:
        block.meet()
        if block.side == _QUERY:
            _bring(block, n, arrived, states=states)
        plgpu.barrier_wait(arrived)
        return body(carry)

    return lax.fori_loop(0, block.plan.value_dim // PART, turn, carry)


def _zeros() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), WGMMA)


def _pairs(block: _Block, once: bool) -> list[jax.Array]:
    """Puts D and E into shared memory, and returns gradients of q k and of q `write` alone [C]."""
    value, given, other_value, other_given = block.values
    if once:
        plgpu.barrier_wait(block.shared.arrived.all)

    def body(sums: list[jax.Array]) -> list[jax.Array]:
        sides = (given, value), (value, given), (given, other_value), (value, other_given)
        return [x + product(SQUARE, (a, b.T)) for x, (a, b) in zip(sums, sides, strict=True)]

    start = [_zeros() for _ in range(4)]
    below, above, below_other, above_other = _over_values(block, once, body, start, states=False)
    before, own = block.these.before(), block.these.own()
    block.own.pairs[...] = jnp.where(before, below, above).astype(jnp.bfloat16)
    others = jnp.where(before, below_other, above_other)
    block.own.others[...] = others.astype(jnp.bfloat16)
    query_write = below_other if block.side == _QUERY else above_other
    return [jnp.sum(jnp.where(own, x, 0.0), axis=1) for x in (below, query_write)]


class _Levels(NamedTuple):
    """Gradients [C, part] of x and y through pairs, and what flows through the tokens' log-decays.

    The flow is what passes a token's log-decay less what passes the next one's, where both sides
    of a pair give exactly the same: summed up nothing is left of pairs that do not meet over it.
    """

    dx: jax.Array
    dy: jax.Array
    flow: jax.Array


def _levels(block: _Block, own: list[jax.Array]) -> _Levels:
    """The gradients through pairs."""
    these, shared, mine, side = block.these, block.shared, block.own, block.side
    x, y = block.keys

    def level(n: Any, both: Any) -> Any:
        half, found = both
        slot = shared.z.at[lax.rem(n, jnp.int32(2))]
        mine.reach[...] = these.reach(half).astype(jnp.bfloat16)
        plgpu.commit_smem()
        right, sums = these.right(half), product(SQUARE, (mine.reach, shared.decay))
        decay = block.reach(sums, right)
        z = either(right, x, y, decay)
        slot.at[side][...] = z
        for source, target in ((mine.pairs, mine.level), (mine.others, mine.level_others)):
            target[...] = jnp.where(these.across(half), read(source), 0.0).astype(jnp.bfloat16)
        block.meet()
        pairs = (mine.level, slot.at[side]), (mine.level_others, slot.at[1 - side])
        dz = product(SQUARE, *pairs)
        given, through = decay * dz, z.astype(jnp.float32) * dz
        of_x, of_y = (down(number(w)) for w in (right, ~right))
        found = _Levels(
            found.dx + given * of_x,
            found.dy + given * of_y,
            found.flow + through * (of_x - of_y),
        )
        return lax.div(half, jnp.uint32(2)), found

    start = jnp.uint32(CHUNK // 2), _Levels(*_own(block, own), _zeros())
    return lax.fori_loop(0, block.plan.levels, level, start)[1]


def _own(block: _Block, own: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and y through a token's own pairs, of its query with both of its keys."""
    q, k, _, write = (read(x) for x in block.shared.keys)
    pair, other = (down(x) for x in own)
    if block.side == _QUERY:
        return pair * k + other * write, pair * q
    return _zeros(), other * q


def _through_states(block: _Block, once: bool) -> tuple[jax.Array, jax.Array, Any]:
    """The products of what x gives and of y's values with the states, and <S, Z> [part]."""
    (value, given, _, _), (state, dstate) = block.values, block.shared.states

    def body(sums: list[jax.Array]) -> list[jax.Array]:
        sides = (given, state), (value, dstate)
        both = [x + product(SQUARE, (a, b.T)) for x, (a, b) in zip(sums, sides, strict=False)]
        if block.side == _QUERY:
            both.append(sums[2] + jnp.sum(read(state) * read(dstate), axis=1))
        return both

    start = [_zeros(), _zeros()]
    if block.side == _QUERY:
        start.append(plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), ROWS))
    of_rows, of_columns, *known = _over_values(block, once, body, start, states=True)
    return of_rows, of_columns, known[0] if known else None


def _finish(block: _Block, levels: _Levels, of_x: jax.Array, of_y: jax.Array) -> jax.Array:
    """Writes the gradients of x and y, and returns what flows through log-decays [C, part]."""
    these, mine, (x, y) = block.these, block.own, block.keys
    dx, dy = block.out[2 * block.side :][:2]

    def sums(which: jax.Array) -> jax.Array:
        mine.reach[...] = number(which).astype(jnp.bfloat16)
        plgpu.commit_smem()
        return product(SQUARE, (mine.reach, block.shared.decay))

    of_x = of_x * block.reach(sums(these.seen()))
    of_y = of_y * jnp.exp2(sums(these.behind()))
    found = _summed(block, these.onward(), levels.flow + of_x * read(x))
    found = found + _summed(block, these.before(), of_y * read(y))
    of_x = of_x + levels.dx
    if block.side == _READ:  # what a transition reads does not flow through its own decay
        found = found - of_x * read(x)
    # Where all products are done z is free; the keys are not, as the other side may read them.
    block.meet()
    for i, (gradient, target) in enumerate(((of_x, dx), (of_y + levels.dy, dy))):
        free = block.shared.z.at[i, block.side]
        free[...] = gradient.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(free, block.at.tokens(target, block.at.head, block.part))
    return found


def _summed(block: _Block, which: jax.Array, x: jax.Array) -> jax.Array:
    """Sums of a flow over the tokens that a matrix of pairs tells [C, part]."""
    mine = block.own
    coarse = x.astype(jnp.bfloat16)  # in two parts of 8 bits: nearly float32
    mine.level[...] = coarse
    mine.level_others[...] = (x - coarse.astype(jnp.float32)).astype(jnp.bfloat16)
    mine.reach[...] = number(which).astype(jnp.bfloat16)
    plgpu.commit_smem()
    return product(SQUARE, (mine.reach, mine.level), (mine.reach, mine.level_others))


def _write(block: _Block, found: jax.Array, known: jax.Array) -> None:
    """Writes the gradients of log-decays, with what the other side found."""
    shared, at = block.shared, block.at
    shared.known[...] = known
    ends = [along(plgpu.load(x, layout=COLUMNS), SQUARE, 1) for x in (shared.kept, shared.known)]
    found = found + ends[0] * ends[1]
    plgpu.barrier_wait(shared.arrived.told)
    found = found + plgpu.load(shared.flow, layout=WGMMA)
    found = jnp.where(read(shared.decay) > FLOOR, found, 0.0)
    at.tokens(block.out[4], at.head, block.part)[...] = found
