"""Local files: finding them, reading compressed ones, and what to do with bytes not UTF-8."""

import glob
import gzip
import pathlib
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from effjax.core.errors import ConfigError, DataError
from effjax.core.registry import suggest
from effjax.data.documents import Document, DocumentSource

BadUtf8 = Literal['skip', 'error']
CHUNK = 1 << 20


def find(path: str, pattern: str) -> list[tuple[str, pathlib.Path]]:
    """Finds files, sorted by name.

    Args:
      path: a file, a folder, or a glob such as 'corpus/*/a*.txt'.
      pattern: which files of a folder count, as a glob below it ('**/*.txt').

    Returns:
      (name, path) pairs; the name is relative to the folder, so it is the same on any machine.

    Raises:
      ConfigError: no path given.
      DataError: nothing there, or a folder without a match.
    """
    if not path:
        raise ConfigError('this data source needs a path; set data.path to a file, folder or glob.')
    root = pathlib.Path(path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        files = [f for f in root.glob(pattern) if f.is_file() and not _hidden(f, root)]
        if not files:
            raise DataError(_no_match(path, root, pattern))
    else:
        files = [pathlib.Path(f) for f in glob.glob(str(root), recursive=True)]
        files = [f for f in files if f.is_file()]
        if not files:
            near = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
            raise DataError(f'no file, folder or match for {path!r}.' + suggest(root.name, near))
        root = _stem(root)
    return sorted((f.relative_to(root).as_posix(), f) for f in files)


def _stem(pattern: pathlib.Path) -> pathlib.Path:
    """Returns the part of a glob before its first wildcard."""
    parts: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return pathlib.Path(*parts)


def _hidden(file: pathlib.Path, root: pathlib.Path) -> bool:
    return any(part.startswith('.') for part in file.relative_to(root).parts)


def _no_match(path: str, root: pathlib.Path, pattern: str) -> str:
    kinds = Counter(f.suffix or 'no suffix' for f in root.rglob('*') if f.is_file())
    if not kinds:
        return f'the folder {path!r} is empty.'
    held = ', '.join(f'{kind} ({n})' for kind, n in kinds.most_common(4))
    return f'no file in {path!r} matches {pattern!r}; it holds {held}. Set data.pattern.'


def chunks(path: pathlib.Path) -> Iterator[bytes]:
    """Streams a file's bytes, decompressing .gz and .zst.

    Raises:
      DataError: a damaged or truncated archive, or no `zstandard` package for .zst.
    """
    if path.suffix == '.gz':
        yield from _gunzip(path)
    elif path.suffix == '.zst':
        yield from _unzstd(path)
    else:
        with open(path, 'rb') as f:
            while data := f.read(CHUNK):
                yield data


def _gunzip(path: pathlib.Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, 'rb') as f:
            while data := f.read(CHUNK):
                yield data
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise _damaged(path, e) from e


def _unzstd(path: pathlib.Path) -> Iterator[bytes]:
    zstandard = optional('zstandard', f'reading {path.name}')
    frame = None
    with open(path, 'rb') as f:
        try:
            while data := f.read(CHUNK):
                while data:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    out = frame.decompress(data)
                    # One file may hold several frames, one after the other.
                    data, frame = (frame.unused_data, None) if frame.eof else (b'', frame)
                    if out:
                        yield out
        except zstandard.ZstdError as e:
            raise _damaged(path, e) from e
    if frame is not None:  # the library itself ends a truncated stream in silence
        raise _damaged(path, 'it ends inside a frame')


def _damaged(path: pathlib.Path, why: object) -> DataError:
    return DataError(f'{path.name} is damaged or truncated ({why}); get a new copy of the file.')


def optional(module: str, purpose: str) -> Any:
    """Imports a package that only some sources need.

    Raises:
      DataError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = {'PIL': 'pillow'}.get(module.partition('.')[0], module.partition('.')[0])
        raise DataError(f'{purpose} needs the package {package}: pip install {package}.') from e


def lines(path: pathlib.Path) -> Iterator[bytes]:
    """Streams a file's lines without their newline; the last one needs none."""
    rest = b''
    for data in chunks(path):
        *whole, rest = (rest + data).split(b'\n')
        yield from whole
    if rest:
        yield rest


class FileSource(DocumentSource):
    """Base of the sources that read local files."""

    def __init__(
        self,
        kind: str,
        path: str,
        valid_path: str,
        pattern: str,
        valid_fraction: float,
        on_bad_utf8: str,
        one_document: bool = False,
    ):
        """Finds the files.

        Args:
          kind: the source's kind, for its name.
          path: file, folder or glob.
          valid_path: the same for held-out text of its own; '' splits `path` instead.
          pattern: which files of a folder count.
          valid_fraction: held-out part where `valid_path` is ''.
          on_bad_utf8: 'skip' leaves out (and counts) what is not UTF-8; 'error' stops.
          one_document: all text is one document.

        Raises:
          ConfigError: a bad argument.
          DataError: nothing there.
        """
        if on_bad_utf8 not in ('skip', 'error'):
            raise ConfigError(f"on_bad_utf8 must be 'skip' or 'error', got {on_bad_utf8!r}.")
        if valid_path:
            self._files = {'train': find(path, pattern), 'valid': find(valid_path, pattern)}
        else:
            self._files = {'all': find(path, pattern)}
        self._on_bad_utf8 = on_bad_utf8
        name = f'{kind}:{pathlib.Path(path).expanduser().name}'
        super().__init__(
            name, valid_fraction, one_document=one_document, own_valid=bool(valid_path)
        )

    def _read(self, part: str) -> Iterator[Document]:
        for name, path in self._files[part]:
            yield from self._read_file(name, path)

    def _read_file(self, name: str, path: pathlib.Path) -> Iterator[Document]:
        """Yields the documents of one file."""
        raise NotImplementedError

    def _decode(self, data: bytes, name: str) -> str | None:
        """Decodes bytes, or returns None after noting that they are not UTF-8.

        Raises:
          DataError: not UTF-8, under on_bad_utf8='error'.
        """
        try:
            return data.decode()
        except UnicodeDecodeError as e:
            self._bad_utf8(name, f'byte {e.start} is 0x{data[e.start]:02x}', e)
            return None

    def _encodable(self, text: str, name: str) -> bool:
        """Says whether a string can be written as UTF-8; JSON can hold half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            self._bad_utf8(name, f'character {e.start} is a lone surrogate', e)
            return False
        return True

    def _bad_utf8(self, name: str, why: str, error: UnicodeError) -> None:
        if self._on_bad_utf8 == 'error':
            raise DataError(
                f"{name} is not UTF-8 ({why}); convert it, or set data.on_bad_utf8='skip'."
            ) from error
        self._skip(name, f'not UTF-8: {why}')

    def _facts(self) -> dict[str, Any]:
        return {'files': sum(len(files) for files in self._files.values())}
