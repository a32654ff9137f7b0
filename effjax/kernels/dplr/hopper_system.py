"""The Pallas kernel of `hopper` that forms what the walks read, all chunks at once.

A block of threads has one chunk of one head. With a and b for `read` and `write`, decayed as in
`linear_recurrence.hopper_chunks`, the four matrices of pairs are
    A_qk, A_qb  for j <= i,    A_ak, A_ab  for j < i,
and T = (I - A_ab)^-1. A level's scores of all four come from two matrices, z of q right of borders
and k left of them, y of a and b alike: z z^T has A_qk, y y^T has A_ab, and z y^T has A_qb below the
diagonal and the transposed A_ak above it. With decays from the chunk's begin or to its end in
q', a', k' and b', what the transition reads is s = T (A_ak v + a' S), so that
    M = A_qb T,   Y = T^T b',   Q = q' + M a',   X = k' + A_ak^T Y,   P = Y^T a'
leave a walk of
    o = (A_qk + M A_ak) v + Q S,    S' = e^(G_C) S + P S + X^T v.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.dplr.hopper_plan import CHUNK, PART, Plan
from effjax.kernels.hopper_inverse import Room, invert, product
from effjax.kernels.hopper_memory import matrix
from effjax.kernels.linear_recurrence.hopper_chunks import (
    SQUARE,
    WGMMA,
    Pairs,
    Place,
    bounded,
    down,
    either,
    keep,
    number,
    over_levels,
    pairs_of_chunk,
    params,
    place,
    read,
)


class System(NamedTuple):
    """What a chunk is to its walks.

    Attributes:
      queries, keys: Q and X, bfloat16 [B, N * C, H, K].
      weights: A_qk + M A_ak, bfloat16 [B, H, N, C, C].
      across: P, bfloat16 [B, H, N, K, K].
      kept: decays over chunks, float32 [B, H, N, K].
      reads, writes: T a' and Y, like `queries`, where saved.
      found, owed: T A_ak and M, like `weights`, where saved.
    """

    queries: Any
    keys: Any
    weights: Any
    across: Any
    kept: Any
    reads: Any = None
    writes: Any = None
    found: Any = None
    owed: Any = None


class _Keys(NamedTuple):
    """Arrays [B, N * C, H, K], or a chunk of them in shared memory [C, K]."""

    q: Any
    k: Any
    a: Any
    b: Any


class _Shared(NamedTuple):
    """Shared memory; `z` and `y` are [C, K], the last ones of `room` matrices [C, C]."""

    keys: _Keys
    decay: Any
    z: Any
    y: Any
    room: Room
    kept: Any
    arrived: Any


def run(plan: Plan, q, k, read, write, log_decay, *, save: bool = False) -> System:
    """What the walks read, and with `save` what the gradients do.

    Args:
      plan: of the call.
      q, k, read, write: bfloat16 [B, N * C, H, K].
      log_decay: float32 [B, N * C, H, K].
      save: see `System`.
    """
    batch, length, heads, width = q.shape
    chunks, shape = length // CHUNK, jax.ShapeDtypeStruct
    keys = shape(q.shape, q.dtype)
    square = shape((batch, heads, chunks, *SQUARE), q.dtype)
    across = shape((batch, heads, chunks, width, width), q.dtype)
    kept = shape((batch, heads, chunks, width), jnp.float32)
    there = [keys, keys, square, across, kept, *[keys, keys, square, square] * save]
    block, parts = matrix(CHUNK, width), matrix(2, *SQUARE)
    shared = _Shared(
        _Keys(block, block, block, block),
        decay=block,
        z=block,
        y=block,
        room=Room(parts, parts, parts),
        kept=plgpu.SMEM((width,), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=4),
    )
    out = plgpu.kernel(
        functools.partial(_system, plan, save),
        out_type=there,
        scratch_types=[shared],
        grid=(chunks, heads, batch),
        grid_names=('chunk', 'head', 'row'),
        kernel_name=f'dplr_system{"_saved" * save}',
        compiler_params=params(),
    )(q, k, read, write, log_decay)
    return System(*out)


class _Block(NamedTuple):
    """One block of threads: what it works on and with."""

    plan: Plan
    at: Place
    these: Pairs
    out: System
    shared: _Shared

    @property
    def parts(self) -> list[Any]:
        """The columns of the keys that are worked on at once."""
        return [pl.ds(i, PART) for i in range(0, self.plan.key_dim, PART)]

    def upto(self) -> jax.Array:
        """Pairs of a token with those before it and itself."""
        return self.these.span(jnp.uint32(0), self.these.i + 1)


def _system(plan: Plan, save: bool, *refs: Any) -> None:
    inputs, log_decay, out, shared = _Keys(*refs[:4]), refs[4], System(*refs[5:-1]), refs[-1]
    block = _Block(plan, place(plan), pairs_of_chunk(plan), out, shared)
    at, parts = block.at, block.parts
    for source, target in zip(inputs, shared.keys, strict=True):
        plgpu.copy_gmem_to_smem(at.tokens(source, at.head), target, shared.arrived)
    for part in parts:
        decay = bounded(plan, at.tokens(log_decay, at.head, part))
        shared.decay.at[:, part][...] = decay.astype(jnp.bfloat16)
    keep(parts, shared.decay, shared.z, shared.kept)
    plgpu.barrier_wait(shared.arrived)
    inverse = invert(CHUNK, -_pairs(block), shared.room)
    _fold(block, inverse, save)
    _decay(block)
    _spread(block, save)
    plgpu.wait_smem_to_gmem(0)


def reaches(block: Any, sums: jax.Array, decay: Any, which: Any = None) -> jax.Array:
    """Decays of what a token's query reads, from those of what its `read` does [C, C]."""
    own = read(decay)
    return jnp.exp2(sums + (own if which is None else own * down(number(which))))


