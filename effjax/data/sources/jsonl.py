"""JSON lines: one object a line, one document an object."""

import codecs
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from effjax.core.errors import ConfigError, DataError
from effjax.core.registry import suggest
from effjax.data.documents import Document
from effjax.data.sources.files import BadUtf8, FileSource, lines


class Jsonl(FileSource):
    """`.jsonl`, `.jsonl.gz` and `.jsonl.zst` files."""

    def __init__(
        self,
        *,
        path: str,
        text_key: str = 'text',
        id_key: str = '',
        valid_path: str = '',
        pattern: str = '**/*.jsonl*',
        valid_fraction: float = 0.05,
        on_bad_utf8: BadUtf8 = 'error',
        on_bad_line: Literal['skip', 'error'] = 'error',
    ):
        """Finds the files.

        Args:
          path: a file, a folder, or a glob.
          text_key: the key that holds the text.
          id_key: the key that holds a document's id; '' uses file and line number.
          valid_path: held-out lines of their own; '' holds out a part of `path` by content.
          pattern: which files of a folder count.
          valid_fraction: held-out part of the documents.
          on_bad_utf8: 'error' stops at text that is not UTF-8; 'skip' leaves it out and counts.
          on_bad_line: the same for a line that is not a JSON object.

        Raises:
          ConfigError: a bad argument.
          DataError: nothing there.
        """
        if on_bad_line not in ('skip', 'error'):
            raise ConfigError(f"on_bad_line must be 'skip' or 'error', got {on_bad_line!r}.")
        super().__init__('jsonl', path, valid_path, pattern, valid_fraction, on_bad_utf8)
        self._text_key = text_key
        self._id_key = id_key
        self._on_bad_line = on_bad_line

    def _read_file(self, name: str, path: pathlib.Path) -> Iterator[Document]:
        for number, data in enumerate(lines(path), start=1):
            where = f'{name}:{number}'
            if number == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            line = self._decode(data, where)
            if line is None or not line.strip():
                continue
            row = self._parse(line, where)
            if row is None:
                continue
            text = self._value(row, self._text_key, where)
            if not isinstance(text, str):
                raise DataError(
                    f'{where}: {self._text_key!r} must be text, got {type(text).__name__}.'
                )
            if self._encodable(text, where):
                given = self._value(row, self._id_key, where) if self._id_key else where
                yield Document(str(given), text, self.name)

    def _parse(self, line: str, where: str) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
            why = '' if isinstance(row, dict) else f'a {type(row).__name__}, not an object'
        except ValueError as e:
            row, why = None, str(e)
        if not why:
            return row
        if self._on_bad_line == 'error':
            raise DataError(
                f"{where} is not a JSON object ({why}); mend it, or set data.on_bad_line='skip'."
            )
        self._skip(where, f'not a JSON object: {why}')
        return None

    def _value(self, row: dict[str, Any], key: str, where: str) -> Any:
        if key not in row:
            raise DataError(
                f'{where} has no key {key!r}; it has {", ".join(map(repr, row)) or "none"}.'
                + suggest(key, row)
                + ' Set data.text_key or data.id_key.'
            )
        return row[key]
