"""FLOPs of RWKV-4's weighted average, by its recurrence and as implementations execute it.

Plain Python: `effjax.costs` imports it without jax.
"""

STATE = 3  # numbers a channel: numerator, denominator, exponent


def model_flops(batch: int, length: int, channels: int) -> float:
    """FLOPs of the recurrence: numerator and denominator are decayed, written and read.

    A token costs a channel a multiply-add each for both sums, twice: what it reads, what it
    leaves.
    """
    return 8.0 * batch * length * channels


def executed_flops(implementation: str, batch: int, length: int, channels: int) -> float:
    """FLOPs that count as hardware FLOPs: all work is elementwise, which does not count."""
    del implementation, batch, length, channels
    return 0.0
