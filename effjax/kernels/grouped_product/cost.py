"""FLOPs of the grouped product, and the blocks of rows that 'xla' goes through.

Plain Python: `effjax.costs` imports it without jax.
"""

from typing import Any

_PER_GROUP = 8  # blocks of a group of average size: about a sixteenth of their rows is filled up
_SMALLEST, _LARGEST = 16, 512  # rows of a block

# Of the Hopper kernels: rows of a block, what both sides of a matrix are multiples of, what is
# summed over in one step, and tiles on their way at a time: with 256 columns three fill the shared
# memory beside the results. Tiles come and go in units of rows: one that began between two units
# would miss a row of each.
ROWS, SIDE, STEP, STAGES, UNIT = 128, 128, 64, 3, 8


def model_flops(rows: int, key_dim: int, value_dim: int) -> float:
    """FLOPs of the products of rows [M, K] with one matrix [K, N] each."""
    return 2.0 * rows * key_dim * value_dim


def blocks(rows: int, groups: int) -> tuple[int, int]:
    """Returns (rows of a block, blocks), enough for groups of any sizes.

    Every group begins a block, so that each may leave one unfinished.
    """
    size = _SMALLEST
    while size < _LARGEST and size * 2 * _PER_GROUP * groups <= rows:
        size *= 2
    return size, -(-rows // size) + groups


def columns(width: int) -> int:
    """Columns of a tile of the Hopper kernels."""
    return 256 if width % 256 == 0 else 128


def hopper_blocks(rows: int, groups: int) -> int:
    """Blocks of the Hopper kernel over rows, enough for groups of any sizes and those behind."""
    parts = groups + 1
    return -(-(rows + (UNIT - 1) * parts) // ROWS) + parts


def executed_flops(
    implementation: str,
    rows: int,
    key_dim: int,
    value_dim: int,
    groups: int,
    *,
    form: str = 'blocks',
) -> float:
    """FLOPs of a forward pass.

    Args:
      implementation: of the operation.
      rows: M.
      key_dim: K.
      value_dim: N.
      groups: E.
      form: of 'xla': 'blocks' or 'ragged'.
    """
    if implementation == 'reference':
        return groups * model_flops(rows, key_dim, value_dim)
    if implementation == 'pallas_gpu':  # the most that it may be: many blocks have no rows
        return model_flops(ROWS * hopper_blocks(rows, groups), key_dim, value_dim)
    if form == 'ragged':
        return model_flops(rows, key_dim, value_dim)
    size, count = blocks(rows, groups)
    return model_flops(size * count, key_dim, value_dim)


def kernel_flops(call: Any) -> float:
    """FLOPs of one run of a Hopper kernel, a `costs.products.KernelCall`; at most."""
    if call.name.endswith('_rows'):
        places, x, w = (a.shape for a in call.inputs)
        return model_flops(ROWS * places[1], *w[1:])
    groups, x, dy = (a.shape for a in call.inputs)
    return model_flops(x[0] + STEP * groups[1], x[1], dy[1])
