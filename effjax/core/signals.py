"""Leaving in good order: one signal asks for it, a second leaves at once."""

import os
import signal
import sys
import threading
import types
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Context manager that turns SIGTERM and SIGINT into a request.

    Python only lets the main thread handle signals; elsewhere this does nothing, and the program
    that started the thread keeps its own handling. Of two that lie one within the other, a request
    to one is a request to both, whatever ends the inner one.

    Attributes:
      requested: name of the first signal that came ('SIGTERM'), or None.
    """

    said = 'saving, then leaving'

    def __init__(self) -> None:
        self.requested: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> 'Stop':
        if threading.current_thread() is threading.main_thread():
            self.requested = requested()
            for number in SIGNALS:
                self._old[number] = signal.getsignal(number)
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old.items():
            # None: it was installed by C code, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        outer = _holder(self._old.get(signal.SIGTERM))
        if outer is not None:  # after the handlers, so that no signal falls between the two
            outer.requested = outer.requested or self.requested
        self._old = {}

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            _say(f'{name}: leaving at once.', restore=True)
            os._exit(128 + number)
        self.requested = name
        _say(f'{name}: {self.said}. A second signal leaves at once.')


def requested() -> str | None:
    """Returns the name of the signal that the innermost `Stop` around the caller has taken."""
    holder = _holder(signal.getsignal(signal.SIGTERM))
    return holder.requested if holder is not None else None


def _holder(handler: Any) -> Stop | None:
    owner = getattr(handler, '__self__', None)
    return owner if isinstance(owner, Stop) else None


def _say(text: str, restore: bool = False) -> None:
    # os.write, not print: a handler may interrupt a print, whose buffer must not be entered twice.
    try:
        cursor = '\x1b[?25h' if restore and sys.stderr.isatty() else ''  # a live bar hides it
        os.write(2, f'{cursor}\n{text}\n'.encode())
    except (OSError, ValueError):
        return  # stderr is closed: there is nobody to tell
