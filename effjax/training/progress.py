"""Progress for people: a bar with ETA on a terminal, a plain line now and then elsewhere.

Everything goes to stderr, so that stdout holds results only. Files are written by `metrics`.
"""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

import jax

# What a budget counts -> the key of a row of metrics that says how far it is.
_KEYS = {
    'steps': 'step',
    'tokens': 'tokens',
    'examples': 'examples',
    'model_flops': 'model_flops',
    'hardware_flops': 'hardware_flops',
    'reference_seconds': 'reference_seconds',
    'joules': 'joules',
    'seconds': 'seconds',
}


class ProgressLike(Protocol):
    """What the trainer needs of a progress display."""

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a step's row of metrics; cheap enough to be called at every step."""

    def line(self, text: str) -> None:
        """Shows a line that stays, such as an evaluation's result."""

    def close(self) -> None:
        """Ends the display; may be called twice."""


class NoProgress:
    """Shows nothing: for logs that nobody watches, and for all processes but the first."""

    def update(self, row: Mapping[str, Any]) -> None:
        """Ignores the row."""

    def line(self, text: str) -> None:
        """Ignores the text."""

    def close(self) -> None:
        """Does nothing."""


class Progress:
    """A bar on a terminal; elsewhere a line each tenth of the way, and at least each half minute.

    Args:
      unit: what `total` counts: 'steps', one of `costs.UNITS`.
      total: where the run ends.
      stream: where to write; None is stderr.
      line_seconds: most seconds between two plain lines.
    """

    def __init__(
        self,
        unit: str,
        total: float,
        *,
        stream: TextIO | None = None,
        line_seconds: float = 30.0,
    ):
        self._key, self._total = _KEYS[unit], total
        self._stream = stream or sys.stderr
        self._line_seconds = line_seconds
        self._first: tuple[float, float] | None = None  # (time, fraction), for the ETA
        self._shown_at = -math.inf
        self._shown_tenth = -1
        self._row: Mapping[str, Any] | None = None  # not shown yet
        self._bar = _Bar(self._stream) if self._stream.isatty() else None

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics; uses `step`, `loss`, `tokens_per_second`, `model_flops`,
        `seconds` and the key of the budget, where they are there."""
        now = time.monotonic()
        fraction = min(row.get(self._key, 0) / self._total, 1.0) if self._total else 0.0
        self._first = self._first or (now, fraction)
        self._row = row
        waited, tenth = now - self._shown_at, int(fraction * 10)
        if self._bar is not None:
            due = waited >= 0.2
        else:  # a quick run's tenths would flood a log: at most a line a second
            due = waited >= self._line_seconds or (tenth > self._shown_tenth and waited >= 1.0)
        if due:
            self._show(row, now, fraction)

    def line(self, text: str) -> None:
        """Shows a line that stays, above the bar."""
        if self._bar is not None:
            self._bar.print(text)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the last row, ends the bar and gives the terminal back; may be called twice."""
        if self._row is not None:
            fraction = min(self._row.get(self._key, 0) / self._total, 1.0) if self._total else 0.0
            self._show(self._row, time.monotonic(), fraction)
        if self._bar is not None:
            self._bar.close()

    def _show(self, row: Mapping[str, Any], now: float, fraction: float) -> None:
        text = describe(row, self._eta(now, fraction))
        if self._bar is not None:
            self._bar.show(fraction, text)
        else:
            print(f'{fraction:4.0%}  {text}', file=self._stream, flush=True)
        self._row, self._shown_at, self._shown_tenth = None, now, int(fraction * 10)

    def _eta(self, now: float, fraction: float) -> float | None:
        """Seconds left at the mean speed since the first row of this process."""
        assert self._first is not None
        seconds, done = now - self._first[0], fraction - self._first[1]
        return (1.0 - fraction) * seconds / done if done > 0 else None


def make_progress(show: bool, unit: str, total: float) -> ProgressLike:
    """Returns a display for process 0 if `show`, and one that shows nothing otherwise."""
    return Progress(unit, total) if show and jax.process_index() == 0 else NoProgress()


def describe(row: Mapping[str, Any], eta: float | None = None) -> str:
    """Returns one line: step, loss, speed, cost so far, time left."""
    parts = [f'step {row["step"]}']
    if row.get('loss') is not None:
        parts.append(f'loss {row["loss"]:.3f}')
    if row.get('tokens_per_second'):
        parts.append(human(row['tokens_per_second'], 'tok/s'))
    if row.get('model_flops'):
        parts.append(human(row['model_flops'], 'FLOP'))
    if row.get('seconds') is not None:
        parts.append(human(row['seconds'], 's'))
    if eta is not None:
        parts.append(f'ETA {human(eta, "s")}')
    return '  '.join(parts)


def human(value: float, unit: str = '') -> str:
    """Returns a number as people write it: '1.23 PFLOP', '4.5k tok/s', '3m12s', '85.2 MB'.

    Three significant digits. Seconds become hours, minutes and seconds; FLOPs and bytes get a
    prefix on the unit; anything else gets k, M, B (1e9) or T (1e12) on the number.
    """
    if not math.isfinite(value):
        return f'{value} {unit}'.strip()
    if unit == 's':
        return _duration(value)
    on_unit = unit in ('FLOP', 'FLOP/s', 'B', 'B/s')
    number, prefix = _scale(value, ('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z') if on_unit else _COUNTS)
    return f'{number} {prefix}{unit}' if on_unit else f'{number}{prefix} {unit}'.strip()


_COUNTS = ('', 'k', 'M', 'B', 'T')


def _scale(value: float, prefixes: tuple[str, ...]) -> tuple[str, str]:
    index = 0
    # 999.5 and more would print as 1e+03: it belongs to the next prefix.
    while abs(value) >= 999.5 and index < len(prefixes) - 1:
        value, index = value / 1000.0, index + 1
    return f'{value:.3g}', prefixes[index]


def _duration(seconds: float) -> str:
    if abs(seconds) < 9.95:
        return f'{seconds:.1f}s'
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f'{hours}h{m:02d}m'
    return f'{m}m{s:02d}s' if m else f'{s}s'


class _Bar:
    """The live bar on a terminal, drawn by rich."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        console = Console(file=stream)
        # The trainer redraws: a refresh thread would take time from the step on small machines.
        self._rich = RichProgress(
            BarColumn(bar_width=max(8, min(40, console.width - 72))),  # the text takes about 66
            TaskProgressColumn(),
            TextColumn('{task.fields[text]}', markup=False, table_column=Column(no_wrap=True)),
            console=console,
            auto_refresh=False,
        )
        self._task = self._rich.add_task('', total=1.0, text='')
        self._rich.start()

    def show(self, fraction: float, text: str) -> None:
        self._rich.update(self._task, completed=fraction, text=text, refresh=True)

    def print(self, text: str) -> None:
        self._rich.console.print(text, markup=False, highlight=False)
        self._rich.refresh()

    def close(self) -> None:
        self._rich.stop()
