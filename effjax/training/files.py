"""Small files that are either the old or the new version, never half of one."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def write_text_atomic(path: str | pathlib.Path, text: str) -> None:
    """Writes a text file through a temporary one beside it, flushed to the disk before the swap.

    Raises:
      OSError: the folder is missing, full or unwritable; the old file is then untouched.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('w', encoding='utf-8') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json_atomic(path: str | pathlib.Path, data: Any) -> None:
    """Writes `data` as indented JSON, atomically; see `plain` for what becomes of its values."""
    write_text_atomic(path, json.dumps(plain(data), indent=2, allow_nan=False) + '\n')


def plain(value: Any) -> Any:
    """Returns what strict JSON can hold.

    Arrays and NumPy scalars become numbers and lists, tuples become lists, paths become text, and
    numbers that are not finite become None: JSON has no NaN, and a null keeps every reader working.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, 'tolist'):  # NumPy and jax arrays and scalars
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f'{type(value).__name__} has no form in JSON: {value!r}.')
