"""Local text files: one document a file, or one long document."""

import pathlib
from collections.abc import Iterator

from effjax.data.documents import Document
from effjax.data.sources.files import BadUtf8, FileSource, chunks


class TextFiles(FileSource):
    """Text files (`.gz` and `.zst` too); a single file is one document, split by position."""

    def __init__(
        self,
        *,
        path: str,
        valid_path: str = '',
        pattern: str = '**/*.txt',
        one_document: bool | None = None,
        valid_fraction: float = 0.05,
        on_bad_utf8: BadUtf8 = 'error',
    ):
        """Finds the files.

        Args:
          path: a file, a folder, or a glob.
          valid_path: held-out text of its own, the same way; '' holds out a part of `path`.
          pattern: which files of a folder count.
          one_document: True joins all files, in order of name, into one document whose last
            `valid_fraction` of characters is held out. None does so for a single file.
          valid_fraction: held-out part; of the documents by content, or of the one document.
          on_bad_utf8: 'error' stops at a file that is not UTF-8; 'skip' leaves it out and counts.

        Raises:
          ConfigError: a bad argument.
          DataError: nothing there.
        """
        if one_document is None:
            one_document = pathlib.Path(path).expanduser().is_file()
        super().__init__(
            'text', path, valid_path, pattern, valid_fraction, on_bad_utf8, one_document
        )

    def _read_file(self, name: str, path: pathlib.Path) -> Iterator[Document]:
        text = self._decode(b''.join(chunks(path)), name)
        if text is not None:
            yield Document(name, text, self.name)