def _pairs(block: _Block) -> jax.Array:
    """A_ab [C, C], float32; A_qk stays in `z`, A_qb and the transposed A_ak in `y`."""
    plan, these, shared = block.plan, block.these, block.shared
    keys, square = shared.keys, shared.room.system.at[0]
    own = [product(SQUARE, (keys.q, x.T)) for x in (keys.k, keys.b)]
    start = [jnp.where(these.own(), x, 0.0) for x in own]
    start.append(plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), WGMMA))

    def level(half: Any, found: list[jax.Array]) -> list[jax.Array]:
        square[...] = these.reach(half).astype(jnp.bfloat16)
        plgpu.commit_smem()
        right = these.right(half)
        for part in block.parts:
            decay = shared.decay.at[:, part]
            sums = product(SQUARE, (square, decay))
            reach = reaches(block, sums, decay, right)
            z = either(right, keys.q.at[:, part], keys.k.at[:, part], reach)
            shared.z.at[:, part][...] = z
            y = either(right, keys.a.at[:, part], keys.b.at[:, part], jnp.exp2(sums))
            shared.y.at[:, part][...] = y
        plgpu.commit_smem()
        sides = (shared.z, shared.z), (shared.z, shared.y), (shared.y, shared.y)
        return [
            jnp.where(these.across(half), product(SQUARE, (x, y.T)), old)
            for (x, y), old in zip(sides, found, strict=True)
        ]

    of_keys, both, system = over_levels(plan, level, start)
    plgpu.commit_smem()  # all warps are through with what was there
    square = pl.ds(0, CHUNK)
    shared.z.at[:, square][...] = jnp.where(block.upto(), of_keys, 0.0).astype(jnp.bfloat16)
    shared.y.at[:, square][...] = both.astype(jnp.bfloat16)
    return jnp.where(these.before(), system, 0.0)


class _Folded(NamedTuple):
    """Matrices [C, C] in shared memory after `_fold`: T, M and the transposed A_ak."""

    inverse: Any
    owed: Any
    found: Any


def _folded(shared: _Shared) -> _Folded:
    room = shared.room
    return _Folded(room.system.at[0], room.inverse.at[0], room.inverse.at[1])


