"""Parquet files: one document a row."""

import pathlib
from collections.abc import Iterator

from effjax.core.errors import DataError
from effjax.core.registry import suggest
from effjax.data.documents import Document
from effjax.data.sources.files import BadUtf8, FileSource, optional

ROWS = 256  # rows decoded at a time


class Parquet(FileSource):
    """Parquet files, one text column; only that column is read."""

    def __init__(
        self,
        *,
        path: str,
        text_key: str = 'text',
        valid_path: str = '',
        pattern: str = '**/*.parquet',
        valid_fraction: float = 0.05,
        on_bad_utf8: BadUtf8 = 'error',
    ):
        """Finds the files.

        Args:
          path: a file, a folder, or a glob.
          text_key: the column that holds the text (a string or binary column).
          valid_path: held-out rows of their own; '' holds out a part of `path` by content.
          pattern: which files of a folder count.
          valid_fraction: held-out part of the documents.
          on_bad_utf8: 'error' stops at text that is not UTF-8; 'skip' leaves it out and counts.

        Raises:
          ConfigError: a bad argument.
          DataError: nothing there, or no `pyarrow`.
        """
        optional('pyarrow.parquet', 'reading parquet')
        super().__init__('parquet', path, valid_path, pattern, valid_fraction, on_bad_utf8)
        self._text_key = text_key

    def _read_file(self, name: str, path: pathlib.Path) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._check_column(file.schema_arrow, name)
                row = 0
                for batch in file.iter_batches(ROWS, columns=[self._text_key]):
                    # As bytes: a string column may hold what is not UTF-8.
                    for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        row += 1
                        yield from self._document(f'{name}:{row}', value)
        except pyarrow.ArrowException as e:
            first = str(e).splitlines()[0]
            raise DataError(f'{name} is not a whole parquet file ({first}); get a new copy.') from e

    def _document(self, where: str, value: bytes | None) -> Iterator[Document]:
        if value is None:
            self._skip(where, 'null')
            return
        text = self._decode(value, where)
        if text is not None:
            yield Document(where, text, self.name)

    def _check_column(self, schema, name: str) -> None:
        import pyarrow

        if self._text_key not in schema.names:
            raise DataError(
                f'{name} has no column {self._text_key!r}; it has {", ".join(schema.names)}.'
                + suggest(self._text_key, schema.names)
                + ' Set data.text_key.'
            )
        kind = schema.field(self._text_key).type
        if not any(
            check(kind)
            for check in (
                pyarrow.types.is_string,
                pyarrow.types.is_large_string,
                pyarrow.types.is_binary,
                pyarrow.types.is_large_binary,
            )
        ):
            raise DataError(f'{name}: column {self._text_key!r} holds {kind}, not text.')
