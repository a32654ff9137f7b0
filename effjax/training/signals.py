"""Leaving in good order: one signal asks the run to save and stop, a second stops it at once."""

import os
import signal
import sys
import threading
import time
import types
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Context manager that turns SIGTERM and SIGINT into a request.

    Python only lets the main thread handle signals; elsewhere this does nothing, and the program
    that started the thread keeps its own handling.

    Attributes:
      requested: name of the first signal that came ('SIGTERM'), or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> 'Stop':
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old.items():
            # None: it was installed by C code, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            _say(f'{name}: leaving at once.', restore=True)
            os._exit(128 + number)
        self.requested = name
        _say(f'{name}: saving, then leaving. A second signal leaves at once.')


def agree(requested: bool) -> bool:
    """Returns True in every process when it is True in any.

    All processes must call it at the same point. With one process it costs nothing; with several
    it is a tiny gather that waits for the slowest, and for the step that is in flight.
    """
    if jax.process_count() == 1:
        return requested
    return bool(np.any(multihost_utils.process_allgather(np.array(requested))))


class Agreement:
    """`agree` for every step: asks the other processes about once a second, never forgets a yes.

    How many calls to let pass follows from times that the processes have gathered, so that all of
    them ask at the same call. It is at most `most`, as calls may become slower.

    Args:
      seconds: time between two questions.
      most: calls between two questions.
    """

    def __init__(self, seconds: float = 1.0, most: int = 10):
        self._seconds, self._most = seconds, most
        self._agreed = False
        self._pass = 0  # calls still to let pass
        self._calls = 0
        self._asked = time.monotonic()

    def __call__(self, requested: bool) -> bool:
        """Returns True once any process has asked; the same in all at the same call."""
        if jax.process_count() == 1:
            return requested
        self._calls += 1
        if self._agreed or self._pass > 0:
            self._pass -= 1
            return self._agreed
        now = time.monotonic()
        mine = np.array([float(requested), (now - self._asked) / self._calls])
        asked, slowest = multihost_utils.process_allgather(mine).max(axis=0)
        self._agreed = bool(asked)
        self._pass = int(min(self._seconds / max(slowest, 1e-6), self._most)) - 1
        self._calls, self._asked = 0, now
        return self._agreed


def _say(text: str, restore: bool = False) -> None:
    # os.write, not print: a handler may interrupt a print, whose buffer must not be entered twice.
    try:
        cursor = '\x1b[?25h' if restore and sys.stderr.isatty() else ''  # a live bar hides it
        os.write(2, f'{cursor}\n{text}\n'.encode())
    except (OSError, ValueError):
        return  # stderr is closed: there is nobody to tell
