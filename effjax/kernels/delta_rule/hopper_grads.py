"""The Pallas kernel of `hopper` that forms gradients once both walks are done, all chunks at once.

With N what the tokens wrote, dN its gradient, S the state before a chunk, Z the gradient of the
state behind it, T and G as in `hopper_system`, and decays D_ij = e^(G_i - G_j),
    dR = T^T dN,    E = dR N^T D for j < i,    F = do N^T D for j <= i,
    dq = F K + e^G do S^T,    dk = P - beta M,    M = E K + e^G dR S^T,
    P = F^T Q - (beta E)^T K + e^(G_C - G) N Z^T,
    dv = beta dR,             dbeta = <dR, v> - <k, M>,
where M is what of the gradient comes through reading the old values. Decays scale what queries and
keys read and what keys write, and the last one of a chunk all of the state S' behind it, so that
    dG = <q, dq> - <k, beta M> - <k, P>,    and dG_C also has <Z, S'>.

A block of threads has one chunk of one head. It goes over tiles of 64 columns of the values for E
and F, then over parts of 64 columns of the keys, and for each over the values' tiles again: that
takes little shared memory for any K and V, so that other blocks work while one waits for a tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.delta_rule import hopper_blocks as blocks
from effjax.kernels.delta_rule.hopper_blocks import BETA, BY_ROW, LEFT, SEEN, along
from effjax.kernels.delta_rule.hopper_plan import ROWS, TILE, Plan
from effjax.kernels.hopper_inverse import indices, product
from effjax.kernels.hopper_memory import matrix


class Known(NamedTuple):
    """What the kernel reads.

    Attributes:
      q, k: bfloat16 [B, N * C, H, K].
      v, do, new, dnew: v, the outputs' gradient, N and dN, bfloat16 [B, N * C, H, V].
      states, dstates: S and Z, bfloat16 [B, N, H, K, V].
      inverse: T, bfloat16 [B, N, H, C, C].
      rows: float32 [B, H, N, ROWS, C].
    """

    q: Any
    k: Any
    v: Any
    do: Any
    new: Any
    dnew: Any
    states: Any
    dstates: Any
    inverse: Any
    rows: Any


class Grads(NamedTuple):
    """dq, dk, dv like q, k, v; dbeta, and the gradient of G, float32 [B, H, N, C]."""

    dq: Any
    dk: Any
    dv: Any
    dbeta: Any
    dsums: Any


class _Out(NamedTuple):
    """What the kernel writes; sums: float32 [B, H, N, 3, C], dbeta, dG, and parts of <Z, S'>."""

    dq: Any
    dk: Any
    dv: Any
    sums: Any


class _Arrived(NamedTuple):
    """Barriers: of what a chunk needs once, of a part of the keys, of a values' tile without and
    with its states."""

    chunk: Any
    part: Any
    tile: Any
    states: Any


class _Shared(NamedTuple):
    """Shared memory: blocks of 64 x 64 as in `Known`, and what is formed.

    Attributes:
      known: tiles of the inputs; `dnew` then holds dR, and q, k and v what is written out.
      erased, owed, scores: E, -beta E and F, bfloat16 [C, C].
      sums: float32 [3, C].
      arrived: barriers.
    """

    known: Known
    erased: Any
    owed: Any
    scores: Any
    sums: Any
    arrived: _Arrived


