"""What the processes of a run agree on: that one of them was asked to stop (`core.signals`)."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils


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
