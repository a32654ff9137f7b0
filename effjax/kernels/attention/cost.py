"""FLOPs of softmax attention, and the block plan that the `xla` implementation executes.

Plain Python: `effjax.costs` imports it without jax.
"""

import math
from typing import Any

from effjax.kernels.attention import blocks, hopper_plan
from effjax.kernels.attention.mask import MaskSpec
from effjax.kernels.attention.mask import scored as planned_pairs

DENSE_MAX = 1024  # longest sequence whose whole score matrix 'xla' forms
BLOCK = 512  # rows and columns of a block of the blockwise form
BAND_MIN = 64  # smallest block of the banded form; below it products are too thin


def pairs(
    q_len: int, kv_len: int | None = None, *, mask: str = 'causal', window: int | None = None
) -> int:
    """Number of (query, key) pairs that a mask allows, for one head of one row.

    Args:
      q_len: number of queries T.
      kv_len: number of keys S; None means T.
      mask: 'causal' (T (T + 1) / 2 pairs) or 'full' (T S).
      window: with 'causal', query i sees keys i - window < j <= i.
    """
    if mask == 'full':
        return q_len * (q_len if kv_len is None else kv_len)
    if window is None or window >= q_len:
        return q_len * (q_len + 1) // 2
    return window * (window + 1) // 2 + (q_len - window) * window


def attention_flops(batch: int, heads: int, head_dim: int, scored: float) -> float:
    """FLOPs of scores and values, `q k^T` and `p v`, for `scored` pairs a head and row."""
    return 4.0 * batch * heads * head_dim * scored


def strategy(
    q_len: int,
    kv_len: int,
    *,
    mask: str,
    window: int | None,
    positions: bool,
    spec: MaskSpec | None = None,
    packed: bool = False,
) -> str:
    """Which form 'xla' takes.

    'dense' (T x S scores), 'band' (blocks of a window), 'gather' (of a sparse mask's blocks of
    keys) or 'blocks' (one after another).

    Args:
      q_len: number of queries T.
      kv_len: number of keys S.
      mask: 'causal', 'full', 'array' or 'sparse'.
      window: width of the sliding window, or None.
      positions: True where order is given by arrays, so that no block can be left out.
      spec: the sparse mask.
      packed: the arrays of a sparse mask are places in documents packed into rows.
    """
    if spec is not None and q_len == kv_len:
        by_place = positions and packed
        planned = spec.packed() is not None if by_place else not positions
        if planned and 2 * planned_pairs(spec, q_len, packed=by_place) < q_len**2:
            return 'gather'
    by_index = mask == 'causal' and not positions and q_len == kv_len
    if by_index and window is not None and 2 * band_block(window) < q_len:
        return 'band'
    return 'dense' if max(q_len, kv_len) <= DENSE_MAX or q_len == 1 else 'blocks'


def band_block(window: int) -> int:
    """Rows of a block of the banded form; each sees its own block and the one before."""
    return max(window, BAND_MIN)


def block_pairs(
    q_len: int, kv_len: int, *, block: int = BLOCK, mask: str, window: int | None, positions: bool
) -> list[tuple[int, int]]:
    """Lists the (query block, key block) pairs that hold an allowed pair, by query block."""
    rows, columns = -(-q_len // block), -(-kv_len // block)
    out = []
    for i in range(rows):
        for j in range(columns):
            if mask == 'causal' and not positions:
                first, last = i * block, i * block + block - 1
                if j * block > last:
                    continue
                if window is not None and j * block + block - 1 <= first - window:
                    continue
            out.append((i, j))
    return out


def executed_pairs(
    implementation: str,
    q_len: int,
    kv_len: int | None = None,
    *,
    mask: str = 'causal',
    window: int | None = None,
    spec: MaskSpec | None = None,
    packed: bool = False,
) -> float:
    """Pairs a head and row that an implementation really scores, masked ones included.

    'cudnn' and 'splash' skip what the mask excludes but for the diagonal's blocks: they are
    booked at the allowed pairs, or where the mask is sparse at those of the blocks that 'splash'
    visits; 'pallas_gpu' always at those of the blocks it visits. `packed` is of rows of several
    documents.
    """
    kv_len = q_len if kv_len is None else kv_len
    if implementation == 'pallas_gpu':
        return hopper_plan.executed(q_len, kv_len, kind=mask, window=window, spec=spec)
    if implementation == 'splash' and spec is not None:
        return blocks.executed(spec, q_len)
    if implementation in ('cudnn', 'splash'):
        return pairs(q_len, kv_len, mask=mask, window=window)
    if implementation == 'reference':
        return q_len * kv_len
    packed = packed and spec is not None and spec.absolute
    form = strategy(
        q_len, kv_len, mask=mask, window=window, positions=packed, spec=spec, packed=packed
    )
    if form == 'gather':
        assert spec is not None
        return planned_pairs(spec, q_len, packed=packed)
    if form == 'dense':
        return q_len * kv_len
    if form == 'band':
        assert window is not None
        block = band_block(window)
        return -(-q_len // block) * block * 2 * block
    mask = 'causal' if spec is not None and spec.causal else mask
    return len(block_pairs(q_len, kv_len, mask=mask, window=window, positions=False)) * BLOCK**2


def executed_flops(
    implementation: str,
    batch: int,
    q_len: int,
    heads: int,
    head_dim: int,
    *,
    kv_len: int | None = None,
    mask: str = 'causal',
    window: int | None = None,
    spec: MaskSpec | None = None,
    packed: bool = False,
) -> float:
    """FLOPs of the forward products that an implementation really executes."""
    scored = executed_pairs(
        implementation, q_len, kv_len, mask=mask, window=window, spec=spec, packed=packed
    )
    return attention_flops(batch, heads, head_dim, scored)


def kernel_flops(call: Any) -> float | None:
    """FLOPs of one call of a kernel for Hopper GPUs, a `costs.products.KernelCall`.

    The products of a pair are two in the forward pass, and in the backward pass three in the kernel
    of queries and four in that of keys.
    """
    if call.pairs is None:
        return None
    batch, _, heads, head_dim = call.inputs[0].shape
    products = {'forward': 2, 'queries': 3, 'keys': 4}[call.name.rsplit('_', 1)[-1]]
    return 2.0 * math.prod((batch, heads, head_dim)) * products * call.pairs
