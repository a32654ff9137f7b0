"""FLOPs of the long convolution, and the transforms that 'xla' executes.

Plain Python: `effjax.costs` imports it without jax.
"""

import math

SHORT = 256  # most tokens of a row that 'xla' convolves by a product on a GPU
NEAR = 16  # most tokens of the blocks inside which 'xla' sums directly, where there are documents


def model_flops(batch: int, length: int, channels: int) -> float:
    """FLOPs of a row's transform there and back over N = 2 T points, 5 N log2 N a channel.

    A real transform is half a complex one, so that the pair is one. The filter's own transform
    is made once for all rows and does not count.
    """
    points = 2 * length
    return 5.0 * batch * channels * points * math.log2(points)


def transform_size(length: int, taps: int) -> int:
    """The points of the one transform without documents: even, no prime factor above 7."""
    n = max(2, length + min(taps, length) - 1)
    while n % 2 or _rest(n) > 1:
        n += 1
    return n


def halving(length: int) -> tuple[int, int]:
    """Returns (tokens of the smallest blocks, how often blocks are joined in pairs)."""
    levels = 0
    while -(-length // 2**levels) > NEAR:
        levels += 1
    return -(-length // 2**levels), levels


def executed_flops(
    implementation: str,
    batch: int,
    length: int,
    channels: int,
    *,
    taps: int | None = None,
    documents: bool = False,
    form: str = '',
) -> float:
    """FLOPs of the forward transforms or products that 'xla' executes; the reference has none.

    Args:
      implementation: 'xla' or 'reference'.
      batch: rows.
      length: tokens in a row.
      channels: of a token.
      taps: of the filter; None means `length`.
      documents: whether there are any.
      form: 'toeplitz' where the rows are convolved by a product.
    """
    if implementation == 'reference':
        return 0.0
    if form == 'toeplitz':
        return 2.0 * batch * channels * length**2
    if not documents:
        points = transform_size(length, length if taps is None else taps)
        return 2.5 * channels * (2 * batch + 1) * points * math.log2(points)
    size, levels = halving(length)
    total = 0.0
    for level in range(levels):
        points = 2 * size * 2**level
        pairs = 2 ** (levels - 1 - level)
        total += 2.5 * channels * (2 * batch * pairs + 1) * points * math.log2(points)
    return total


def _rest(n: int) -> int:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n
