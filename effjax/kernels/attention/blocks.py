"""Which square tiles of a sparse mask hold an allowed pair, and how large a kernel's blocks are.

Kernels that go through blocks of queries and keys visit those that are not empty. Plain Python
with numpy, as `cost` is.
"""

import functools

import numpy as np

from effjax.kernels.attention.mask import MaskSpec, plan

TILE = 128
_LARGEST = 512, 1024  # rows and columns of a kernel's largest block


@functools.lru_cache(maxsize=32)
def filled(spec: MaskSpec, length: int) -> np.ndarray:
    """Returns which tiles of 128 x 128 pairs hold an allowed one, bool [N, N].

    Only the pairs that the mask's plan scores are looked at. The mask has no branches.
    """
    made = plan(spec, length)
    count, size = -(-length // TILE), len(made.order) // len(made.table)
    by_block = made.order.reshape(-1, size)
    out = np.zeros((count, count), bool)
    for n, seen in enumerate(made.table):
        i = by_block[n][by_block[n] >= 0]
        j = by_block[seen[seen >= 0]].ravel()
        j = np.union1d(j[j >= 0], made.shared)
        rows, columns = np.nonzero(spec.allowed(i[:, None], j[None, :], np.full((1, 1), length)))
        out[i[rows] // TILE, j[columns] // TILE] = True
    out[made.rows // TILE] = True
    return out


def visited(spec: MaskSpec, length: int, rows: int, columns: int) -> np.ndarray:
    """Returns which blocks of rows x columns pairs are not empty, bool [T / rows, T / columns].

    Both sizes are multiples of 128 that divide the length.
    """
    tiles = filled(spec, length)
    by_rows = tiles.reshape(length // rows, rows // TILE, -1).any(1)
    return by_rows.reshape(length // rows, length // columns, columns // TILE).any(2)


@functools.lru_cache(maxsize=32)
def block_sizes(spec: MaskSpec, length: int) -> tuple[int, int]:
    """Returns rows and columns of a kernel's blocks.

    Large blocks use the matrix units better, small ones skip more. What a block costs is taken as
    its pairs and those of one tile more each way; the cheapest sizes win, the larger ones of two
    that are alike.
    """
    sizes = [
        (rows, columns)
        for rows in _sizes(length, _LARGEST[0])
        for columns in _sizes(length, _LARGEST[1])
    ]

    def price(size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = size
        count = int(visited(spec, length, rows, columns).sum())
        return count * (rows + TILE) * (columns + TILE), -rows * columns

    return min(sizes, key=price)


def _sizes(length: int, most: int) -> list[int]:
    """Powers of two times 128, at most `most`, that divide the length."""
    out = [TILE]
    while out[-1] * 2 <= most and length % (out[-1] * 2) == 0:
        out.append(out[-1] * 2)
    return out


def executed(spec: MaskSpec, length: int) -> int:
    """Returns the pairs of all blocks that such a kernel visits."""
    rows, columns = block_sizes(spec, length)
    return int(visited(spec, length, rows, columns).sum()) * rows * columns
