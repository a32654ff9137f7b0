"""Tokenizers that need no library: bytes, and characters."""

from collections.abc import Sequence

import numpy as np

from effjax.core.errors import DataError
from effjax.data.tokenizers.base import ByteLevel, Tokenizer, Training, digest_of


class Byte(ByteLevel):
    """One id a byte, and 256 between documents."""

    kind = 'byte'

    def __init__(self, training: Training):
        self.vocab_size = 257
        self.bos_id = 256
        self.digest = digest_of(self.kind)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def _byte_id(self, byte: int) -> int:
        return byte


class Char(Tokenizer):
    """One id a character of the training text, in code point order.

    A separator follows them where there is more than one document, so that a one-document corpus
    has exactly its own characters as vocabulary (65 for tiny Shakespeare, as in nanoGPT).
    """

    kind = 'char'

    def __init__(self, training: Training, *, unknown: bool = False):
        """Collects the characters.

        Args:
          training: the text whose characters are the vocabulary.
          unknown: adds an id for all characters that the training text has not; without it, they
            are an error.

        Raises:
          DataError: no text.
        """

        def collect() -> dict:
            found: set[str] = set()
            count = 0
            for text in training.documents():
                found |= set(text)
                count += 1
            return {'characters': ''.join(sorted(found)), 'documents': count}

        learned = training.remember(self.kind, {}, collect)
        self.characters: str = learned['characters']
        if not self.characters:
            raise DataError('there is no text to take characters from; give the source some.')
        size = len(self.characters)
        self.unknown_id = size if unknown else None
        size += unknown
        self.bos_id = size if learned['documents'] > 1 else None
        self.vocab_size = size + (self.bos_id is not None)
        self.digest = digest_of(self.kind, self.characters, self.unknown_id, self.bos_id)
        self._codes = np.array([ord(c) for c in self.characters], dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text.

        Raises:
          DataError: a character that the training text has not, unless `unknown`.
        """
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode('utf-32-le'), dtype='<u4')
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        missing = self._codes[ids] != codes
        if missing.any():
            if self.unknown_id is None:
                raise DataError(
                    f'the character {chr(codes[missing][0])!r} is not in the training text; set '
                    'tokenizer.unknown=True to give such characters an id.'
                )
            ids[missing] = self.unknown_id
        return ids.astype(self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text; unknown characters show as U+FFFD."""
        size = len(self.characters)
        ids = [int(i) for i in ids]
        shown = (self.characters[i] if i < size else '\ufffd' for i in ids if i != self.bos_id)
        return ''.join(shown)
