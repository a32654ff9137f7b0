"""WordPiece: BERT's subwords, longest match first.

Schuster and Nakajima, "Japanese and Korean Voice Search" (2012), for the vocabulary; Devlin et al.,
"BERT" (2019), for the split into words, the `##` of continuing pieces and the special tokens.
"""

import pathlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from effjax.core.errors import DataError
from effjax.data.tokenizers.base import (
    Tokenizer,
    Training,
    check_vocab_size,
    digest_of,
    too_large,
)
from effjax.data.tokenizers.wordpiece_train import PREFIX, alphabet, learn

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
MAX_CHARS = 100  # a longer word is unknown, as in BERT


class WordPiece(Tokenizer):
    """Words split into the longest pieces that the vocabulary has; `[CLS]` separates documents.

    Text is normalised first (control characters out, spaces unified, lower case without accents if
    `lowercase`), and punctuation stands alone. Decoding gives the normalised words with one space
    between them: `decode(encode(text)) == normalize(text)` where no word is unknown.

    Attributes:
      pieces: the vocabulary in the order of its ids.
      special: id of each special token that the vocabulary has.
    """

    kind = 'wordpiece'

    def __init__(
        self,
        training: Training,
        *,
        vocab_size: int = 8192,
        path: str = '',
        lowercase: bool = True,
        min_frequency: int = 2,
        max_alphabet: int = 1000,
        train_bytes: int = 4_000_000,
    ):
        """Trains, finds the trained one in the cache, or loads BERT's `vocab.txt`.

        Args:
          training: the text to learn from; not used with `path`.
          vocab_size: ids in all; not used with `path`.
          path: a `vocab.txt`, one piece a line, or the folder that holds it; '' trains.
          lowercase: whether text is lower-cased and loses its accents.
          min_frequency: words and pairs seen less often teach nothing.
          max_alphabet: only the most frequent characters; words with others become `[UNK]`.
          train_bytes: learn from at most so many bytes, a sample that depends on content only.

        Raises:
          ConfigError: a vocabulary smaller than the special tokens, or larger than ids allow.
          DataError: no text, too little for so many pieces, or a bad `vocab.txt`.
        """
        self._build_words(lowercase)
        if path:
            self.pieces = _load(path)
        else:
            check_vocab_size(vocab_size, len(SPECIAL) + 2, 'the special tokens and an alphabet')
            arguments = {
                'vocab_size': vocab_size,
                'lowercase': lowercase,
                'min_frequency': min_frequency,
                'max_alphabet': max_alphabet,
                'train_bytes': train_bytes,
            }

            def train() -> list[str]:
                counts = self._count(training.sample(train_bytes))
                return _train(counts, vocab_size, min_frequency, max_alphabet)

            self.pieces = training.remember(self.kind, arguments, train)
        self._finish(lowercase)

    def _build_words(self, lowercase: bool) -> None:
        import tokenizers

        self._normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
        self._splitter = tokenizers.pre_tokenizers.BertPreTokenizer()

    def _finish(self, lowercase: bool) -> None:
        import tokenizers

        ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.special = {name: ids[name] for name in SPECIAL if name in ids}
        self.bos_id = self.special['[CLS]']
        self.vocab_size = len(self.pieces)
        self.digest = digest_of(self.kind, self.pieces, lowercase)
        model = tokenizers.models.WordPiece(
            vocab=ids,
            unk_token='[UNK]',
            continuing_subword_prefix=PREFIX,
            max_input_chars_per_word=MAX_CHARS,
        )
        # Special tokens are not told to the library, which would find their names inside texts.
        self._library = tokenizers.Tokenizer(model)
        self._library.normalizer = self._normalizer
        self._library.pre_tokenizer = self._splitter

    def words(self, text: str) -> list[str]:
        """Returns the normalised words and punctuation marks of a text."""
        normal = self._normalizer.normalize_str(text)
        return [word for word, _ in self._splitter.pre_tokenize_str(normal)]

    def normalize(self, text: str) -> str:
        """Returns what decoding gives back: the words with one space between them."""
        return ' '.join(self.words(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        out: list[str] = []
        for i in ids:
            piece = self.pieces[int(i)]
            if int(i) == self.bos_id:
                continue
            if piece.startswith(PREFIX) and len(piece) > len(PREFIX) and out:
                out.append(piece.removeprefix(PREFIX))
            else:
                out += [' ', piece] if out else [piece]
        return ''.join(out)

    def _count(self, texts: list[str]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(self.words(text))
        return counts


def _train(
    counts: dict[str, int], vocab_size: int, min_frequency: int, max_alphabet: int
) -> list[str]:
    """Returns the special tokens, the alphabet, and the learned pieces.

    Raises:
      DataError: the words do not hold that many pieces.
    """
    letters = alphabet(counts, max_alphabet)
    known = {word: n for word, n in counts.items() if len(word) <= MAX_CHARS}
    room = vocab_size - len(SPECIAL) - len(letters)
    pieces = learn(known, letters, room, min_frequency) if room > 0 else []
    pieces = [*SPECIAL, *letters, *pieces]
    if len(pieces) != vocab_size:
        if room < 0:
            raise DataError(
                f'tokenizer.vocab_size {vocab_size} is too small for the text: its alphabet alone '
                f'takes {len(pieces)}; raise it, or lower tokenizer.max_alphabet.'
            )
        raise too_large('WordPiece', vocab_size, len(pieces))
    return pieces


def _load(path: str) -> list[str]:
    file = pathlib.Path(path).expanduser()
    file = file / 'vocab.txt' if file.is_dir() else file
    try:
        # Not splitlines: a vocabulary may hold other characters that Unicode calls line ends.
        pieces = file.read_text(encoding='utf-8').removesuffix('\n').split('\n')
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f'cannot read the WordPiece vocabulary {path!r} ({e}).') from e
    missing = [name for name in ('[UNK]', '[CLS]') if name not in pieces]
    if missing or len(set(pieces)) != len(pieces):
        what = f'has no {missing[0]}' if missing else 'names a piece twice'
        raise DataError(f'{file.name} {what}; give a vocab.txt with one piece a line.')
    return pieces
