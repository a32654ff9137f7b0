"""FLOPs of the diagonal recurrence, by itself and as its implementations execute it.

Plain Python: `effjax.costs` imports it without jax.
"""

from typing import Any

from effjax.kernels.diagonal_scan.plan import BLOCKS, plan_for

CHUNK = 64  # tokens of a chunk unless the caller says otherwise


def model_flops(batch: int, length: int, channels: int, *, is_complex: bool = False) -> float:
    """FLOPs of the recurrence: a multiply-add a channel and token, 2, or 8 for complex numbers."""
    return float(batch * length * channels * (8 if is_complex else 2))


def executed_flops(
    implementation: str,
    batch: int,
    length: int,
    channels: int,
    *,
    is_complex: bool = False,
    chunk: int = CHUNK,
    form: str = 'chunks',
) -> float:
    """FLOPs of the forward pass that an implementation really executes.

    The Pallas kernels go over all tokens once, filled up to whole blocks. Where there is more than
    one chunk, 'xla' goes twice over the tokens, the first time also multiplying the decays of each
    chunk, and once over the chunks. Its form 'prefix', on GPUs, joins neighbours to pairs, goes on
    with these alone, and then with what stands between them.
    """
    product, multiply_add = (6, 8) if is_complex else (1, 2)
    if implementation == 'reference':
        return float(batch * length * channels * multiply_add)
    if implementation in BLOCKS:
        plan = plan_for(length, channels, BLOCKS[implementation])
        blocks = -(-length // plan.size) * -(-channels // plan.width)
        return float(batch * blocks * plan.size * plan.width * multiply_add)
    if form == 'prefix':
        return float(batch * channels * _prefix(length, product, multiply_add))
    return float(batch * channels * _per_channel(length, chunk, product, multiply_add))


def _per_channel(length: int, chunk: int, product: int, multiply_add: int) -> int:
    if length <= chunk or chunk == 1:
        return length * multiply_add
    chunks = -(-length // chunk)
    across = _per_channel(chunks, chunk, product, multiply_add)
    return chunks * chunk * (product + 2 * multiply_add) + across


def _prefix(length: int, product: int, multiply_add: int) -> int:
    if length < 2:
        return 0
    pairs = length // 2
    joined = pairs * (multiply_add + (product if pairs > 1 else 0))
    others = (length - pairs - 1) * multiply_add
    return joined + _prefix(pairs, product, multiply_add) + others


def kernel_flops(call: Any) -> float:
    """FLOPs of one call of a Pallas kernel, a `costs.products.KernelCall`."""
    backward = call.name.endswith('backward')
    is_complex = len(call.inputs) == (10 if backward else 6)
    elements = 1
    for n in call.inputs[0].shape:
        elements *= n
    return float(elements * (8 if is_complex else 2) * (2 if backward else 1))
