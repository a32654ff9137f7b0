"""Byte-level byte-pair encoding: GPT-2's, trained on the run's own text.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); bytes and the
split into words are those of GPT-2 (Radford et al., 2019). The most frequent adjacent pair inside
words is merged, again and again; encoding replays the merges in their order.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from effjax.data.tokenizers.base import (
    ByteLevel,
    Training,
    check_vocab_size,
    digest_of,
    too_large,
)


def byte_symbols() -> list[str]:
    """Returns the printable character that stands for each byte in GPT-2's vocabulary files.

    Printable Latin-1 characters stand for themselves, the others for U+0100 and on, in order.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(0x100 + hidden.index(byte)) for byte in range(256)]


class MergeTable(ByteLevel):
    """A byte-level BPE with given merges.

    Attributes:
      merges: pairs of symbols, in the order in which they are replayed.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], bos_id: int):
        """Builds the encoder.

        Args:
          vocab: symbol -> id; `byte_symbols` are all in it.
          merges: pairs of symbols.
          bos_id: the separator's id: one in `vocab` that no text encodes to, or the next.
        """
        import tokenizers

        self.merges = [(left, right) for left, right in merges]
        self.bos_id = bos_id
        self.vocab_size = max(len(vocab), bos_id + 1)
        self.digest = digest_of(vocab, self.merges, bos_id)
        # The separator is not told to the library, which would find its name inside texts.
        self._library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=self.merges))
        self._library.pre_tokenizer = _words()
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        self._single = [vocab[symbol] for symbol in byte_of]
        self._bytes = [b''] * self.vocab_size
        for symbol, index in vocab.items():
            if index != bos_id:
                self._bytes[index] = bytes(byte_of[c] for c in symbol)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return b''.join(self._bytes[int(i)] for i in ids)

    def _byte_id(self, byte: int) -> int:
        return self._single[byte]


class Bpe(MergeTable):
    """Byte-level BPE trained on the run's text; the last id separates documents."""

    kind = 'bpe'

    def __init__(
        self,
        training: Training,
        *,
        vocab_size: int = 4096,
        min_frequency: int = 2,
        train_bytes: int = 16_000_000,
    ):
        """Trains, or finds the trained one in the cache.

        Args:
          training: the text to learn from.
          vocab_size: ids in all: 256 bytes, the merges, the separator.
          min_frequency: a pair seen less often is not merged.
          train_bytes: learn from at most so many bytes, a sample that depends on content only.

        Raises:
          ConfigError: a vocabulary smaller than the bytes, or larger than ids allow.
          DataError: no text, or too little for so many merges.
        """
        check_vocab_size(vocab_size, 257, '256 bytes and a separator')
        arguments = {
            'vocab_size': vocab_size,
            'min_frequency': min_frequency,
            'train_bytes': train_bytes,
        }
        learned = training.remember(
            self.kind,
            arguments,
            lambda: _train(training.sample(train_bytes), vocab_size - 1, min_frequency),
        )
        super().__init__(learned['vocab'], learned['merges'], bos_id=vocab_size - 1)


def _words() -> Any:
    """Returns GPT-2's split into words (with the space before them), shown as byte symbols."""
    import tokenizers

    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _train(texts: list[str], size: int, min_frequency: int) -> dict[str, Any]:
    """Returns `vocab` (symbol -> id) of exactly `size` symbols, and `merges`.

    Raises:
      DataError: the text does not hold that many pairs.
    """
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = _words()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=byte_symbols(),
        show_progress=False,
        special_tokens=[],
    )
    library.train_from_iterator(texts, trainer)
    model = json.loads(library.to_str())['model']
    if len(model['vocab']) < size:
        raise too_large('BPE', size + 1, len(model['vocab']) + 1)
    return {'vocab': model['vocab'], 'merges': [list(pair) for pair in model['merges']]}
