"""WordPiece: greedy likelihood merges, longest match first, round trips of normalised text."""

import itertools
import math
import random
from collections import Counter

import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data import tokenizers
from effjax.data.tokenizers.wordpiece_train import PREFIX, alphabet, learn


def build(texts, **arguments):
    return tokenizers.build({'kind': 'wordpiece', **arguments}, lambda: iter(texts))


@pytest.fixture(scope='module')
def texts():
    from effjax.data.sources.stdlib import Stdlib

    documents = Stdlib().documents('valid')
    return [document.text for document, _ in zip(documents, range(16), strict=False)]


@pytest.fixture(scope='module')
def tokenizer(texts):
    return build(texts[:10], vocab_size=900)


def test_special_tokens_come_first(tokenizer):
    assert tokenizer.pieces[:5] == ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    assert tokenizer.bos_id == tokenizer.special['[CLS]'] == 2
    assert tokenizer.vocab_size == 900 == len(set(tokenizer.pieces))


def test_round_trip_of_normalised_text(tokenizer, texts):
    for text in texts:
        words = tokenizer.words(text)
        ids = tokenizer.encode(text)
        assert ids.dtype == tokenizer.dtype
        if tokenizer.special['[UNK]'] not in ids:
            assert tokenizer.decode(ids) == tokenizer.normalize(text) == ' '.join(words)
    known = [t for t in texts[:10] if tokenizer.special['[UNK]'] not in tokenizer.encode(t)]
    assert len(known) >= 8  # the alphabet holds nearly all of the text it was made from


def test_round_trip_of_utf8_in_several_scripts():
    corpus = ['naïve café, Straße!', 'Привет мир', '東京 タワー', 'مرحبا', '😀 😀😀 x😀'] * 2
    tokenizer = build(corpus, vocab_size=90, min_frequency=1, lowercase=False)
    for text in corpus:
        ids = tokenizer.encode(text)
        assert tokenizer.special['[UNK]'] not in ids
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == tokenizer.normalize(text)


def test_lowercase_drops_case_and_accents():
    assert build(['ab'] * 2, vocab_size=10).normalize('Né,  B') == 'ne , b'
    tokenizer = build(['ab'] * 2, vocab_size=10, lowercase=False)
    assert tokenizer.normalize('Né,  B') == 'Né , B'


def longest_match(word, vocab):
    """The definition: from left to right, the longest piece that the vocabulary has."""
    pieces, start = [], 0
    while start < len(word):
        prefix = PREFIX if start else ''
        ends = range(len(word), start, -1)
        end = next((e for e in ends if prefix + word[start:e] in vocab), None)
        if end is None:
            return ['[UNK]']
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def test_greedy_longest_match_on_random_words(tokenizer):
    rng = random.Random(0)
    vocab = set(tokenizer.pieces)
    inside = [p.removeprefix(PREFIX) for p in tokenizer.pieces[5:] if p[-1].isalnum()]
    words = [''.join(rng.choices(inside, k=rng.randint(1, 4))) for _ in range(400)]
    words += [''.join(rng.choices('abcdeθxyz', k=rng.randint(1, 12))) for _ in range(400)]
    several = 0
    for word in words:
        pieces = [tokenizer.pieces[i] for i in tokenizer.encode(word)]
        assert pieces == longest_match(word, vocab)
        several += len(pieces) > 1
    assert several > 300


def log_likelihood(words):
    counts = Counter()
    for word, times in words.items():
        for piece in word:
            counts[piece] += times
    total = sum(counts.values())
    return sum(n * math.log(n / total) for n in counts.values())


def merged(words, pair):
    out = Counter()
    for word, times in words.items():
        new, i = [], 0
        while i < len(word):
            both = word[i : i + 2] == pair
            new.append(pair[0] + pair[1].removeprefix(PREFIX) if both else word[i])
            i += 1 + both
        out[tuple(new)] += times
    return out


def test_each_merge_raises_the_likelihood_most():
    rng = random.Random(3)
    # Words without a letter twice, in which a pair cannot overlap itself.
    counts = Counter(''.join(rng.sample('abcdefgh', rng.randint(2, 6))) for _ in range(150))
    learned = learn(counts, alphabet(counts, 100), 15, 1)
    words = {(w[0], *(PREFIX + c for c in w[1:])): n for w, n in counts.items()}
    for piece in learned:
        pairs = {p for word in words for p in itertools.pairwise(word)}
        gains = {p: log_likelihood(merged(words, p)) for p in pairs}
        best = max(gains.values())
        chosen = [p for p in pairs if p[0] + p[1].removeprefix(PREFIX) == piece]
        # The trainer sums the same logarithms in another order.
        pair = next(p for p in chosen if math.isclose(gains[p], best, rel_tol=1e-12))
        words = merged(words, pair)


def test_runs_of_one_letter_are_learned():
    counts = {'aaaa': 10, 'aaa': 5, 'ab': 1}
    learned = learn(counts, alphabet(counts, 10), 3, 1)
    assert len(learned) == 3
    assert all(set(piece.removeprefix(PREFIX)) <= {'a', 'b'} for piece in learned)


def test_training_does_not_depend_on_the_run(texts):
    one, two = (build(order, vocab_size=400) for order in (texts[:5], texts[4::-1]))
    assert one.pieces == two.pieces
    assert one.digest == two.digest


def test_vocab_file(tmp_path, tokenizer, texts):
    (tmp_path / 'vocab.txt').write_text('\n'.join(tokenizer.pieces) + '\n')
    for path in (tmp_path, tmp_path / 'vocab.txt'):
        loaded = build([], path=str(path))
        assert loaded.digest == tokenizer.digest
        assert (loaded.encode(texts[0]) == tokenizer.encode(texts[0])).all()


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match=r'vocab_size must be at least 7'):
        build(['abc'], vocab_size=3)
    with pytest.raises(DataError, match=r'its alphabet alone takes 11'):
        build(['abc'] * 2, vocab_size=8)
    with pytest.raises(DataError, match=r'only 13 WordPiece entries, not 500'):
        build(['abc'] * 2, vocab_size=500)
    with pytest.raises(DataError, match=r'no text to train'):
        build([''], vocab_size=100)
    with pytest.raises(DataError, match=r'cannot read the WordPiece vocabulary'):
        build([], path=str(tmp_path / 'vocab.txt'))
    (tmp_path / 'vocab.txt').write_text('[UNK]\na\n')
    with pytest.raises(DataError, match=r'vocab.txt has no \[CLS\]'):
        build([], path=str(tmp_path))
    (tmp_path / 'vocab.txt').write_text('[UNK]\n[CLS]\na\na\n')
    with pytest.raises(DataError, match=r'names a piece twice'):
        build([], path=str(tmp_path))
