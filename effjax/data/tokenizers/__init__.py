"""Tokenizers: text to ids and back.

A tokenizer is a class whose keyword-only arguments are its config; code gives it a `Training`, the
text it may learn from. It has

    kind, vocab_size, bos_id (document separator, None where there is none), dtype (of its ids)
    digest            changes whenever any text could be encoded otherwise
    encode_batch(texts) -> list of 1-D arrays, no separators added
    decode(ids) -> str

Byte-level ones (`byte`, `bpe`, `gpt2`) also have `encode_bytes` and `decode_bytes`, exact on any
bytes. Importing this package does not import the `tokenizers` library.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from effjax.core.registry import arguments, check_block
from effjax.data.tokenizers.base import Tokenizer, Training

TOKENIZERS = {
    'bpe': 'effjax.data.tokenizers.bpe:Bpe',
    'byte': 'effjax.data.tokenizers.simple:Byte',
    'char': 'effjax.data.tokenizers.simple:Char',
    'file': 'effjax.data.tokenizers.files:TokenizerFile',
    'gpt2': 'effjax.data.tokenizers.files:Gpt2',
    'wordpiece': 'effjax.data.tokenizers.wordpiece:WordPiece',
}

__all__ = ['TOKENIZERS', 'Tokenizer', 'Training', 'build', 'check']


def check(block: Any, path: str = 'config.data.tokenizer') -> None:
    """Checks a tokenizer block without building it.

    Raises:
      ConfigError: unknown kind, or arguments that do not fit.
    """
    check_block(TOKENIZERS, block, 'tokenizer', path)


def build(
    block: Mapping[str, Any],
    documents_for_training: Callable[[], Iterator[str]],
    cache_dir: str | pathlib.Path | None = None,
    digest: str = '',
) -> Tokenizer:
    """Builds a tokenizer, training it if it learns from text and is not in the cache.

    Args:
      block: dict(kind=..., arguments).
      documents_for_training: called at most twice; streams the training split's texts.
      cache_dir: where trained tokenizers are kept; None is effjax's cache folder.
      digest: the text's digest; '' keeps nothing in the cache.

    Raises:
      ConfigError: a block that does not fit.
      DataError: missing files, or text that the tokenizer cannot be made from.
    """
    component = check_block(TOKENIZERS, block, 'tokenizer', 'config.data.tokenizer')
    folder = pathlib.Path(cache_dir) if cache_dir is not None else None
    return component(Training(documents_for_training, folder, digest), **arguments(block))
