"""Tokenizers that were trained elsewhere: GPT-2's two files, or a `tokenizer.json`."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from effjax.core.errors import ConfigError, DataError
from effjax.core.registry import suggest
from effjax.data.tokenizers.base import Tokenizer, Training, digest_of
from effjax.data.tokenizers.bpe import MergeTable, byte_symbols

# Names under which well-known tokenizers keep what starts or separates documents.
_SEPARATORS = ('<|endoftext|>', '<|begin_of_text|>', '<bos>', '<s>', '[CLS]', '</s>', '<eos>')


class Gpt2(MergeTable):
    """GPT-2's byte-level BPE, from `encoder.json` and `vocab.bpe` (50257 ids)."""

    kind = 'gpt2'

    def __init__(
        self,
        training: Training,
        *,
        path: str,
        vocab: str = 'encoder.json',
        merges: str = 'vocab.bpe',
    ):
        """Reads the files.

        Args:
          training: not used; the files hold everything.
          path: the folder that holds both files.
          vocab: name of the JSON file of symbols and ids.
          merges: name of the file of merges, one pair a line.

        Raises:
          DataError: a missing file, or one that is not what it should be.
        """
        folder = pathlib.Path(path).expanduser()
        try:
            table = json.loads(_read(folder / vocab))
        except json.JSONDecodeError as e:
            raise DataError(f'{vocab} is not JSON ({e}); get a new copy of the file.') from e
        lines = _read(folder / merges).split('\n')
        pairs = [_pair(line) for line in lines if line and not line.startswith('#version')]
        # Symbols are ids' names, and every merge joins two of them into a third.
        used = {*byte_symbols(), '<|endoftext|>'}.union(
            *((left, right, left + right) for left, right in pairs)
        )
        if not isinstance(table, dict) or not used.issubset(table):
            raise DataError(f"{vocab} and {merges} do not fit each other, or are not GPT-2's.")
        super().__init__(table, pairs, bos_id=table['<|endoftext|>'])


class TokenizerFile(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library (as on the Hugging Face hub)."""

    kind = 'file'

    def __init__(self, training: Training, *, path: str, bos: str = ''):
        """Reads the file.

        Args:
          training: not used; the file holds everything.
          path: the file, or the folder that holds `tokenizer.json`.
          bos: the token that separates documents; '' takes the first known name that the file
            has ('<|endoftext|>', '<s>', '[CLS]', ...), or else adds an id after the last.

        Raises:
          ConfigError: the file has no such token.
          DataError: a missing file, or one that the library cannot read.
        """
        import tokenizers

        file = pathlib.Path(path).expanduser()
        file = file / 'tokenizer.json' if file.is_dir() else file
        text = _read(file)
        try:
            self._library = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the library raises a bare Exception
            raise DataError(f'{file.name} is not a tokenizer.json ({e}).') from e
        # Padding and truncation belong to batches, and a special token's name inside a text is
        # text.
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True
        vocab = self._library.get_vocab(with_added_tokens=True)
        if bos and bos not in vocab:
            raise ConfigError(f'{file.name} has no token {bos!r}.' + suggest(bos, vocab))
        known = [bos] if bos else [name for name in _SEPARATORS if name in vocab]
        size = max(vocab.values()) + 1
        self.bos_id = vocab[known[0]] if known else size
        self.vocab_size = max(size, self.bos_id + 1)
        self.digest = digest_of(self.kind, json.loads(text), self.bos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        kept = [int(i) for i in ids if int(i) != self.bos_id]
        return self._library.decode(kept, skip_special_tokens=False)


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.partition(' ')
    return left, right


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except FileNotFoundError as e:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f'no tokenizer file {str(path)!r}.' + suggest(path.name, near)) from e
    except OSError as e:
        raise DataError(f'cannot read the tokenizer file {path.name} ({e.strerror}).') from e
    except UnicodeDecodeError as e:
        raise DataError(f'the tokenizer file {path.name} is not UTF-8 text.') from e
