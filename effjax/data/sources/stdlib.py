"""The source code of Python's own standard library: real text that is always at hand.

One document a `.py` file, without tests, installed packages and files that the build wrote. The
content depends on the Python version, so `describe` records the version and a digest.
"""

import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import Any

from effjax.core.errors import DataError
from effjax.data.documents import Document, DocumentSource

# Folders that hold tests, or that are not the library itself.
EXCLUDED = frozenset(
    {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
)


class Stdlib(DocumentSource):
    """CPython's standard library."""

    def __init__(self, *, valid_fraction: float = 0.05):
        """Lists the files.

        Args:
          valid_fraction: held-out part of the files, by their content.

        Raises:
          ConfigError: a bad argument.
          DataError: this Python has no library source.
        """
        super().__init__('stdlib', valid_fraction)
        root = pathlib.Path(sysconfig.get_path('stdlib'))
        self._files = sorted(
            (file.relative_to(root).as_posix(), file)
            for file in root.rglob('*.py')
            if _belongs(file.relative_to(root)) and file.is_file() and not file.is_symlink()
        )
        if not self._files:
            raise DataError(
                'this Python has no standard-library source (.py files) beside it; use a full '
                "build of Python, or another data source such as dict(kind='text', path=...)."
            )

    def _read(self, part: str) -> Iterator[Document]:
        for name, file in self._files:
            try:
                text = file.read_bytes().decode()
            except UnicodeDecodeError:
                # A few files are in another encoding on purpose.
                self._skip(name, 'not UTF-8')
                continue
            yield Document(name, text, self.name)

    def _facts(self) -> dict[str, Any]:
        return {'python': platform.python_version(), 'files': len(self._files)}


def _belongs(path: pathlib.PurePath) -> bool:
    """Says whether a file belongs to the library, tests and what a build wrote left out."""
    if EXCLUDED.intersection(path.parts):
        return False
    if path.parts[0].startswith(('config-', '_sysconfigdata')):
        return False  # describes the machine that built this Python
    return path.name not in ('sitecustomize.py', 'usercustomize.py')
