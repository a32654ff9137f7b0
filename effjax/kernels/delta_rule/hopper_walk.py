"""The Pallas kernel of `hopper` that walks over the chunks of a row with a state.

A block of threads has one head of one row and some columns of the values. Its warpgroups have
roles: the first has the state in registers, in float32; the second forms what needs no state, and
the outputs; the third brings in the inputs of later chunks. With G the running sums of log-decays
in a chunk, C its last token, S the state before it, and U and W of `hopper_system`, a walk
forwards forms
    N = U - W S,    S' = e^(G_C) S + sum_j k_j (e^(G_C - G_j) N_j)^T,
    o_i = sum_{j <= i} (q_i k_j) e^(G_i - G_j) N_j + e^(G_i) q_i S,
and one backwards, where S is the gradient of the state behind the chunk and N and o stand for their
gradients,
    N_j = sum_{i >= j} (q_i k_j) e^(G_i - G_j) o_i + e^(G_C - G_j) k_j S,
    S'  = e^(G_C) S + sum_i q_i (e^(G_i) o_i)^T - W^T N.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.delta_rule import hopper_blocks as blocks
from effjax.kernels.delta_rule.hopper_blocks import BY_ROW, LEFT, SEEN, along
from effjax.kernels.delta_rule.hopper_plan import ROWS, Walk
from effjax.kernels.hopper_inverse import indices, product
from effjax.kernels.hopper_memory import matrix

_STATE, _OTHER, _COPIES = range(3)  # the roles
_REGISTERS = {_STATE: 240, _OTHER: 232, _COPIES: 32}


class _Rings(NamedTuple):
    """Inputs: in global memory those of all chunks, in shared memory of some, an entry each.

    Attributes:
      q, k, reads: queries, keys, and -W.
      values: U, or gradients of the outputs.
      rows: numbers a token.
    """

    q: Any
    k: Any
    reads: Any
    values: Any
    rows: Any


class Walked(NamedTuple):
    """What a walk returns.

    Attributes:
      last: float32 [B, H, K, V], the state behind the last chunk walked over.
      o: bfloat16 [B, N * C, H, V], forwards only.
      new: N, bfloat16 [B, N * C, H, V], where saved.
      states: S at each chunk, bfloat16 [B, N, H, K, V], where saved.
    """

    last: Any
    o: Any = None
    new: Any = None
    states: Any = None


class _Shared(NamedTuple):
    """Shared memory.

    Attributes:
      rings: inputs of some chunks.
      states: states at some chunks [slots, K, tile].
      new: N of some chunks [slots, C, tile].
      kept: forwards e^(G_C - G) N [1, C, tile], backwards e^G o [slots, C, tile].
      inside: backwards the sum inside the chunk, float32 [slots, C, tile].
      out: forwards the outputs [C, tile].
      weights: [C, C].
      full, empty: barriers of the entries of `rings`.
      ready, taken: barriers of the slots, between the first two roles.
    """

    rings: _Rings
    states: Any
    new: Any
    kept: Any
    inside: Any
    out: Any
    weights: Any
    full: Any
    empty: Any
    ready: Any
    taken: Any


def run(walk: Walk, q, k, reads, values, rows, state) -> Walked:
    """Runs over whole chunks.

    Args:
      walk: how, and what to return.
      q, k, reads: bfloat16 [B, N * C, H, K].
      values: bfloat16 [B, N * C, H, V].
      rows: float32 [B, H, N, ROWS, C].
      state: float32 [B, H, K, V], before the first chunk, or its gradient behind the last.
    """
    (batch, length), (heads, key_dim, value_dim) = q.shape[:2], state.shape[1:]
    shape, chunks = jax.ShapeDtypeStruct, length // walk.size
    out = Walked(
        shape(state.shape, state.dtype),
        None if walk.reverse else shape(values.shape, values.dtype),
        shape(values.shape, values.dtype) if walk.save else None,
        shape((batch, chunks, heads, key_dim, value_dim), q.dtype) if walk.save else None,
    )
    there = [x is not None for x in out]
    results = plgpu.kernel(
        functools.partial(_body, walk, there),
        out_type=[x for x in out if x is not None],
        scratch_types=[_scratch(walk)],
        grid=(value_dim // walk.tile, heads, batch),
        grid_names=('tile', 'head', 'row'),
        kernel_name=f'delta_rule_{"backward" if walk.reverse else "forward"}',
        num_threads=len(_REGISTERS),
        thread_name='role',
        # With layouts named here: finding them takes pallas minutes for so many arrays.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, reads, values, rows, state)
    return Walked(*_spread(there, results))


def _spread(there: list[bool], found: Any) -> list[Any]:
    found = iter(found)
    return [next(found) if x else None for x in there]


def _scratch(walk: Walk) -> _Shared:
    size, tile, slots = walk.size, walk.tile, walk.slots
    keys = matrix(walk.stages, size, walk.key_dim)

    def barriers(count: int, arrivals: int) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    return _Shared(
        _Rings(
            keys,
            keys,
            keys,
            matrix(walk.stages, size, tile),
            plgpu.SMEM((walk.stages, ROWS, size), jnp.float32),
        ),
        states=matrix(slots, walk.key_dim, tile),
        new=matrix(slots, size, tile),
        kept=matrix(slots if walk.reverse else 1, size, tile),
        inside=matrix(slots, size, tile, dtype=jnp.float32) if walk.reverse else None,
        out=None if walk.reverse else matrix(size, tile),
        weights=matrix(size, size),
        full=barriers(walk.stages, len(_Rings._fields)),
        empty=barriers(walk.stages, 2),
        ready=barriers(slots, 1),
        taken=barriers(slots, 1),
    )


class _Block(NamedTuple):
    """One block of threads: what it works on and with."""

    walk: Walk
    inputs: _Rings
    initial: Any
    out: Walked
    shared: _Shared
    chunks: int

    def at(self, step: jax.Array) -> jax.Array:
        """The chunk of a step."""
        return self.chunks - 1 - step if self.walk.reverse else step

    def tokens(self, step: jax.Array) -> Any:
        return pl.ds(self.at(step) * self.walk.size, self.walk.size)

    def columns(self) -> Any:
        return pl.ds(lax.axis_index('tile') * self.walk.tile, self.walk.tile)

    def head(self) -> tuple[jax.Array, jax.Array]:
        return lax.axis_index('row'), lax.axis_index('head')

    def stage(self, step: jax.Array) -> tuple[jax.Array, _Rings]:
        """The entry of the rings at a step, and it."""
        stage = lax.rem(step, jnp.int32(self.walk.stages))
        return stage, _Rings(*(x.at[stage] for x in self.shared.rings))

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.walk.slots))

    @property
    def parts(self) -> list[Any]:
        """The rows of the state that are worked on at once."""
        return [pl.ds(i, 64) for i in range(0, self.walk.key_dim, 64)]


def _body(walk: Walk, there: list[bool], *refs: Any) -> None:
    inputs, (initial, *out), shared = _Rings(*refs[:5]), refs[5:-1], refs[-1]
    chunks = inputs.q.shape[1] // walk.size
    block = _Block(walk, inputs, initial, Walked(*_spread(there, out)), shared, chunks)
    roles = {
        _STATE: _carry_back if walk.reverse else _carry,
        _OTHER: _give if walk.reverse else _read,
        _COPIES: _bring,
    }
    role = lax.axis_index('role')

    def work(which: int) -> None:
        action: Any = 'decrease' if which == _COPIES else 'increase'

        @pl.when(role == which)
        def _():
            plgpu.set_max_registers(_REGISTERS[which], action=action)
            roles[which](block)

    for which in roles:
        work(which)


def _bring(block: _Block) -> None:
    """Copies the inputs of each chunk into shared memory, as far ahead as there is room."""
    walk, inputs, (row, head) = block.walk, block.inputs, block.head()

    @pl.loop(0, block.chunks)
    def _(step):
        stage, rings = block.stage(step)

        @pl.when(step >= walk.stages)
        def _():
            plgpu.barrier_wait(block.shared.empty.at[stage])

        at = row, block.tokens(step), head
        sources = _Rings(
            inputs.q.at[at],
            inputs.k.at[at],
            inputs.reads.at[at],
            inputs.values.at[(*at, block.columns())],
            inputs.rows.at[row, head, block.at(step)],
        )
        for source, target in zip(sources, rings, strict=True):
            plgpu.copy_gmem_to_smem(source, target, block.shared.full.at[stage])


def _with_state(block: _Block, step: Any) -> None:
    """Runs all steps with the state in registers, given as its parts, and writes the last one."""

    def rows_of(ref: Any, part: Any) -> Any:
        return ref.at[(*block.head(), part, block.columns())]

    state = [
        plgpu.load(rows_of(block.initial, part), layout=plgpu.Layout.WGMMA, optimized=False)
        for part in block.parts
    ]
    state = lax.fori_loop(0, block.chunks, step, state)
    for part, x in zip(block.parts, state, strict=True):
        rows_of(block.out.last, part)[...] = x
    plgpu.wait_smem_to_gmem(0)


def _show(block: _Block, slot: jax.Array, state: list[jax.Array]) -> None:
    """Puts a copy of the state into shared memory."""
    if block.walk.save:  # what was there has left
        plgpu.wait_smem_to_gmem(block.walk.slots - 1, wait_read_only=True)
    for part, x in zip(block.parts, state, strict=True):
        block.shared.states.at[slot, part][...] = x.astype(jnp.bfloat16)


def _save(block: _Block, step: jax.Array, slot: jax.Array) -> None:
    """Copies the state and N out of a slot."""
    if not block.walk.save:
        return
    (row, head), columns = block.head(), block.columns()
    states = block.out.states.at[row, block.at(step), head, slice(None), columns]
    plgpu.copy_smem_to_gmem(block.shared.states.at[slot], states, commit_group=False)
    new = block.out.new.at[row, block.tokens(step), head, columns]
    plgpu.copy_smem_to_gmem(block.shared.new.at[slot], new)


def _load(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _decays(rings: _Rings, which: int, shape: tuple[int, ...]) -> jax.Array:
    """Decays of the tokens of a chunk, down the rows of a matrix."""
    return along(plgpu.load(rings.rows.at[which], layout=BY_ROW), shape, 0)


def _weights(block: _Block, rings: _Rings) -> None:
    """Puts (q_i k_j) e^(G_i - G_j) into shared memory, backwards transposed.

    What was read from the rings before this may be overwritten by copies afterwards.
    """
    size, reverse = block.walk.size, block.walk.reverse
    a, b = (rings.k, rings.q) if reverse else (rings.q, rings.k)
    scores = product((size, size), (a, b.T)) * blocks.between(rings.rows, size, reverse=reverse)
    i, j = indices(size)
    # What overflows stands where the mask is False.
    weights = jnp.where(i <= j if reverse else i >= j, scores, 0.0)
    block.shared.weights[...] = weights.astype(jnp.bfloat16)
    plgpu.commit_smem()


def _after(block: _Block, state: list[jax.Array], whole: Any, *pairs: Any) -> list[jax.Array]:
    """The state behind a chunk: the decayed one and products a^T b of pairs."""
    return [
        x * whole + product((64, block.walk.tile), *((a.at[:, part].T, b) for a, b in pairs))
        for part, x in zip(block.parts, state, strict=True)
    ]


def _carry(block: _Block) -> None:
    """Forwards: forms N and the state."""
    walk, shared = block.walk, block.shared
    shape = walk.size, walk.tile

    def step(step, state):
        (stage, rings), slot = block.stage(step), block.slot(step)

        @pl.when(step >= walk.slots)
        def _():
            plgpu.barrier_wait(shared.taken.at[slot])

        _show(block, slot, state)
        plgpu.commit_smem()
        plgpu.barrier_wait(shared.full.at[stage])
        whole = rings.rows[SEEN, walk.size - 1]
        new = _load(rings.values) + product(shape, (rings.reads, shared.states.at[slot]))
        shared.new.at[slot][...] = new.astype(jnp.bfloat16)
        shared.kept.at[0][...] = (new * _decays(rings, LEFT, shape)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.ready.at[slot])
        _save(block, step, slot)
        state = _after(block, state, whole, (rings.k, shared.kept.at[0]))
        plgpu.barrier_arrive(shared.empty.at[stage])
        return state

    _with_state(block, step)


def _read(block: _Block) -> None:
    """Forwards: forms the outputs."""
    walk, shared = block.walk, block.shared
    shape = walk.size, walk.tile

    @pl.loop(0, block.chunks)
    def _(step):
        (stage, rings), slot = block.stage(step), block.slot(step)
        plgpu.barrier_wait(shared.full.at[stage])
        seen = _decays(rings, SEEN, shape)
        _weights(block, rings)
        plgpu.barrier_wait(shared.ready.at[slot])
        o = product(shape, (rings.q, shared.states.at[slot])) * seen
        o = o + product(shape, (shared.weights, shared.new.at[slot]))
        plgpu.barrier_arrive(shared.taken.at[slot])
        plgpu.barrier_arrive(shared.empty.at[stage])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.out[...] = o.astype(jnp.bfloat16)
        plgpu.commit_smem()
        at = (*_outputs(block, step), block.columns())
        plgpu.copy_smem_to_gmem(shared.out, block.out.o.at[at])

    plgpu.wait_smem_to_gmem(0)


def _outputs(block: _Block, step: jax.Array) -> tuple[Any, Any, Any]:
    row, head = block.head()
    return row, block.tokens(step), head


def _carry_back(block: _Block) -> None:
    """Backwards: forms the gradients of N and of the state."""
    walk, shared = block.walk, block.shared
    shape = walk.size, walk.tile

    def step(step, state):
        (stage, rings), slot = block.stage(step), block.slot(step)
        _show(block, slot, state)
        plgpu.commit_smem()
        plgpu.barrier_wait(shared.full.at[stage])
        whole = rings.rows[SEEN, walk.size - 1]
        new = product(shape, (rings.k, shared.states.at[slot])) * _decays(rings, LEFT, shape)
        plgpu.barrier_wait(shared.ready.at[slot])
        new = new + _load(shared.inside.at[slot])
        shared.new.at[slot][...] = new.astype(jnp.bfloat16)
        plgpu.commit_smem()
        _save(block, step, slot)
        pairs = (rings.q, shared.kept.at[slot]), (rings.reads, shared.new.at[slot])
        state = _after(block, state, whole, *pairs)
        plgpu.barrier_arrive(shared.taken.at[slot])
        plgpu.barrier_arrive(shared.empty.at[stage])
        return state

    _with_state(block, step)


def _give(block: _Block) -> None:
    """Backwards: forms what of the gradient of N comes from inside the chunk, and e^G o."""
    walk, shared = block.walk, block.shared
    shape = walk.size, walk.tile

    @pl.loop(0, block.chunks)
    def _(step):
        (stage, rings), slot = block.stage(step), block.slot(step)
        plgpu.barrier_wait(shared.full.at[stage])
        _weights(block, rings)
        inside = product(shape, (shared.weights, rings.values))
        kept = _load(rings.values) * _decays(rings, SEEN, shape)

        @pl.when(step >= walk.slots)
        def _():
            plgpu.barrier_wait(shared.taken.at[slot])

        shared.inside.at[slot][...] = inside
        shared.kept.at[slot][...] = kept.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.ready.at[slot])
        plgpu.barrier_arrive(shared.empty.at[stage])
