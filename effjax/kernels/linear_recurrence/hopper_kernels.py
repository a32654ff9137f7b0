"""The Pallas kernel of `hopper`: one walk over the chunks of a row, forwards or backwards.

A block of threads has one head of one row and some columns of v, and walks the row's chunks. Its
warpgroups have roles: one has the state in registers, in float32, and puts a copy of it before
each chunk into shared memory; the readers take turns at the chunks and form their outputs, with no
state of their own to wait for but that copy; one brings in what the others need. With G the
running sums of log-decays in a chunk and S the state before it, a walk forwards forms
    o_i = sum_{j <= i} (q_i k_j) e^(G_i - G_j) v_j + e^(G_i) q_i S,
    S'  = e^(G_C) S + sum_j k_j (e^(G_C - G_j) v_j)^T,
and one backwards, where the state comes from behind the chunk,
    o_i = sum_{j >= i} (q_i k_j) e^(G_j - G_i) v_j + e^(G_C - G_i) q_i S,
    S'  = e^(G_C) S + sum_j k_j (e^(G_j) v_j)^T.
Where a chunk has a matrix P that the state goes through, P S is part of S', or backwards P^T S.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels import hopper_inverse
from effjax.kernels.hopper_memory import matrix
from effjax.kernels.linear_recurrence.hopper_plan import Walk

ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
SEEN, LEFT = 2, 3  # rows of `sums`: decays from the chunk's begin, and to its end


class _Inputs(NamedTuple):
    """References in global memory; in `_Rings` those in shared memory, a chunk an entry."""

    q: Any
    k: Any
    v: Any
    sums: Any = None
    like: Any = None
    weights: Any = None
    kept: Any = None
    across: Any = None


class _Shared(NamedTuple):
    """Shared memory.

    Attributes:
      rings: the inputs of some chunks.
      states: states before some chunks [slots, K, tile].
      out: outputs of each reader [readers, C, tile].
      written: v times its decays [C, tile].
      weights: each reader's weights [readers, C, C], where they do not stay in registers.
      rows: each reader's products with `like` [readers, C].
      full, empty: barriers of the entries of `rings`.
      stored, read: barriers of the entries of `states`.
    """

    rings: _Inputs
    states: Any
    out: Any
    written: Any
    weights: Any
    rows: Any
    full: Any
    empty: Any
    stored: Any
    read: Any


class _Outputs(NamedTuple):
    """References in global memory to what `walk` returns."""

    o: Any
    last: Any
    states: Any = None
    rows: Any = None


def run(
    walk: Walk, q, k, v, sums, state, like=None, weights=None, kept=None, across=None
) -> _Outputs:
    """Runs the recurrence over whole chunks.

    Args:
      walk: how, and what to return.
      q, k: bfloat16 [B, N * C, G, K]; their G may differ. No q where the walk has no readers.
      v: bfloat16 [B, N * C, G, V].
      sums: float32 [B or 1, H, N, 4, C], running sums of log-decays, coarse and fine, and the
        decays from the chunk's begin to each token and from there to its end; or None.
      state: float32 [B, H, K, V], before the first chunk, or behind the last.
      like: bfloat16 [B, N * C, G, V], or None.
      weights: bfloat16 [B, H, N, C, C], of pairs, or None; a walk backwards takes the transposed.
      kept: float32 [B, H, N, K], the share of the state's rows that each chunk keeps, or None.
      across: bfloat16 [B, H, N, K, K], P of each chunk, or None.

    Returns:
      o [B, N * C, H, V], or None without readers; the last state; and where asked for: states at
      inner borders of groups of chunks, or with weights given those that each chunk reads, bfloat16
      [B, H, borders, K, V]; sums over columns of o * like in float32, one for each tile,
      [tiles, B, H, N, C].
    """
    batch, length = k.shape[:2]
    heads, value_dim = state.shape[1], state.shape[3]
    chunks, tiles = length // walk.size, value_dim // walk.tile
    shape = jax.ShapeDtypeStruct
    out = _Outputs(
        shape((batch, length, heads, value_dim), k.dtype) if walk.readers else None,
        shape(state.shape, state.dtype),
        shape((batch, heads, walk.borders(chunks), *state.shape[2:]), k.dtype)
        if walk.borders(chunks)
        else None,
        None if like is None else shape((tiles, batch, heads, chunks, walk.size), jnp.float32),
    )
    inputs = _Inputs(q, k, v, sums, like, weights, kept, across)
    there = [i is not None for i in (*inputs, *out)]
    args = [x for x in inputs if x is not None]
    results = plgpu.kernel(
        functools.partial(_body, walk, there),
        out_type=[x for x in out if x is not None],
        scratch_types=[_scratch(walk, there)],
        grid=(tiles, heads, batch),
        grid_names=('tile', 'head', 'row'),
        kernel_name=f'linear_recurrence_walk{_suffix(walk)}',
        num_threads=walk.readers + 2,
        thread_name='role',
        # With layouts named here: finding them takes pallas minutes for this many arrays.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*args, state)
    return _Outputs(*_spread(there[len(inputs) :], results))


def _suffix(walk: Walk) -> str:
    if walk.given:
        return '_across' if walk.across else '_given'
    return '' if walk.readers else '_states'


def _spread(there: list[bool], found: Any) -> list[Any]:
    found = iter(found)
    return [next(found) if x else None for x in there]


def _scratch(walk: Walk, there: list[bool]) -> Any:
    size, width, tile = walk.size, walk.key_dim, walk.tile

    def barriers(count: int, arrivals: int) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    decays, like = there[3], there[4]
    return _Shared(
        _Inputs(
            matrix(walk.stages, size, width) if walk.readers else None,
            matrix(walk.stages, size, width),
            matrix(walk.stages, size, tile),
            plgpu.SMEM((walk.stages, 4, size), jnp.float32) if decays else None,
            matrix(walk.stages, size, tile) if like else None,
            matrix(walk.stages, size, size) if walk.given else None,
            plgpu.SMEM((walk.stages, width), jnp.float32) if walk.given else None,
            matrix(walk.stages, width, width) if walk.across else None,
        ),
        states=matrix(walk.slots, width, tile) if walk.readers else None,
        out=matrix(walk.readers, size, tile) if walk.readers else None,
        written=matrix(size, tile) if decays else None,
        weights=matrix(walk.readers, size, size)
        if walk.readers and walk.staged and not walk.given
        else None,
        rows=plgpu.SMEM((walk.readers, size), jnp.float32) if like else None,
        full=barriers(walk.stages, sum(there[: len(_Inputs._fields)])),
        empty=barriers(walk.stages, min(walk.readers, 1) + 1),  # a reader, and who has the state
        stored=barriers(walk.slots, 1) if walk.readers else None,
        read=barriers(walk.slots, 1) if walk.readers else None,
    )


class _Block(NamedTuple):
    """One block of threads: what it works on and with."""

    walk: Walk
    inputs: _Inputs
    initial: Any
    out: _Outputs
    shared: _Shared
    chunks: int

    def at(self, step: jax.Array) -> jax.Array:
        """The chunk of a step."""
        return self.chunks - 1 - step if self.walk.reverse else step

    def columns(self) -> Any:
        return pl.ds(lax.axis_index('tile') * self.walk.tile, self.walk.tile)

    def head(self) -> tuple[jax.Array, jax.Array]:
        return lax.axis_index('row'), lax.axis_index('head')


def _body(walk: Walk, there: list[bool], *refs: Any) -> None:
    shared = refs[-1]
    fields = len(_Inputs._fields)
    count = sum(there[:fields])
    inputs = _Inputs(*_spread(there[:fields], refs[:count]))
    out = _Outputs(*_spread(there[fields:], refs[count + 1 : -1]))
    block = _Block(walk, inputs, refs[count], out, shared, inputs.k.shape[1] // walk.size)
    role = lax.axis_index('role')

    def read() -> None:
        plgpu.set_max_registers(walk.registers[0], action='increase')
        _read(block, role)

    if walk.readers:
        pl.when(role < walk.readers)(read)

    @pl.when(role == walk.readers)
    def _():
        plgpu.set_max_registers(walk.registers[1], action='increase')
        _write(block)

    @pl.when(role == walk.readers + 1)
    def _():
        plgpu.set_max_registers(walk.registers[2], action='decrease')
        _bring(block)


def _bring(block: _Block) -> None:
    """Copies the inputs of each chunk into shared memory, as far ahead as there is room."""
    walk, shared = block.walk, block.shared
    row, head = block.head()
    heads = block.initial.shape[1]

    @pl.loop(0, block.chunks)
    def _(step):
        stage, chunk = lax.rem(step, jnp.int32(walk.stages)), block.at(step)

        @pl.when(step >= walk.stages)
        def _():
            plgpu.barrier_wait(shared.empty.at[stage])

        tokens = pl.ds(chunk * walk.size, walk.size)
        for name, source in block.inputs._asdict().items():
            if source is None:
                continue
            if name in ('sums', 'weights', 'kept', 'across'):
                which = row if source.shape[0] > 1 else 0
                of = lax.div(head, jnp.int32(heads // source.shape[1]))
                source = source.at[which, of, chunk]
            else:
                group = lax.div(head, jnp.int32(heads // source.shape[2]))
                columns = pl.ds(0, walk.key_dim) if name in 'qk' else block.columns()
                source = source.at[row, tokens, group, columns]
            ring = getattr(shared.rings, name)
            plgpu.copy_gmem_to_smem(source, ring.at[stage], shared.full.at[stage])


def _write(block: _Block) -> None:
    """Walks with the state in registers, `walk.rows` of its rows at a time."""
    walk, shared, rings = block.walk, block.shared, block.shared.rings
    row, head = block.head()
    parts = [pl.ds(i, walk.rows) for i in range(0, walk.key_dim, walk.rows)]

    def publish(step, slot, state):
        @pl.when(step >= walk.slots)
        def _():
            plgpu.barrier_wait(shared.read.at[slot])

        if block.out.states is not None:  # with weights given one was copied out every step
            others = walk.slots - 1 if walk.given else 0
            plgpu.wait_smem_to_gmem(others, wait_read_only=True)
        for part, x in zip(parts, state, strict=True):
            shared.states.at[slot, part][...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.stored.at[slot])
        if block.out.states is not None:
            _save(block, step, slot)

    def step(step, state):
        stage, slot = (lax.rem(step, jnp.int32(n)) for n in (walk.stages, walk.slots))
        if walk.readers:
            publish(step, slot, state)
        plgpu.barrier_wait(shared.full.at[stage])
        values, whole = rings.v.at[stage], None
        if rings.sums is not None:
            whole = rings.sums[stage, SEEN, walk.size - 1]
            values = plgpu.load(values, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            kept = _decays(block, stage, SEEN if walk.reverse else LEFT)
            shared.written[...] = (values * along(kept, values.shape, 0)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            values = shared.written
        new = []
        for part, x in zip(parts, state, strict=True):
            pairs = [(rings.k.at[stage, :, part].T, values)]
            if rings.across is not None:
                pairs.append((_through(block, stage, part), shared.states.at[slot]))
            added = hopper_inverse.product((walk.rows, walk.tile), *pairs)
            if rings.kept is not None:
                kept = plgpu.load(rings.kept.at[stage, part], layout=ROWS)
                whole = along(kept, x.shape, 0)
            new.append((x if whole is None else x * whole) + added)
        if rings.kept is not None:  # what was read of it may be overwritten by copies after this
            plgpu.commit_smem()
        plgpu.barrier_arrive(shared.empty.at[stage])
        return new

    def rows_of(ref, part):
        return ref.at[row, head, part, block.columns()]

    state = [
        plgpu.load(rows_of(block.initial, part), layout=plgpu.Layout.WGMMA, optimized=False)
        for part in parts
    ]
    state = lax.fori_loop(0, block.chunks, step, state)
    for part, x in zip(parts, state, strict=True):
        rows_of(block.out.last, part)[...] = x
    if block.out.states is not None:
        plgpu.wait_smem_to_gmem(0)


def _save(block: _Block, step: jax.Array, slot: jax.Array) -> None:
    """Copies a state in shared memory out, if it is one at an inner border of groups of chunks."""
    group = block.walk.save
    border = block.at(step) + (1 if block.walk.reverse else 0)

    def copy(which: jax.Array) -> None:
        target = block.out.states.at[(*block.head(), which, slice(None), block.columns())]
        plgpu.copy_smem_to_gmem(block.shared.states.at[slot], target)

    if block.walk.given:
        copy(block.at(step))
        return

    @pl.when((lax.rem(border, jnp.int32(group)) == 0) & (border > 0) & (border < block.chunks))
    def _():
        copy(lax.div(border, jnp.int32(group)) - 1)


def _read(block: _Block, reader: jax.Array) -> None:
    """Forms the outputs of every so many chunks."""
    walk, shared, rings = block.walk, block.shared, block.shared.rings
    tile = (walk.size, walk.tile)

    def chunk(turn, _):
        step = turn * walk.readers + reader
        stage, slot = (lax.rem(step, jnp.int32(n)) for n in (walk.stages, walk.slots))
        plgpu.barrier_wait(shared.full.at[stage])
        weights = _weights(block, stage, reader)
        decays = like = None
        if rings.sums is not None:
            decays = _decays(block, stage, LEFT if walk.reverse else SEEN)
        if rings.like is not None:
            like = plgpu.load(rings.like.at[stage], layout=plgpu.Layout.WGMMA)
        # What was read above may be overwritten by copies after this.
        plgpu.commit_smem()
        plgpu.barrier_wait(shared.stored.at[slot])

        def both(old, own):
            plgpu.wgmma(old, rings.q.at[stage], shared.states.at[slot])
            plgpu.wgmma(own, weights, rings.v.at[stage])
            return old[...], own[...]

        accumulator = plgpu.ACC(tile, jnp.float32)
        old, own = pl.run_scoped(both, accumulator, accumulator)
        plgpu.barrier_arrive(shared.read.at[slot])
        plgpu.barrier_arrive(shared.empty.at[stage])
        o = (old if decays is None else old * along(decays, tile, 0)) + own
        rows = None if like is None else jnp.sum(o * like.astype(jnp.float32), axis=1)
        _put(block, reader, block.at(step), o, rows)
        return ()

    turns = lax.div(block.chunks - reader + walk.readers - 1, jnp.int32(walk.readers))
    lax.fori_loop(0, turns, chunk, ())
    plgpu.wait_smem_to_gmem(0)


def _put(block: _Block, reader: Any, chunk: jax.Array, o: jax.Array, rows: Any) -> None:
    """Copies the outputs of a chunk out, after those before have left."""
    shared, (row, head) = block.shared, block.head()
    plgpu.wait_smem_to_gmem(0)
    shared.out.at[reader][...] = o.astype(jnp.bfloat16)
    if rows is not None:
        shared.rows.at[reader][...] = rows
    plgpu.commit_smem()
    tokens = pl.ds(chunk * block.walk.size, block.walk.size)
    target = block.out.o.at[row, tokens, head, block.columns()]
    plgpu.copy_smem_to_gmem(shared.out.at[reader], target)
    if rows is not None:
        target = block.out.rows.at[lax.axis_index('tile'), row, head, chunk]
        plgpu.copy_smem_to_gmem(shared.rows.at[reader], target)


def _weights(block: _Block, stage: jax.Array, reader: jax.Array) -> Any:
    """The weights of a chunk's pairs, in registers or in shared memory."""
    walk, shared, rings = block.walk, block.shared, block.shared.rings
    if walk.given:
        weights = rings.weights.at[stage]
        return weights.T if walk.reverse else weights
    scores = product((walk.size, walk.size), rings.q.at[stage], rings.k.at[stage].T)
    weights = _decayed(block, stage, scores).astype(jnp.bfloat16)
    if not walk.staged:
        return weights
    shared.weights.at[reader][...] = weights
    return shared.weights.at[reader]


