"""FLOPs of the selective scan, by its recurrence and as its implementations execute it.

Plain Python: `effjax.costs` imports it without jax.
"""

from typing import Any

from effjax.kernels.diagonal_scan import cost as diagonal
from effjax.kernels.selective_scan.plan import PLANS

CHUNK = 64  # tokens whose states exist at a time, unless the caller says otherwise


def model_flops(batch: int, length: int, channels: int, states: int) -> float:
    """FLOPs of the recurrence: each state decays, is written and is read, 5 a token.

    The exponential, the products of step and input, and the skip are elementwise work, which does
    not count.
    """
    return 5.0 * batch * length * channels * states


def sizes(length: int, chunk: int) -> tuple[int, int]:
    """Returns (tokens of a chunk, tokens gone through in turn in it, about its square root)."""
    size = max(1, min(chunk, length))
    inner = 1
    while inner * inner < size:
        inner += 1
    return size, max(inner, 2)


def executed_flops(
    implementation: str,
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    chunk: int = CHUNK,
    form: str = 'chunks',
) -> float:
    """FLOPs of the forward pass that count as hardware FLOPs.

    The recurrence and its read-out, of the Pallas kernels with all that fills up whole blocks; of
    'xla' also what a chunk computes for them, the decays (a product and an exponential) and the
    writes, since a chunk is one body with its state. Its form is 'chunks', or on GPUs 'prefix',
    which also adds what the state does to the first token and puts tokens together by additions.
    """
    elements = batch * channels * states
    if implementation == 'reference':
        return 4.0 * elements * length
    if implementation in PLANS:
        plan = PLANS[implementation](length, channels, states)
        blocks = -(-length // plan.size) * -(-channels // plan.width)
        return 4.0 * batch * blocks * plan.size * plan.width * plan.states
    size, inner = sizes(length, chunk)
    scanned = diagonal.executed_flops('xla', 1, size, 1, chunk=inner, form=form)
    if form == 'prefix':
        scanned += 2 + sum(size >> i for i in range(size.bit_length() - 1))
    per_chunk = elements * (scanned + 5.0 * size) + batch * channels * size
    return -(-length // size) * per_chunk


def kernel_flops(call: Any) -> float:
    """FLOPs of one call of a Pallas kernel, a `costs.products.KernelCall`."""
    u, _, A = call.inputs[:3]
    elements = A.shape[-2]
    for n in u.shape:
        elements *= n
    return 4.0 * elements * (2 if call.name.endswith('backward') else 1)
