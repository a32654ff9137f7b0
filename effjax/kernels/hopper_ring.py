"""Blocks of arrays going through a Hopper GPU's shared memory, in Pallas (Mosaic GPU)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Part(NamedTuple):
    """What one step reads or writes of an array in memory.

    Attributes:
      at: takes the step, returns the reference to its block.
      shape: of the block.
      dtype: of the array.
    """

    at: Callable[[Any], Any]
    shape: tuple[int, ...]
    dtype: Any


def ring(
    steps: int, stages: int, reads: Sequence[Part], writes: Sequence[Part], body: Any, carry: Any
) -> Any:
    """Runs a body step after step, while one warpgroup's blocks for later steps are on their way.

    `plgpu.emit_pipeline` does the same, but cannot be interpreted where it writes, and holds as
    many blocks to write as to read.

    Args:
      steps: how many.
      stages: blocks to read that are on their way or in use at a time; those to write are two.
      reads: what each step reads.
      writes: what each step writes, of at least one array.
      body: takes the step, its blocks to read and to write in shared memory, and a carry.
      carry: what the first step takes.

    Returns:
      The last carry; all blocks are written by then.
    """
    stages = min(stages, steps)

    def shared(parts: Sequence[Part], slots: int) -> list[Any]:
        return [plgpu.SMEM((slots, *p.shape), p.dtype) for p in parts]

    return pl.run_scoped(
        functools.partial(_ring, steps, stages, reads, writes, body, carry),
        shared(reads, stages),
        shared(writes, 2),
        plgpu.Barrier(num_arrivals=len(reads), num_barriers=stages),
    )


def _ring(steps, stages, reads, writes, body, carry, read, written, arrived):
    def fetch(n: Any, slot: Any) -> None:
        for part, target in zip(reads, read, strict=True):
            plgpu.copy_gmem_to_smem(part.at(n), target.at[slot], arrived.at[slot])

    for n in range(stages):
        fetch(n, n)

    def step(n: Any, carry: Any) -> Any:
        slot, half = jax.lax.rem(n, stages), jax.lax.rem(n, 2)
        plgpu.barrier_wait(arrived.at[slot])
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the last step but one has left
        results = [w.at[half] for w in written]
        carry = body(n, [r.at[slot] for r in read], results, carry)
        plgpu.commit_smem()
        for i, (part, source) in enumerate(zip(writes, results, strict=True)):
            plgpu.copy_smem_to_gmem(source, part.at(n), commit_group=i == len(writes) - 1)

        @pl.when(n + stages < steps)
        def _():
            fetch(n + stages, slot)

        return carry

    carry = jax.lax.fori_loop(0, steps, step, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry
