"""`Document`, and the base of every text source: one pass over the text, split by content.

A subclass implements `_read(part)`; splitting, empty and skipped documents, counts and digests
are the same for all.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar

from effjax.core.errors import DataError
from effjax.data import split as splitting

SHOWN = 20  # skipped ids that `describe` lists by name; the count is always complete


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
      id: names it inside its source, such as a path relative to the folder; the same everywhere.
      text: its content; encoded in UTF-8 it is the file's own bytes.
      source: the source's name.
    """

    id: str
    text: str
    source: str


class DocumentSource:
    """Base of the text sources.

    Attributes:
      name: short name of the source.
      one_document: True when the source is one long document, split by position.
      splits: ('train', 'valid'), or ('train',) when `valid_fraction` is 0.
    """

    modality: ClassVar[str] = 'text'

    def __init__(
        self,
        name: str,
        valid_fraction: float,
        *,
        one_document: bool = False,
        own_valid: bool = False,
    ):
        """Sets what all text sources share.

        Args:
          name: short name of the source.
          valid_fraction: held-out part, in [0, 1).
          one_document: split by position, not by document.
          own_valid: the source reads a held-out part of its own, as `_read('valid')`.

        Raises:
          ConfigError: `valid_fraction` is not in [0, 1).
        """
        self.name = name
        self.valid_fraction = float(valid_fraction)
        self.one_document = one_document
        self.splits = splitting.names(valid_fraction, own_valid)
        self._own_valid = own_valid
        self._skipped: dict[str, str] = {}
        self._empty: set[str] = set()
        self._described: dict[str, Any] | None = None

    def _read(self, part: str) -> Iterator[Document]:
        """Yields every document, in a fixed order.

        Args:
          part: 'train' or 'valid' where the source holds out a part of its own, else 'all'.
        """
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        """Returns what `describe` shows of this source only."""
        return {}

    def documents(self, split: str) -> Iterator[Document]:
        """Streams the documents of a split, always in the same order.

        Raises:
          DataError: no such split, or a split without a document.
        """
        splitting.check(split, self.splits, self.name)
        return self._stream(split)

    def describe(self) -> dict[str, Any]:
        """Returns counts, bytes, skipped documents and digests; reads everything once.

        `digest` changes when the content of either split changes; `corpus_digest` does not depend
        on where the source was split.
        """
        if self._described is None:
            self._described = self._describe()
        return dict(self._described)

    def _stream(self, split: str) -> Iterator[Document]:
        found = False
        for _, document in self._labelled((split,)):
            found = True
            yield document
        if not found:
            raise DataError(self._nothing(split))

    def _nothing(self, split: str) -> str:
        if split == 'valid' and not self._own_valid:
            return (
                f'the held-out split of source {self.name!r} is empty: valid_fraction '
                f'{self.valid_fraction} selects none of its documents; raise it or give more text.'
            )
        skipped = f' ({len(self._skipped)} skipped)' if self._skipped else ''
        return f'source {self.name!r} has no text in its split {split!r}{skipped}; give it some.'

    def _labelled(self, wanted: tuple[str, ...]) -> Iterator[tuple[str, Document]]:
        """Yields (split, document) for the wanted splits."""
        if self.one_document:
            yield from self._by_position(wanted)
        elif self._own_valid:
            yield from self._by_part(wanted)
        else:
            for document in self._clean('all'):
                split = splitting.by_content(document.text.encode(), self.valid_fraction)
                if split in wanted:
                    yield split, document

    def _by_part(self, wanted: tuple[str, ...]) -> Iterator[tuple[str, Document]]:
        held_out = set()
        for document in self._clean('valid'):
            held_out.add(splitting.digest(document.text.encode()))
            if 'valid' in wanted:
                yield 'valid', document
        if 'train' in wanted:
            for document in self._clean('train'):
                # A dataset's own splits may share documents: training gives way.
                if splitting.digest(document.text.encode()) in held_out:
                    self._skip(document.id, 'also in the held-out split')
                else:
                    yield 'train', document

    def _by_position(self, wanted: tuple[str, ...]) -> Iterator[tuple[str, Document]]:
        if self._own_valid:
            parts = {p: ''.join(d.text for d in self._clean(p)) for p in wanted}
        else:
            text = ''.join(d.text for d in self._clean('all'))
            train, valid = splitting.by_position(text, self.valid_fraction)
            parts = {'train': train, 'valid': valid}
        for split in wanted:
            if parts[split]:
                yield split, Document(f'{self.name}#{split}', parts[split], self.name)

    def _clean(self, part: str) -> Iterator[Document]:
        for document in self._read(part):
            if document.text:
                yield document
            else:
                self._empty.add(document.id)

    def _skip(self, document_id: str, why: str) -> None:
        """Notes that a document was left out; reading it again notes it once."""
        self._skipped[document_id] = why

    def _describe(self) -> dict[str, Any]:
        counts = {s: {'documents': 0, 'bytes': 0} for s in self.splits}
        hashes = {s: hashlib.blake2b(digest_size=16) for s in self.splits}
        corpus = hashlib.blake2b(digest_size=16)
        for split, document in self._labelled(self.splits):
            data = document.text.encode()
            counts[split]['documents'] += 1
            counts[split]['bytes'] += len(data)
            content = data if self.one_document else splitting.digest(data)
            hashes[split].update(content)
            corpus.update(content)
        for split in self.splits:
            if not counts[split]['documents']:
                raise DataError(self._nothing(split))
        both = hashlib.blake2b(digest_size=16)
        for split in self.splits:
            both.update(split.encode() + hashes[split].digest())
        return {
            'source': self.name,
            'modality': self.modality,
            **self._facts(),
            'documents': sum(c['documents'] for c in counts.values()),
            'bytes': sum(c['bytes'] for c in counts.values()),
            **counts,
            'one_document': self.one_document,
            'valid_fraction': self.valid_fraction,
            'empty': len(self._empty),
            'skipped': len(self._skipped),
            'skipped_ids': dict(sorted(self._skipped.items())[:SHOWN]),
            'digest': both.hexdigest(),
            'corpus_digest': corpus.hexdigest(),
        }
