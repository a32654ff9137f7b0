"""What counts as the same text: Unicode, white space, bytes that are no text, lines, paragraphs."""

import random
import re
import sys
import tracemalloc
import unicodedata

import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data.dedup import normalisation
from effjax.data.dedup.normalisation import decode, document_digest, normalise, piece_digests


def test_digests_are_fixed_for_ever():
    # Another Python, machine or release must find the duplicates of what this one wrote.
    assert document_digest('').hex() == 'cae66941d9efbd404e4d88758ea67670'
    assert document_digest('hello  world\n').hex() == document_digest('hello world').hex()
    assert document_digest('hello world').hex() == 'e9a804b2e527fd3601d2ffc0bb023cd6'


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('café', 'cafe\u0301'),
        ('각', '\u1100\u1161\u11a8'),  # a Hangul syllable and its letters
        ('Å', '\u212b'),  # the sign for angstrom
        ('\ufeffhello', 'hello'),
        (' \ufeff\ufeffhello \ufeffyou', 'hello you'),
        ('a\u00a0b', 'a b'),
        ('a\u3000\u2028b', 'a b'),
        ('  a\r\n\tb  ', 'a b'),
        ('', ' \n\t '),
        ('שלום  עולם', 'שלום\nעולם'),
        ('a\ud800b', 'a\ufffdb'),
    ],
)
def test_the_same_text(one, other):
    assert normalise(one) == normalise(other)
    assert document_digest(one) == document_digest(other)


@pytest.mark.parametrize(('one', 'other'), [('a b', 'ab'), ('A', 'a'), ('ﬁ', 'fi'), ('①', '1')])
def test_not_the_same_text(one, other):
    """Case matters by default; compatibility forms (NFKC) always do."""
    assert document_digest(one) != document_digest(other)


def test_case_folds_where_asked():
    assert normalise('STRASSE', fold_case=True) == normalise('straße', fold_case=True)
    assert normalise('ΣΊΣΥΦΟΣ', fold_case=True) == normalise('σίσυφος', fold_case=True)
    # Folding decomposes this one; composed again, folding twice changes nothing.
    for text in ('ᾳ\u0345', 'ΐ', 'İ', 'ŉ', 'Ǆ'):
        once = normalise(text, fold_case=True)
        assert normalise(once, fold_case=True) == once
        assert unicodedata.is_normalized('NFC', once)


def test_ascii_takes_a_short_cut_to_the_same():
    text = ''.join(map(chr, range(128)))
    assert normalisation.canonical(text, True) == unicodedata.normalize('NFC', text.casefold())


@pytest.mark.parametrize('block', [1, 2, 3, 7, 1000])
def test_blocks_do_not_show(block, monkeypatch):
    text = '  one\n\n two   three\t' + ' ' * 20 + 'four\u3000five é ' + '\n' * 9
    monkeypatch.setattr(normalisation, '_BLOCK', block)
    assert normalise(text) == ' '.join(text.split()) == re.sub(r'\s+', ' ', text).strip()
    assert normalise(' ' * 50) == normalise('') == ''


@pytest.mark.parametrize('block', [1, 2, 5, 1000])
def test_composition_in_blocks_is_that_of_the_whole(block, monkeypatch):
    draw = random.Random(block)
    marks = 'ae \n\u0301\u0327\u0323\u1100\u1161\u11a8é각\u212b\u0344字'
    monkeypatch.setattr(normalisation, '_BLOCK', block)
    for _ in range(300):
        text = ''.join(draw.choices(marks, k=draw.randint(0, 60)))
        assert normalisation.canonical(text) == unicodedata.normalize('NFC', text)


def test_an_enormous_document_that_is_to_be_composed_takes_a_few_times_its_bytes():
    text = 'cafe\u0301 ' * 400_000
    tracemalloc.start()
    composed = normalisation.canonical(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert composed == 'café ' * 400_000
    # Python holds two bytes a character of the input; one of the output, and its blocks.
    assert peak < 3 * len(text.encode()) + 64 * 2**18


@pytest.mark.parametrize('fold_case', [False, True])
def test_the_form_of_a_form_is_itself(fold_case):
    for number in range(0x30000):  # beyond are only tags and characters of private use
        once = normalisation.canonical(chr(number), fold_case)
        assert once.isascii() or normalisation.canonical(once, fold_case) == once
    draw = random.Random(0)
    some = [' ', '\n', '\ufeff', 'A', 'α', '\u0345', '\u0301', '\u0327', 'ß', '\ud800', '\u1e9e']
    for _ in range(500):
        once = normalise(''.join(draw.choices(some, k=12)), fold_case)
        assert normalise(once, fold_case) == once


def test_the_size_is_of_the_normalised_form():
    assert normalisation.measure('  é  \n x ')[1] == len('é x'.encode())


def test_decode():
    assert decode('né'.encode()) == 'né'
    assert decode(b'a\xffb\xe2\x82') == 'a\ufffdb\ufffd'  # one for a cut-off character
    with pytest.raises(DataError) as e:
        decode(b'abc\xff', invalid='refuse')
    assert str(e.value) == (
        "not UTF-8 at byte 3 (0xff); convert the text, or set invalid='replace'."
    )
    with pytest.raises(ConfigError, match="invalid must be 'replace' or 'refuse', got 'ignore'."):
        decode(b'', invalid='ignore')


def test_pieces():
    text = '\n\none\ntwo \n \t\n\nthree\n'
    spans, digests = piece_digests(text, 'paragraph')
    assert [text[a:b] for a, b in spans] == ['one\ntwo ', 'three\n']
    assert digests == [document_digest('one two'), document_digest('three')]
    spans, digests = piece_digests(text, 'line')
    assert [text[a:b] for a, b in spans] == ['one', 'two ', 'three']
    assert digests[1] == document_digest('two')
    for nothing in ('', ' \n\n '):
        spans, digests = piece_digests(nothing)
        assert spans.shape == (0, 2) and digests == []
    with pytest.raises(ConfigError, match="pieces are by line or paragraph, got 'word'."):
        piece_digests('', 'word')


def test_paragraphs_of_a_text_of_line_feeds_take_no_square_time():
    assert piece_digests('\n \t' * 200_000)[1] == []


def test_a_text_of_the_rarest_characters():
    text = ''.join(map(chr, [0, 0xFFFE, 0xFFFF, sys.maxunicode]))
    assert normalise(text) == text
