"""FLOPs of the grouped product, and the blocks of rows that 'xla' goes through.

Plain Python: `effjax.costs` imports it without jax.
"""

_PER_GROUP = 8  # blocks of a group of average size: about a sixteenth of their rows is filled up
_SMALLEST, _LARGEST = 16, 512  # rows of a block


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
    if form == 'ragged':
        return model_flops(rows, key_dim, value_dim)
    size, count = blocks(rows, groups)
    return model_flops(size * count, key_dim, value_dim)
