"""FLOPs of recurrences with diagonal plus low-rank transitions, and chunk sizes of 'xla'.

Plain Python: `effjax.costs` imports it without jax.
"""

import math
from typing import Any

from effjax.kernels import halving
from effjax.kernels.dplr import hopper_plan, tpu_plan

CHUNK = 64  # tokens of a chunk unless the caller says otherwise
LEAF = 16  # longest block whose pairs are formed one by one
PIECE = 2**28  # bytes that the pairs of a piece's leaves may take, each key dimension by itself


def model_flops(batch: int, length: int, heads: int, key_dim: int, value_dim: int) -> float:
    """FLOPs of the recurrence: four multiply-adds an element of the state, and its decay.

    The state is read by the transition and by the query, written by the transition and the key.
    """
    return 9.0 * batch * length * heads * key_dim * value_dim


def chunk_size(length: int, chunk: int) -> int:
    """Tokens of a chunk that 'xla' really uses: a leaf doubled some times."""
    return halving.whole_size(length, chunk, LEAF)


def leaf_size(size: int) -> int:
    """Tokens of the blocks that halving a chunk of `chunk_size` ends in."""
    return halving.leaf_size(size, LEAF)


def pieces(batch: int, length: int, heads: int, key_dim: int, chunk: int) -> tuple[int, int]:
    """Returns (pieces that 'xla' goes through in turn, chunks of each).

    Pairs inside leaves are an array of K numbers a pair, for the backward pass several of them: of
    a long row or a large batch they exist piece by piece.
    """
    size = chunk_size(length, chunk)
    chunks = -(-length // size)
    bytes_of_one = 4 * batch * heads * size * leaf_size(size) * key_dim
    count = -(-chunks // max(1, PIECE // bytes_of_one))
    return count, -(-chunks // count)


def executed_flops(
    implementation: str,
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    chunk: int = CHUNK,
) -> float:
    """FLOPs of the forward pass that an implementation really executes, as the walk counts them.

    Of the 'reference' the products: two readings of the state. Of 'xla' all but elementwise work,
    which pairs inside leaves are, and of the kernels, which have chunks of their own, of
    'pallas_tpu' here those for bfloat16.
    """
    state = key_dim * value_dim
    if implementation == 'pallas_gpu':
        found = hopper_plan.plan_for(heads, key_dim, value_dim)
        if found is None:
            raise ValueError(f'dplr: pallas_gpu has no plan for {(heads, key_dim, value_dim)}.')
        return float(batch * -(-length // found.size) * found.forward_flops)
    if implementation == 'pallas_tpu':
        plan = tpu_plan.plan_for(length, heads, key_dim, value_dim, itemsize=2)
        if plan is None:
            raise ValueError(
                f'dplr: pallas_tpu has no plan for {(length, heads, key_dim, value_dim)}.'
            )
        sums = 2 * plan.size * heads * key_dim  # of decays, by XLA, before the kernel
        return float(batch * -(-length // plan.size) * (plan.forward_flops + sums))
    if implementation == 'reference':
        return 4.0 * batch * length * heads * state
    size = chunk_size(length, chunk)
    chunks = batch * heads * math.prod(pieces(batch, length, heads, key_dim, chunk))
    halves, half = 0, leaf_size(size)
    while half < size:
        halves += 4 * size * half * key_dim
        half *= 2
    solve = size * size * (key_dim + value_dim) if size > 1 else 0
    inside = halves + solve + 6 * size * size * value_dim
    across = 8 * size * state
    return float(chunks * (inside + across + 2 * size * key_dim))


def kernel_flops(call: Any) -> float:
    """FLOPs of one call of a Hopper kernel, a `costs.products.KernelCall`."""
    shapes = [x.shape for x in call.inputs]
    batch, length, heads, key_dim = shapes[1]  # of keys in all of them
    values = {'dplr_solved': 2, 'dplr_gradients': 6}.get(call.name)
    plan = hopper_plan.plan_for(heads, key_dim, shapes[values][3] if values else hopper_plan.PART)
    assert plan is not None
    flops = {
        'dplr_system': plan.system_flops(save=False),
        'dplr_system_saved': plan.system_flops(save=True),
        'dplr_solved': plan.solved_flops,
        'dplr_gradients': plan.gradients_flops,
    }[call.name]
    return float(batch * (length // plan.size) * heads * flops)
