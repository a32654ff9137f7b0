"""A checksum for each file of a folder, written last, so that its presence says "complete".

Orbax restores a flipped byte in a small array silently, with wrong values. So every file of a
checkpoint is hashed right after it was written, and again before anything is read from it. The
list holds its own checksum and is compared with the only form it can have, so every byte counts.
"""

import hashlib
import json
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

from effjax.training.files import write_text_atomic

FILE = 'checksums.json'

# SHA-256, as most processors have instructions for it: twice as fast as BLAKE2 then.
# hashlib releases the GIL; more threads than this only take cores from the training step.
_THREADS = min(4, os.cpu_count() or 1)


def write(folder: pathlib.Path) -> None:
    """Hashes all files under `folder` and writes the list, atomically, as its `checksums.json`.

    Each file is flushed to the disk before, so that after a power failure a complete list means
    complete files.

    Raises:
      OSError: a file cannot be read or the list cannot be written.
    """
    paths = sorted(p for p in folder.rglob('*') if p.is_file() and p.name != FILE)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(lambda p: _describe(p, flush=True), paths))
    names = [p.relative_to(folder).as_posix() for p in paths]
    write_text_atomic(folder / FILE, _render(dict(zip(names, sums, strict=True))))


def problem(folder: pathlib.Path, *, contents: bool = True, under: str = '') -> str | None:
    """Returns what is wrong with the files under `folder`, or None when all are as written.

    Args:
      folder: what was given to `write`.
      contents: False compares sizes only, which is quick and misses changed bytes.
      under: checks only the files whose relative path starts with this.

    Returns:
      A phrase such as 'state/_METADATA: its checksum differs', or None.
    """
    try:
        text = (folder / FILE).read_text()
    except FileNotFoundError:
        return f'{FILE} is missing: the save was interrupted'
    except (OSError, ValueError) as e:
        return f'{FILE} cannot be read ({type(e).__name__})'
    files = _parse(text)
    if files is None:
        return f'{FILE} is damaged'

    def check(name: str) -> str | None:
        try:
            return _compare(folder / name, files[name], contents)
        except OSError as e:
            return f'cannot be read ({e.strerror or type(e).__name__})'

    names = [name for name in files if name.startswith(under)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, wrong in zip(names, pool.map(check, names), strict=True):
            if wrong:
                return f'{name}: {wrong}'
    return None


def _compare(path: pathlib.Path, expected: list, contents: bool) -> str | None:
    if not path.is_file():
        return 'is missing'
    size = path.stat().st_size
    if size != expected[0]:
        return f'has {size} bytes, expected {expected[0]}'
    if contents and _describe(path) != expected:
        return 'its checksum differs'
    return None


def _describe(path: pathlib.Path, flush: bool = False) -> list:
    """Returns [bytes, SHA-256 as hex] of a file."""
    with path.open('rb') as f:
        if flush:
            os.fsync(f.fileno())
        digest = hashlib.file_digest(f, 'sha256').hexdigest()
        return [f.tell(), digest]


def _render(files: dict[str, list]) -> str:
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({'files': files, 'list': own}, indent=1, sort_keys=True) + '\n'


def _parse(text: str) -> dict[str, list] | None:
    """Returns the list, or None where `text` is not exactly what `write` writes."""
    try:
        files = json.loads(text)['files']
        return files if _render(files) == text else None
    except (ValueError, KeyError, TypeError):
        return None
