"""Which blocks of queries and keys the Hopper kernels visit, and how they share out the work.

Plain Python with numpy, as `cost` is. Blocks are tiles of 128 x 128 pairs; lengths that they do not
divide are filled up with keys that none may see.
"""

import dataclasses
import functools

import numpy as np

from effjax.kernels.attention.blocks import TILE, filled
from effjax.kernels.attention.mask import MaskSpec

_NONE, _WHOLE = -2, -1  # in place of a pattern's number: nothing is allowed, or everything


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask that knows its lengths.

    Attributes:
      queries: their number T.
      keys: their number S.
      low: query i sees keys j with low <= i - j; None: no such limit.
      high: and i - j <= high.
      spec: what else the mask says, where differences alone do not say it; T is then S.
    """

    queries: int
    keys: int
    low: int | None = None
    high: int | None = None
    spec: MaskSpec | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """For each block on one side of the mask the blocks of the other side that it meets.

    Attributes:
      heads: int32 [N, 4], the longest list first: the number of a block, where its list begins in
        `items`, how many of its items are wholly allowed, which come first, and how many there are.
      items: int32 [M, 2], the number of a block, and of the pattern of allowed pairs in it.
      patterns: int8 [P, 128, 128], 1 where a pair is allowed; this side's tokens go down. Empty
        where the limits of the mask say it.
    """

    heads: np.ndarray
    items: np.ndarray
    patterns: np.ndarray


def mask_of(kind: str, window: int | None, spec: MaskSpec | None, queries: int, keys: int) -> Mask:
    """Returns the mask of a call: 'causal', 'full' or 'sparse' of a spec without branches."""
    if spec is not None:
        near = spec.window if spec.block is None else None
        if near is not None and spec == MaskSpec(spec.causal, near):
            return Mask(queries, keys, 0 if spec.causal else 1 - near, near - 1)
        return Mask(queries, keys, spec=spec)
    if kind == 'full':
        return Mask(queries, keys)
    return Mask(queries, keys, 0, None if window is None else window - 1)


@functools.lru_cache(maxsize=32)
def lists(mask: Mask, by_keys: bool = False) -> Lists:
    """Returns the lists of the blocks of queries, or of those of keys."""
    if mask.spec is None:
        seen, whole = _by_limits(mask)
        number, patterns = np.zeros(seen.shape, int), np.zeros((0, TILE, TILE), np.int8)
    else:
        number, patterns = _by_formula(mask)
        seen, whole = number != _NONE, number == _WHOLE
    if by_keys:
        seen, whole, number = seen.T, whole.T, number.T
        patterns = np.ascontiguousarray(np.swapaxes(patterns, 1, 2))
    all_of, whole_of = seen.sum(1), whole.sum(1)
    begin = np.cumsum(all_of) - all_of
    heads = np.stack([np.arange(len(seen)), begin, whole_of, all_of], axis=1)
    block, other = np.nonzero(seen)
    order = np.lexsort((other, ~whole[block, other], block))
    block, other = block[order], other[order]
    items = np.stack([other, np.maximum(number[block, other], 0)], axis=1)
    if not len(items):
        items = np.zeros((1, 2))  # kernels take no empty arrays
    longest_first = np.argsort(-all_of, kind='stable')
    return Lists(heads[longest_first].astype(np.int32), items.astype(np.int32), patterns)


def visited(mask: Mask) -> int:
    """Returns how many blocks are visited."""
    if mask.spec is not None:
        return int(filled(mask.spec, mask.queries).sum())
    return int(_by_limits(mask)[0].sum())


def executed(
    queries: int, keys: int, *, kind: str, window: int | None, spec: MaskSpec | None
) -> int:
    """Returns the pairs of all blocks that the kernels visit, for one head of one row."""
    return visited(mask_of(kind, window, spec, queries, keys)) * TILE**2


def _by_limits(mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks hold an allowed pair, and which nothing else, bool [N, M]."""
    rows, columns = (np.arange(-(-n // TILE)) * TILE for n in (mask.queries, mask.keys))
    apart = rows[:, None] - columns[None]
    least, most = apart - (TILE - 1), apart + (TILE - 1)
    seen = np.ones(apart.shape, bool)
    whole = np.broadcast_to(columns + TILE <= mask.keys, apart.shape)
    if mask.low is not None:
        seen, whole = seen & (most >= mask.low), whole & (least >= mask.low)
    if mask.high is not None:
        seen, whole = seen & (least <= mask.high), whole & (most <= mask.high)
    return seen, whole & seen


@functools.lru_cache(maxsize=32)
def _by_formula(mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """The number of each block's pattern [N, N], or why it has none, and the different patterns."""
    assert mask.spec is not None
    length, seen = mask.queries, filled(mask.spec, mask.queries)
    number = np.full(seen.shape, _NONE)
    different: dict[bytes, int] = {}
    for n, m in zip(*np.nonzero(seen), strict=True):
        i, j = n * TILE + np.arange(TILE)[:, None], m * TILE + np.arange(TILE)[None]
        allowed = mask.spec.allowed(i, j, np.full((1, 1), length)) & (i < length) & (j < length)
        if allowed.all():
            number[n, m] = _WHOLE
        else:
            found = np.ascontiguousarray(allowed, np.int8).tobytes()
            number[n, m] = different.setdefault(found, len(different))
    patterns = np.frombuffer(b''.join(different), np.int8)
    return number, patterns.reshape(-1, TILE, TILE)
