"""FLOPs of attention by labels, as it is defined and as its implementations execute it.

Plain Python: `effjax.costs` imports it without jax.
"""

SMALLEST, LARGEST = 16, 128  # tokens of a block of the banded form


def pairs(length: int, radius: int | None) -> int:
    """Pairs of one head and row that are at most `radius` apart; all, where it is None."""
    if radius is None or radius >= length - 1:
        return length * length
    return length * (2 * radius + 1) - radius * (radius + 1)


def reach(length: int, radius: int | None, clip: int) -> int:
    """The largest distance whose key differs from those before it, of a table up to `clip`."""
    return max(0, min(clip, length - 1, length if radius is None else radius))


def block(radius: int) -> int:
    """Tokens of a block of the banded form."""
    return max(SMALLEST, min(LARGEST, radius))


def beside(radius: int, size: int) -> int:
    """Blocks on either side that a block reads."""
    return -(-radius // size)


def strategy(length: int, radius: int | None) -> str:
    """Which form 'xla' takes: 'dense' (T x T scores) or 'band' (blocks within the radius)."""
    return 'band' if radius is not None and 2 * _banded(length, radius) < length**2 else 'dense'


def _banded(length: int, radius: int) -> int:
    size = block(radius)
    return -(-length // size) * size * (2 * beside(radius, size) + 1) * size


def _flops(batch: int, heads: int, head_dim: int, scored: float, labelled: float) -> float:
    """Scores and values of `scored` pairs, and `labelled` products of a query with a label."""
    return 2.0 * batch * heads * head_dim * (2 * scored + labelled)


def model_flops(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    *,
    radius: int | None,
    clip: int,
    others: int = 0,
    labels: int = 0,
) -> float:
    """FLOPs of scores and values of the pairs that are seen, and of queries with each label.

    Args:
      batch: rows.
      length: tokens T of the sequence itself.
      heads: heads.
      head_dim: dimensions of a head.
      radius: how far a query sees in its sequence; None: all of it.
      clip: the largest distance of the table.
      others: tokens S of the second sequence; each query scores all of them.
      labels: labels L of pairs with them.
    """
    kinds = 2 * reach(length, radius, clip) + 1 + (labels if others else 0)
    scored = pairs(length, radius) + length * others
    return _flops(batch, heads, head_dim, scored, length * kinds)


def executed_flops(
    implementation: str,
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    *,
    radius: int | None,
    clip: int,
    others: int = 0,
    labels: int = 0,
) -> float:
    """FLOPs of the forward products that an implementation really executes."""
    if implementation == 'reference':  # the key of each pair is made whole, label included
        return _flops(batch, heads, head_dim, length * (length + others), 0)
    rows, scored = length, length * length
    if strategy(length, radius) == 'band':
        assert radius is not None
        rows = -(-length // block(radius)) * block(radius)
        scored = _banded(length, radius)
    kinds = 2 * reach(length, radius, clip) + 1 + (labels if others else 0)
    return _flops(batch, heads, head_dim, scored + rows * others, rows * kinds)