def _decayed(block: _Block, stage: jax.Array, scores: jax.Array) -> jax.Array:
    """Scores times decays, 0 where a token may not look."""
    sums, shape = block.shared.rings.sums, scores.shape
    i, j = (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    if sums is not None:

        def over(part: int) -> jax.Array:
            at = sums.at[stage, part]
            rows, columns = plgpu.load(at, layout=ROWS), plgpu.load(at, layout=COLUMNS)
            rows, columns = along(rows, shape, 0), along(columns, shape, 1)
            return columns - rows if block.walk.reverse else rows - columns

        # What overflows stands where the mask is False.
        scores = scores * jnp.exp(over(0) + over(1))
    return jnp.where(i <= j if block.walk.reverse else i >= j, scores, 0.0)


def _through(block: _Block, stage: jax.Array, part: Any) -> Any:
    """Rows of the matrix that a chunk's state goes through."""
    across = block.shared.rings.across
    if block.walk.reverse:
        return across.at[stage, :, part].T
    return across.at[stage, part]


def _decays(block: _Block, stage: jax.Array, which: int) -> jax.Array:
    """Decays of the tokens of a chunk, down the rows of a matrix."""
    return plgpu.load(block.shared.rings.sums.at[stage, which], layout=ROWS)


def along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector in all columns of a matrix, with axis 1 in all rows."""
    return lax.broadcast_in_dim(x, shape, [axis])


def product(shape: tuple[int, int], a: Any, b: Any) -> jax.Array:
    """A product of matrices in shared memory, float32."""
    return hopper_inverse.product(shape, (a, b))
