"""Which process works at which cell, so that the processes of a machine's GPUs share a sweep."""

import os
import pathlib

from experiments.recall.cells import Cell


class Claims:
    """A link a cell, to the number of the process that took it; a dead process has none.

    Args:
      folder: of the links, made if need be.
    """

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def take(self, cell: Cell) -> bool:
        """Takes a cell, unless another process has it."""
        link = self._link(cell)
        for _ in range(2):
            try:
                os.symlink(str(os.getpid()), link)  # whole from the first moment on, unlike a file
                return True
            except FileExistsError:
                if _alive(link):
                    return False
                link.unlink(missing_ok=True)  # of a process that was killed
        return False

    def release(self, cell: Cell) -> None:
        """Gives a cell back."""
        self._link(cell).unlink(missing_ok=True)

    def _link(self, cell: Cell) -> pathlib.Path:
        return self._folder / f'{cell.mixer}-{cell.length}-{cell.width}'


def _alive(link: pathlib.Path) -> bool:
    try:
        os.kill(int(os.readlink(link)), 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return True
