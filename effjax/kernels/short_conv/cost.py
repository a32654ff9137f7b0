"""FLOPs of the short convolution.

It is elementwise work of K multiply-adds a channel, as small as a norm's or a rotation's, and like
theirs it belongs neither to model FLOPs nor to what the walk of a program counts (`core.cost`).
"""


def elementwise_flops(batch: int, length: int, channels: int, taps: int) -> float:
    """FLOPs of the multiply-adds, for who compares it with other elementwise work."""
    return 2.0 * batch * length * channels * taps


def executed_flops(implementation: str, batch: int, length: int, channels: int, taps: int) -> float:
    """FLOPs that count as hardware FLOPs: none, whichever implementation runs."""
    del implementation, batch, length, channels, taps
    return 0.0
