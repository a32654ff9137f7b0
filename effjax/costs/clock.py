"""`Clock`: where the wall time of a run goes, kind by kind, saved and restored with the run.

Every second belongs to exactly one kind, so the kinds add up to the wall time since the clock
started: a nested block takes its time from the block around it, and what stands in no block is
'other'. One thread uses a clock; work in the background costs the run only where it is waited for.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

KINDS = ('compile', 'train', 'eval', 'checkpoint', 'data', 'other')


class Clock:
    """Seconds and device-seconds by kind ('data' is time spent waiting for a batch).

    with clock('train'):
        with clock('data'):  # taken from 'train'
            batch = next(loader)
    """

    def __init__(self, *, devices: int = 1, now: Callable[[], float] = time.perf_counter):
        """Starts the clock.

        Args:
          devices: devices that this run holds, in all processes; a second costs that many
            device-seconds whatever it is spent on.
          now: monotonic time in seconds.
        """
        self.devices = devices
        self._now = now
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._device_seconds = dict.fromkeys(KINDS, 0.0)
        self._open: list[str] = ['other']
        self._mark = now()

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Books the time of a `with` block as `kind`.

        Raises:
          ValueError: an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f'unknown kind of time {kind!r}; known: {", ".join(KINDS)}.')
        self._book()
        self._open.append(kind)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def seconds(self, kind: str | None = None) -> float:
        """Wall seconds so far of one kind, or of all; open blocks included up to now."""
        self._book()
        return sum(self._seconds.values()) if kind is None else self._seconds[kind]

    def device_seconds(self, kind: str | None = None) -> float:
        """As `seconds`, times the devices held while they passed."""
        self._book()
        times = self._device_seconds
        return sum(times.values()) if kind is None else times[kind]

    def to_dict(self) -> dict[str, Any]:
        """Returns wall seconds by kind, and `device_seconds` by kind; JSON, restored exactly."""
        self._book()
        return {**self._seconds, 'device_seconds': dict(self._device_seconds)}

    @classmethod
    def from_dict(
        cls,
        saved: Mapping[str, Any],
        *,
        devices: int = 1,
        now: Callable[[], float] = time.perf_counter,
    ) -> 'Clock':
        """Returns a clock that goes on from a saved one; the time in between is not counted."""
        clock = cls(devices=devices, now=now)
        clock._seconds.update({kind: saved[kind] for kind in KINDS})
        clock._device_seconds.update(saved['device_seconds'])
        return clock

    def _book(self) -> None:
        now = self._now()
        passed = max(0.0, now - self._mark)
        self._mark = now
        self._seconds[self._open[-1]] += passed
        self._device_seconds[self._open[-1]] += passed * self.devices