def _fold(block: _Block, inverse: jax.Array, save: bool) -> None:
    """Forms what `_Folded` has, and writes the weights of pairs."""
    shared, out, at = block.shared, block.out, block.at
    room, folded, square = shared.room, _folded(shared), pl.ds(0, CHUNK)
    both = read(shared.y.at[:, square])
    by_write = room.system.at[1]
    folded.inverse[...] = inverse.astype(jnp.bfloat16)
    by_write[...] = jnp.where(block.upto(), both, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()
    owed = product(SQUARE, (by_write, folded.inverse))
    folded.owed[...] = owed.astype(jnp.bfloat16)
    folded.found[...] = jnp.where(block.upto(), 0.0, both).astype(jnp.bfloat16)
    plgpu.commit_smem()
    weights = read(shared.z.at[:, square]) + product(SQUARE, (folded.owed, folded.found.T))
    targets = [(room.between.at[0], out.weights)]
    room.between.at[0][...] = weights.astype(jnp.bfloat16)
    if save:
        found = product(SQUARE, (folded.inverse, folded.found.T))
        room.between.at[1][...] = found.astype(jnp.bfloat16)
        targets += [(room.between.at[1], out.found), (folded.owed, out.owed)]
    plgpu.commit_smem()
    for source, target in targets:
        plgpu.copy_smem_to_gmem(source, at.own(target))


def _decay(block: _Block) -> None:
    """Makes q', a', k' and b' of the keys in shared memory."""
    these, shared, square = block.these, block.shared, pl.ds(0, CHUNK)
    seen, behind = shared.z.at[:, square], shared.y.at[:, square]
    seen[...] = number(these.seen()).astype(jnp.bfloat16)
    behind[...] = number(these.behind()).astype(jnp.bfloat16)
    plgpu.commit_smem()

    def scale(x: Any, by: jax.Array) -> None:
        x[...] = plgpu.load(x, layout=WGMMA) * by.astype(jnp.bfloat16)

    for part in block.parts:
        q, k, a, b = (x.at[:, part] for x in shared.keys)
        decay = shared.decay.at[:, part]
        sums = product(SQUARE, (seen, decay))
        scale(q, reaches(block, sums, decay))
        scale(a, jnp.exp2(sums))
        left = jnp.exp2(product(SQUARE, (behind, decay)))
        scale(k, left)
        scale(b, left)
    plgpu.commit_smem()


def _spread(block: _Block, save: bool) -> None:
    """Writes what the walks read of the keys; `_decay` comes before."""
    shared, out, at = block.shared, block.out, block.at
    folded, (q, k, a, b) = _folded(shared), shared.keys
    for part in block.parts:
        written = product(SQUARE, (folded.inverse.T, b.at[:, part]))
        plgpu.commit_smem()  # all warps are through with what was there
        b.at[:, part][...] = written.astype(jnp.bfloat16)
        read_ = read(q.at[:, part]) + product(SQUARE, (folded.owed, a.at[:, part]))
        q.at[:, part][...] = read_.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for part, rows in zip(block.parts, (shared.z, shared.y), strict=False):
        x = read(k.at[:, part]) + product(SQUARE, (folded.found, b.at[:, part]))
        k.at[:, part][...] = x.astype(jnp.bfloat16)
        for columns in block.parts:
            through = product(SQUARE, (b.at[:, part].T, a.at[:, columns]))
            rows.at[:, columns][...] = through.astype(jnp.bfloat16)
    targets = [(q, at.tokens(out.queries, at.head)), (k, at.tokens(out.keys, at.head))]
    targets += [
        (rows, at.own(out.across, part))
        for part, rows in zip(block.parts, (shared.z, shared.y), strict=False)
    ]
    if save:
        for part in block.parts:
            reads = product(SQUARE, (folded.inverse, a.at[:, part]))
            plgpu.commit_smem()
            a.at[:, part][...] = reads.astype(jnp.bfloat16)
        targets += [(a, at.tokens(out.reads, at.head)), (b, at.tokens(out.writes, at.head))]
    plgpu.commit_smem()
    for source, target in targets:
        plgpu.copy_smem_to_gmem(source, target)
    plgpu.copy_smem_to_gmem(shared.kept, at.own(out.kept))
