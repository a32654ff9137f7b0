"""Leaving in good order: one signal asks the run to save and stop, a second stops it at once."""

import os
import signal
import sys
import threading
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

    All processes must call it at the same step. With one process it costs nothing; with several
    it is one tiny gather, which waits for the slowest.
    """
    if jax.process_count() == 1:
        return requested
    return bool(np.any(multihost_utils.process_allgather(np.array(requested))))


def _say(text: str, restore: bool = False) -> None:
    # os.write, not print: a handler may interrupt a print, whose buffer must not be entered twice.
    try:
        cursor = '\x1b[?25h' if restore and sys.stderr.isatty() else ''  # a live bar hides it
        os.write(2, f'{cursor}\n{text}\n'.encode())
    except (OSError, ValueError):
        return  # stderr is closed: there is nobody to tell
