"""Shingles against a slow implementation of the same definition, and by their properties."""

import random
import re
import tracemalloc

import numpy as np
import pytest

from effjax.core.errors import ConfigError
from effjax.data.dedup import hashing, scripts, shingles, shingling, verify
from effjax.data.dedup.normalisation import canonical, normalise

MASK = (1 << 64) - 1


def slow_mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def slow_word(word: str) -> int:
    data = word.encode()
    h = len(data) * 0x9E3779B97F4A7C15 & MASK
    for at in range(0, len(data), 8):
        h = slow_mix(h ^ int.from_bytes(data[at : at + 8], 'little'))
    return h


def slow_words(text: str) -> list[str]:
    out, run = [], ''
    for c in canonical(text):
        kind = scripts.classes()[ord(c)]
        if kind == scripts.WORD and len(run) < 256:
            run += c
            continue
        out += [run] if run else []
        run = c if kind == scripts.WORD else ''
        out += [c] if kind == scripts.ALONE else []
    return [*out, run] if run else out


def slow_shingles(text: str, n: int) -> list[int]:
    hashes = [slow_word(w) for w in slow_words(text)]
    if 0 < len(hashes) < n:
        hashes[0] ^= 0x5851F42D4C957F2D + len(hashes)
        n = len(hashes)
    found = set()
    for at in range(len(hashes) - n + 1 if hashes else 0):
        total = 0
        for h in hashes[at : at + n]:
            total = total * 0xD1342543DE82EF9B + h & MASK
        found.add(slow_mix(total))
    return sorted(found)


TEXTS = [
    '',
    ' .,;!? \n',
    'word',
    'one two three four',
    'one two three four five',
    'def f(x, *, y=3):\n    return x_1 + y  # a comment of more than eight bytes\n' * 3,
    'naïve café — “quoted” text, 3½ pages; Ελληνικά и русский',
    '我們在這裡寫一些中文。然後 English words 混在一起！',
    'ภาษาไทยไม่มีช่องว่าง',
    '👩‍👩‍👧 🎉🎉 emoji 👍🏽 too',
    'שלום עולם, \u200fזה טקסט مرحبا بالعالم، هذا نص',
    'x' * 255 + ' ' + 'y' * 256 + ' ' + 'z' * 257 + ' ' + 'é' * 1000 + ' w',
    'lone \ud800 surrogate, \ufffd replaced',
    '한국어 문장은 띄어쓰기가 있다 그래서 낱말로 센다',
]


@pytest.mark.parametrize('text', TEXTS)
@pytest.mark.parametrize('n', [1, 2, 5])
def test_as_the_slow_implementation(text, n):
    found = shingles(text, n)
    assert found.dtype == np.uint64
    assert found.tolist() == slow_shingles(text, n)


@pytest.mark.parametrize('block', [257, 300, 1000])
def test_blocks_do_not_show(block, monkeypatch):
    text = ' '.join(TEXTS) + 'q' * 3000 + '字' * 700 + ' '.join(reversed(TEXTS))
    words, chars = shingles(text, 3), shingles(text, 9, 'chars')
    assert words.tolist() == slow_shingles(text, 3)
    monkeypatch.setattr(shingling, '_BLOCK', block)
    monkeypatch.setattr(hashing, '_BLOCK', 64)
    np.testing.assert_array_equal(shingles(text, 3), words)
    np.testing.assert_array_equal(shingles(text, 9, 'chars'), chars)


@pytest.mark.parametrize('block', [257, 2000, 1 << 17])
@pytest.mark.parametrize('n', [1, 5])
def test_many_are_as_one_by_one(block, n, monkeypatch):
    draw = random.Random(block)
    texts = draw.choices([*TEXTS, *(' '.join(TEXTS[i : i + 3]) for i in range(9))], k=80)
    texts += ['', '', 'last'] + ['\ufeff' + TEXTS[5], 'é' * 5000]
    monkeypatch.setattr(shingling, '_BLOCK', block)
    found = shingling.shingle_many(texts, n)
    assert len(found) == len(texts)
    for text, one in zip(texts, found, strict=True):
        assert one.tolist() == slow_shingles(text, n)
    assert shingling.shingle_many([], n) == []
    for few in (['', ''], ['a b', ' '], ['', 'a b c d e f', '']):
        found = shingling.shingle_many(few, n)
        assert [f.tolist() for f in found] == [slow_shingles(text, n) for text in few]


def test_many_take_the_same_arguments():
    texts = ['One two three, four', 'ONE TWO three four', 'x']
    for arguments in ((2, 'chars', False), (2, 'words', True)):
        found = shingling.shingle_many(texts, *arguments)
        assert [f.tolist() for f in found] == [shingles(t, *arguments).tolist() for t in texts]
    with pytest.raises(ConfigError, match='a shingle has at least 1 of the words, got 0.'):
        shingling.shingle_many(texts, 0)