def gradients(plan: Plan, known: Known) -> Grads:
    """The gradients of all chunks."""
    shape, size = jax.ShapeDtypeStruct, plan.size
    batch, heads, chunks = known.rows.shape[:3]
    like = [shape(x.shape, x.dtype) for x in (known.q, known.k, known.v)]
    square = matrix(TILE, TILE)
    names = [n for n in Known._fields if n != 'rows']
    scratch = _Shared(
        Known(**dict.fromkeys(names, square), rows=plgpu.SMEM((ROWS, size), jnp.float32)),
        square,
        square,
        square,
        plgpu.SMEM((3, size), jnp.float32),
        _Arrived(*(plgpu.Barrier(num_arrivals=n) for n in (2, 2, 4, 5))),
    )
    found = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=[*like, shape((batch, heads, chunks, 3, size), jnp.float32)],
        scratch_types=[scratch],
        grid=(chunks, heads, batch),
        grid_names=('chunk', 'head', 'row'),
        kernel_name='delta_rule_gradients',
        # With layouts named here: finding them takes pallas minutes for so many arrays.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*known)
    dq, dk, dv, sums = found
    dbeta, dsums, behind = jnp.moveaxis(sums, 3, 0)
    return Grads(dq, dk, dv, dbeta, dsums.at[..., -1].add(jnp.sum(behind, axis=3)))


class _Block(NamedTuple):
    """One block of threads: what it works on and with."""

    plan: Plan
    inputs: Known
    out: _Out
    shared: _Shared

    def tokens(self, columns: Any) -> tuple[Any, ...]:
        """Where a block of an array [B, N * C, H, K] is."""
        row, head, chunk = self.place()
        return row, pl.ds(chunk * self.plan.size, self.plan.size), head, columns

    def place(self) -> tuple[jax.Array, ...]:
        return tuple(lax.axis_index(n) for n in ('row', 'head', 'chunk'))

    def row(self, which: int) -> jax.Array:
        """Numbers of the tokens, over the columns of a matrix."""
        x = plgpu.load(self.shared.known.rows.at[which], layout=BY_ROW)
        return along(x, (self.plan.size, TILE), 0)


def _body(plan: Plan, *refs: Any) -> None:
    shared = refs[-1]
    block = _Block(plan, Known(*refs[:10]), _Out(*refs[10:-1]), shared)
    row, head, chunk = block.place()
    inputs, arrived = block.inputs, shared.arrived.chunk
    plgpu.copy_gmem_to_smem(inputs.rows.at[row, head, chunk], shared.known.rows, arrived)
    plgpu.copy_gmem_to_smem(inputs.inverse.at[row, chunk, head], shared.known.inverse, arrived)
    plgpu.barrier_wait(arrived)
    _multiply(block, _pairs(block))
    plgpu.wait_smem_to_gmem(0)


def _columns(n: Any) -> Any:
    return pl.ds(n * TILE, TILE)


