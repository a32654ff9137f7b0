"""The cache folder: tokenizers, prepared data. Files appear whole or not at all.

`~/.cache/effjax`, or `$EFFJAX_CACHE`. Every JSON file carries a checksum of its value, so that a
truncated or edited file counts as absent and is made again.
"""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from effjax.core.errors import DataError


def root() -> pathlib.Path:
    """Returns the cache folder, which need not exist yet."""
    return pathlib.Path(os.environ.get('EFFJAX_CACHE') or '~/.cache/effjax').expanduser()


def key(*parts: Any) -> str:
    """Returns a 32-digit key of JSON-able parts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file by a temporary name and a rename, so that readers never see half of it.

    Raises:
      DataError: the folder cannot be made or written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
        with os.fdopen(handle, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)
        raise DataError(
            f'cannot write the cache file {path} ({e.strerror}); set EFFJAX_CACHE to a folder '
            'that can be written.'
        ) from e


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON value with its checksum."""
    body = json.dumps(value)
    write_bytes(path, json.dumps({'checksum': _checksum(body), 'value': body}).encode())


def read_json(path: pathlib.Path) -> Any | None:
    """Returns the value of `write_json`, or None when the file is absent or damaged."""
    try:
        stored = json.loads(path.read_bytes())
        body = stored['value']
        return json.loads(body) if stored['checksum'] == _checksum(body) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(kind: str, identity: Any, compute: Callable[[], Any]) -> Any:
    """Returns the remembered JSON value of `compute()`, or computes and keeps it.

    Args:
      kind: a folder of the cache.
      identity: JSON-able; everything that the value depends on.
      compute: makes the value.
    """
    path = root() / kind / f'{key(identity)}.json'
    value = read_json(path)
    if value is None:
        value = compute()
        write_json(path, value)
    return value


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
