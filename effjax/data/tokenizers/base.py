"""What all tokenizers share: the base class, the training text, and the cache of trained ones."""

import abc
import dataclasses
import hashlib
import heapq
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from effjax.core.errors import ConfigError, DataError
from effjax.data import cache
from effjax.data.split import digest as content_digest

FORMAT = 1  # raised when a tokenizer trains otherwise than before: old cached ones then count not
MAX_VOCAB = 2**31  # ids become int32 on the device


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      kind: its name in `TOKENIZERS`.
      vocab_size: number of ids.
      bos_id: the id that separates documents, or None.
      digest: changes whenever any text could be encoded otherwise.
    """

    kind: str
    vocab_size: int
    bos_id: int | None
    digest: str

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, 1-D arrays of `dtype`, without separators."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; separators decode to nothing."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of one text."""
        return self.encode_batch([text])[0]

    def describe(self) -> dict[str, Any]:
        """Returns what a run records of its tokenizer."""
        return {
            'kind': self.kind,
            'vocab_size': self.vocab_size,
            'bos_id': self.bos_id,
            'digest': self.digest,
        }


class ByteLevel(Tokenizer):
    """A tokenizer with an id for every byte: exact on any bytes, UTF-8 or not."""

    @abc.abstractmethod
    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the bytes of ids; separators decode to nothing."""

    @abc.abstractmethod
    def _byte_id(self, byte: int) -> int:
        """Returns the id that stands for one byte."""

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Returns the ids of any bytes; those that are not UTF-8 get the ids of single bytes."""
        ids: list[int] = []
        while data:
            try:
                text, bad, data = data.decode(), b'', b''
            except UnicodeDecodeError as e:
                text, bad, data = data[: e.start].decode(), data[e.start : e.end], data[e.end :]
            ids += self.encode(text).tolist() if text else []
            ids += [self._byte_id(byte) for byte in bad]
        return np.array(ids, dtype=self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode(errors='replace')


@dataclasses.dataclass(frozen=True)
class Training:
    """The text that a tokenizer may learn from, and where to keep what it learned.

    Attributes:
      documents: streams the training texts, the same each time.
      folder: the cache folder; None is effjax's own.
      digest: the text's digest; '' keeps nothing.
    """

    documents: Callable[[], Iterator[str]]
    folder: pathlib.Path | None = None
    digest: str = ''

    def remember(self, kind: str, arguments: dict[str, Any], train: Callable[[], Any]) -> Any:
        """Returns the JSON value of `train()`, from the cache if it is there and whole."""
        if not self.digest:
            return train()
        folder = self.folder if self.folder is not None else cache.root()
        name = f'{kind}-{cache.key(FORMAT, kind, arguments, self.digest)}.json'
        value = cache.read_json(folder / 'tokenizers' / name)
        if value is None:
            value = train()
            cache.write_json(folder / 'tokenizers' / name, value)
        return value

    def sample(self, max_bytes: int) -> list[str]:
        """Returns all documents, or a sample of at most `max_bytes` that does not depend on order.

        Documents are taken by ascending digest until the next would not fit, so one pass and
        `max_bytes` of memory are enough. A document longer than `max_bytes` is cut.

        Raises:
          DataError: no text.
        """
        heap: list[tuple[bytes, str, int]] = []  # digests inverted: the largest comes off first
        least = bytes(16)  # of the inverted digests that came off, the greatest: all below stay out
        total = 0
        for text in self.documents():
            data = text.encode()[:max_bytes]
            inverted = bytes(255 - b for b in content_digest(data))
            if inverted <= least:
                continue
            heapq.heappush(heap, (inverted, data.decode(errors='ignore'), len(data)))
            total += len(data)
            while total > max_bytes:
                least, _, size = heapq.heappop(heap)
                total -= size
        if not any(text for _, text, _ in heap):
            raise DataError('there is no text to train the tokenizer on; give the source some.')
        return [text for _, text, _ in sorted(heap, reverse=True)]


def check_vocab_size(vocab_size: int, least: int, why: str) -> None:
    """Checks a vocabulary size.

    Raises:
      ConfigError: smaller than `least` (for the reason `why`), or more than ids allow.
    """
    if vocab_size < least:
        raise ConfigError(
            f'tokenizer.vocab_size must be at least {least} ({why}), got {vocab_size}.'
        )
    if vocab_size > MAX_VOCAB:
        raise ConfigError(
            f'tokenizer.vocab_size {vocab_size} is more than ids allow ({MAX_VOCAB}).'
        )


def too_large(kind: str, asked: int, reached: int) -> DataError:
    """Returns the error for a vocabulary that the training text cannot fill."""
    return DataError(
        f'the training text gives only {reached} {kind} entries, not {asked}; set '
        f'tokenizer.vocab_size to at most {reached}, or give more text.'
    )


def digest_of(*parts: Any) -> str:
    """Returns a 32-digit digest of JSON-able parts."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
