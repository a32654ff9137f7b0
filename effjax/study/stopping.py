"""How a signal stops a study, whatever it is doing: it starts before anything else is imported."""

import types
from typing import NoReturn

from effjax.core.errors import StudyError
from effjax.core.signals import Stop, requested


class Stopped(StudyError):
    """A signal asked the study to stop; what is done stays done."""


class _Left(BaseException):
    """A signal outside of a run; no `except Exception` may take it for a run's failure."""


class Leaving(Stop):
    """Context manager that turns a SIGTERM or SIGINT at any moment into `Stopped`.

    Outside of a run the signal breaks off what is being done; a run in progress saves first. An
    exception that a handler raises can get lost (Python drops those of destructors and callbacks
    of its collector, and C++ code may turn them into others), so the request is kept as well:
    `check` looks at it between any two runs, and so does the end of the block.

    Raises:
      Stopped: a signal came.
    """

    said = 'stopping'

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        super()._handle(number, frame)
        raise _Left

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        if self.requested:
            _stop(self.requested)


def check(stopped_by: str | None = None) -> None:
    """Leaves if a run was stopped by a signal, or if one has come and was not obeyed.

    Raises:
      Stopped: so it is.
    """
    name = stopped_by or requested()
    if name:
        _stop(name)


def _stop(name: str) -> NoReturn:
    raise Stopped(f'stopped by {name}; the same command goes on.') from None