def test_values_are_fixed_for_ever():
    # Signatures made by another machine or release are compared with these.
    assert shingling.word_hashes('hello world 世界').tolist() == [
        11815562974981961486,
        1548138240658353795,
        8034950732748685522,
        2647916497136369886,
    ]
    assert shingles('the quick brown fox jumps over').tolist() == [
        13259656477407790097,
        15372220994745216691,
    ]
    assert shingles('短い文', 2, 'chars').tolist() == [3257881716983063729, 8479145372952450394]


def test_no_words_no_shingles_and_few_words_one():
    assert shingles('').size == shingles(' \n').size == shingles('?!…—。').size == 0
    assert shingles('', 3, 'chars').size == 0
    few = [shingles(t)[0] for t in ('a', 'a b', 'a b c', 'b a', 'a b c d', 'a b c d e')]
    assert len(set(few)) == 6
    assert shingles('a b c').size == 1


def test_punctuation_and_space_only_separate():
    assert shingles('a,b.c  d-e').tolist() == shingles('a b c d e').tolist()
    assert shingles('"a" (b) c… “d” — e。').tolist() == shingles('a b c d e').tolist()
    assert shingles('ab').tolist() != shingles('a b').tolist()


def test_every_space_of_python_separates():
    """So that texts of one normalised form have the same shingles."""
    spaces = [c for c in map(chr, range(0x110000)) if c.isspace()]
    assert len(spaces) >= 25
    assert all(scripts.classes()[ord(c)] == scripts.SEPARATOR for c in spaces)
    for text in TEXTS:
        for fold in (False, True):
            spaced = text.replace(' ', '\u2003\n')
            same = shingles(normalise(spaced, fold), fold_case=fold).tolist()
            assert shingles(spaced, fold_case=fold).tolist() == same


def test_a_document_in_two_forms_of_unicode():
    assert shingles('un café là-bas').tolist() == shingles('un cafe\u0301 la\u0300-bas').tolist()
    assert shingles('ÜBER', fold_case=True).tolist() == shingles('über', fold_case=True).tolist()


def test_scripts_without_spaces_are_compared_by_character():
    draw = random.Random(0)
    text = ''.join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(400))
    edited = text[:200] + '改' + text[201:]
    j = verify.jaccard(shingles(text), shingles(edited))
    assert j == pytest.approx(391 / 401)  # one character of 400 is in five of 396 n-grams
    # A sentence of another script beside it is shingled as it is alone.
    alone = 'and five more English words'
    assert verify.containment(shingles(alone), shingles(text + alone)) == 1.0


def test_characters_where_asked():
    found = shingles('ab, cd', 2, 'chars')
    assert found.tolist() == shingles('a b c d', 2, 'chars').tolist()
    assert found.size == 3


def test_no_collisions_and_well_mixed():
    words = np.array([f'w{i}' for i in range(200_000)])
    found = shingling.word_hashes(' '.join(words.tolist()))
    assert np.unique(found).size == found.size
    grams = shingles(' '.join(words.tolist()))
    assert grams.size == words.size - 4
    # Each bit is set in half of them: standard deviation 224 of 200000; five of them.
    for bit in range(64):
        ones = int((grams >> np.uint64(bit) & np.uint64(1)).sum())
        assert abs(ones - grams.size / 2) < 5 * 224


def test_order_and_repetition_of_words_matter():
    kinds = ['a a a b b', 'a a b a b', 'b a a a b', 'a b a b a', 'b b a a a', 'a a a a b']
    assert len({shingles(k)[0] for k in kinds}) == len(kinds)


def test_an_enormous_document_takes_a_few_times_its_bytes():
    draw = random.Random(0)
    words = [''.join(draw.choices('abcdefghij', k=draw.randint(2, 9))) for _ in range(5000)]
    text = ' '.join(draw.choices(words, k=300_000)) + '\n'
    text *= 20_000_000 // len(text) + 1
    text += 'k' * 1_000_000  # and a word that never ends
    assert len(text) > 20_000_000
    tracemalloc.start()
    found = shingles(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Three times 8 bytes a word of 6.5 characters with its space, and blocks of a few MB.
    assert peak < 5 * len(text)
    assert 250_000 < found.size < 310_000


@pytest.mark.parametrize('text', ['A' * 3_000_000, '字' * 1_000_000, '\n' * 3_000_000])
def test_an_enormous_document_without_words_as_others_have_them(text):
    tracemalloc.start()
    found = shingles(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.size <= 2
    assert peak < 10 * len(text.encode()) + 2**24


def test_bad_arguments():
    with pytest.raises(ConfigError, match="shingles are of words or chars, got 'bytes'."):
        shingles('', kind='bytes')
    with pytest.raises(ConfigError, match='a shingle has at least 1 of the words, got 0.'):
        shingles('', 0)


def test_word_characters_of_ascii():
    table = bytes(scripts.byte_classes()[:128])
    assert {chr(i) for i in range(128) if table[i]} == set(
        re.findall(r'\w', ''.join(map(chr, range(128))))
    )