def _load(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _over_columns(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1)


def _zeros(*shape: int) -> jax.Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else BY_ROW
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _right(block: _Block) -> jax.Array:
    """dR of a tile, from its dN."""
    known = block.shared.known
    return product((TILE, TILE), (known.inverse.T, known.dnew))


def _pairs(block: _Block) -> jax.Array:
    """Puts E, -beta E and F into shared memory, writes dv, returns <dR, v> of each token."""
    plan, inputs, shared = block.plan, block.inputs, block.shared
    known, arrived, square = shared.known, shared.arrived.tile, (TILE, TILE)
    beta = block.row(BETA)

    def tile(t, carry):
        erased, scores, dbeta = carry
        at = block.tokens(_columns(t))
        plgpu.commit_smem()
        for name in ('v', 'do', 'new', 'dnew'):
            plgpu.copy_gmem_to_smem(getattr(inputs, name).at[at], getattr(known, name), arrived)
        plgpu.barrier_wait(arrived)
        right = _right(block)
        dbeta = dbeta + _over_columns(right * _load(known.v))
        known.dnew[...] = right.astype(jnp.bfloat16)
        known.v[...] = (right * beta).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(known.v, block.out.dv.at[at])
        erased = erased + product(square, (known.dnew, known.new.T))
        scores = scores + product(square, (known.do, known.new.T))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return erased, scores, dbeta

    start = _zeros(*square), _zeros(*square), _zeros(plan.size)
    erased, scores, dbeta = lax.fori_loop(0, plan.value_dim // TILE, tile, start)
    i, j = indices(plan.size)
    pairs = blocks.between(known.rows, plan.size)
    erased = jnp.where(i > j, erased * pairs, 0.0)  # what overflows stands where the mask is False
    shared.erased[...] = erased.astype(jnp.bfloat16)
    shared.owed[...] = (erased * -beta).astype(jnp.bfloat16)
    shared.scores[...] = jnp.where(i >= j, scores * pairs, 0.0).astype(jnp.bfloat16)
    return dbeta


class _Sums(NamedTuple):
    """Sums over the values' tiles, [C, 64]: do S^T, dR S^T and N Z^T; <S, Z> of each row of S."""

    queries: jax.Array
    old: jax.Array
    written: jax.Array
    states: jax.Array


def _with_states(block: _Block, part: Any) -> _Sums:
    """The sums for some columns of the keys."""
    inputs, known, arrived = block.inputs, block.shared.known, block.shared.arrived.states
    (row, head, chunk), square = block.place(), (TILE, TILE)

    def tile(t, sums):
        at = block.tokens(_columns(t))
        plgpu.commit_smem()
        for name in ('do', 'new', 'dnew'):
            plgpu.copy_gmem_to_smem(getattr(inputs, name).at[at], getattr(known, name), arrived)
        state = row, chunk, head, _columns(part), _columns(t)
        for name in ('states', 'dstates'):
            plgpu.copy_gmem_to_smem(getattr(inputs, name).at[state], getattr(known, name), arrived)
        plgpu.barrier_wait(arrived)
        known.dnew[...] = _right(block).astype(jnp.bfloat16)
        both = _over_columns(_load(known.states) * _load(known.dstates))
        plgpu.commit_smem()
        return _Sums(
            sums.queries + product(square, (known.do, known.states.T)),
            sums.old + product(square, (known.dnew, known.states.T)),
            sums.written + product(square, (known.new, known.dstates.T)),
            sums.states + both,
        )

    zero = _zeros(*square)
    start = _Sums(zero, zero, zero, _zeros(TILE))
    return lax.fori_loop(0, block.plan.value_dim // TILE, tile, start)


def _multiply(block: _Block, dbeta: jax.Array) -> None:
    """Writes dq and dk, and the sums over the columns of the keys."""
    plan, shared, square = block.plan, block.shared, (TILE, TILE)
    known, arrived = shared.known, shared.arrived.part

    def part(p, carry):
        dbeta, dsums, behind = carry
        at = block.tokens(_columns(p))
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(block.inputs.q.at[at], known.q, arrived)
        plgpu.copy_gmem_to_smem(block.inputs.k.at[at], known.k, arrived)
        sums = _with_states(block, p)
        plgpu.barrier_wait(arrived)
        seen, k = block.row(SEEN), _load(known.k)
        dq = product(square, (shared.scores, known.k)) + seen * sums.queries
        dsums = dsums + _over_columns(_load(known.q) * dq)
        old = product(square, (shared.erased, known.k)) + seen * sums.old
        dbeta = dbeta - _over_columns(k * old)
        old = block.row(BETA) * old
        added = block.row(LEFT) * sums.written
        behind = behind + _over_columns(k * added) + known.rows[SEEN, plan.size - 1] * sums.states
        inside = (shared.scores.T, known.q), (shared.owed.T, known.k)
        written = product(square, *inside) + added
        dsums = dsums - _over_columns(k * (written + old))
        known.q[...] = dq.astype(jnp.bfloat16)
        known.k[...] = (written - old).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(known.q, block.out.dq.at[at])
        plgpu.copy_smem_to_gmem(known.k, block.out.dk.at[at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return dbeta, dsums, behind

    zero = _zeros(plan.size)
    sums = lax.fori_loop(0, plan.key_dim // TILE, part, (dbeta, zero, zero))
    for i, x in enumerate(sums):
        shared.sums.at[i][...] = x
    plgpu.commit_smem()
    row, head, chunk = block.place()
    plgpu.copy_smem_to_gmem(shared.sums, block.out.sums.at[row, head, chunk])
