"""How steeply a loss falls: d log(loss) / d log(C), C being the model FLOPs spent so far.

On these axes losses follow lines (arXiv 2001.08361), and a model that is too small for its compute
shows by a slope that flattens: Staged Training (Shen et al., arXiv 2203.06211) grows at that point.
A training loss is noisy, so the slope is a least-squares line through the last stretch of compute;
the loss of a batch enters with the others of its bin, so that what is kept stays small.
"""

import math
from collections.abc import Mapping
from typing import Any

_BIN = 0.005  # of log(C): half a per cent more compute
LEAST = 10  # bins that a line is drawn through


class LossSlope:
    """The slope over the last stretch of one stage.

    Args:
      window: how many times as much compute the end of the stretch has spent as its beginning.
    """

    def __init__(self, window: float):
        self._width = math.log(window)
        # Number of the bin -> [losses, sum of log(C), sum of log(loss)].
        self._bins: dict[int, list[float]] = {}
        self._waiting: list[list[float]] = []  # [step, flops, loss] that no slope has seen yet

    def add(self, step: int, flops: float, loss: float) -> None:
        """Takes the loss of a step.

        Args:
          step: its number.
          flops: model FLOPs up to and with it.
          loss: of its batch.
        """
        self._waiting.append([step, flops, loss])

    def value(self, step: int) -> float | None:
        """Returns the slope before a step, None while less than a whole stretch is known.

        Whether the loss of the step just before is known depends on what else the loop does; the
        one before that always is. It is the last that counts, so that runs decide alike whether or
        not they were interrupted.
        """
        known = [entry for entry in self._waiting if entry[0] <= step - 2]
        self._waiting = self._waiting[len(known) :]
        for _, flops, loss in known:
            self._take(flops, loss)
        if len(self._bins) < LEAST:
            return None
        sums = list(self._bins.values())
        x = [log_flops / n for n, log_flops, _ in sums]
        y = [log_loss / n for n, _, log_loss in sums]
        if max(x) - min(x) < self._width - 2 * _BIN:
            return None
        weights = [n for n, _, _ in sums]
        total = sum(weights)
        mean_x = sum(n * a for n, a in zip(weights, x, strict=True)) / total
        mean_y = sum(n * b for n, b in zip(weights, y, strict=True)) / total
        along = sum(n * (a - mean_x) ** 2 for n, a in zip(weights, x, strict=True))
        both = sum(n * (a - mean_x) * (b - mean_y) for n, a, b in zip(weights, x, y, strict=True))
        return both / along

    def to_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it, as JSON can hold it."""
        bins = [[number, *sums] for number, sums in self._bins.items()]
        return {'bins': bins, 'waiting': self._waiting}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes up what `to_dict` returned."""
        self._bins = {int(number): sums for number, *sums in saved['bins']}
        self._waiting = saved['waiting']

    def _take(self, flops: float, loss: float) -> None:
        if not (flops > 0 and loss > 0 and math.isfinite(loss)):
            return  # a step of no cost, or one that was left out
        x, y = math.log(flops), math.log(loss)
        number = math.floor(x / _BIN)
        n, log_flops, log_loss = self._bins.get(number, (0, 0.0, 0.0))
        self._bins[number] = [n + 1, log_flops + x, log_loss + y]
        oldest = number - math.ceil(self._width / _BIN)
        self._bins = {key: sums for key, sums in self._bins.items() if key >= oldest}
