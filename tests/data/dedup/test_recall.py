"""Recall and precision on the standard library with planted edits, against exact similarities.

The ground truth is an inverted index (how many shingles every two documents share);
the expected recall of a pair is the S-curve at its own exact similarity, so that the only error
left is that of counting: sqrt(p (1 - p) / n) for n pairs.
"""

import random
import re

import numpy as np
import pytest
from scipy.sparse import csr_array

from effjax.data.dedup import Settings, clusters, minhash, near_duplicates, shingles, shingling
from effjax.data.dedup.near import cluster_texts, prepare
from effjax.data.documents import Document

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
SEEDS = minhash.permutations(128)


def exact_jaccard(sets: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pairs that share a shingle, int64 [K, 2], and their J, by an inverted index."""
    sizes = np.array([s.size for s in sets])
    _, column = np.unique(np.concatenate(sets), return_inverse=True)
    index = csr_array((np.ones(column.size, np.int32), column, np.r_[0, np.cumsum(sizes)]))
    shared = (index @ index.T).tocoo()
    above = shared.row < shared.col
    pairs = np.stack([shared.row[above], shared.col[above]], axis=1).astype(np.int64)
    counts = shared.data[above]
    return pairs, counts / (sizes[pairs].sum(axis=1) - counts)


def sharing(signatures: np.ndarray, pairs: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Says which pairs, [K, 2], of signatures, [N, P], share a band: bool [K]."""
    keys = minhash.band_keys(signatures, bands, rows)
    return (keys[pairs[:, 0]] == keys[pairs[:, 1]]).any(axis=1)


def passages(library: dict[str, str], words: int, count: int) -> list[list[str]]:
    """Cuts the library into passages of this many words, overlapping; returns some."""
    cut = []
    for text in library.values():
        found = re.findall(r'\w+', text)
        cut += [found[at : at + words] for at in range(0, len(found) - words, words // 3)]
    return random.Random(0).sample(cut, min(count, len(cut)))


def planted(library, edit, words: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns signatures [N, P] and the J of rows 2k and 2k + 1, float64 [N / 2]."""
    draw = random.Random(1)
    signatures, exact = [], []
    for passage in passages(library, words, count):
        one = shingles(' '.join(passage))
        for level in LEVELS:
            other = shingles(' '.join(edit(passage, level, draw)))
            shared = np.intersect1d(one, other).size
            signatures += [minhash.sign(one, SEEDS), minhash.sign(other, SEEDS)]
            exact.append(shared / (one.size + other.size - shared))
    return np.array(signatures), np.array(exact)


def recall(signatures, exact, bands: int, rows: int) -> list[tuple[float, float, float]]:
    """Returns for each level what part was found, what was to be expected, and its error."""
    found = sharing(signatures, np.arange(len(signatures)).reshape(-1, 2), bands, rows)
    out = []
    for k in range(len(LEVELS)):
        p = minhash.s_curve(exact[k :: len(LEVELS)], bands, rows)
        error = np.sqrt((p * (1 - p)).sum()) / p.size  # of the mean of unequal coins
        out.append((found[k :: len(LEVELS)].mean(), p.mean(), error))
    return out


def test_planted_edits_have_about_the_similarity_asked_for(few):
    """So that every level is tested on hundreds of pairs."""
    _, exact = few
    for k, level in enumerate(LEVELS):
        assert np.abs(exact[k :: len(LEVELS)] - level).mean() < 0.05


@pytest.fixture(scope='module')
def few(library, edit):
    return planted(library, edit, 120, 400)


@pytest.mark.parametrize(('bands', 'rows'), [(18, 7), (16, 8), (32, 4), (9, 13)])
def test_recall_is_that_of_the_s_curve(few, bands, rows):
    """400 pairs a level, so that one level alone is known to 2.5 points or better."""
    signatures, exact = few
    levels = recall(signatures, exact, bands, rows)
    for found, expected, error in levels:
        # Four standard errors; and one pair where nearly all or none are expected.
        assert abs(found - expected) < 4 * error + 2.5e-3
    # All levels together: known to .7 points at worst, so that two points are three errors.
    off = np.mean([found - expected for found, expected, _ in levels])
    assert abs(off) < 0.02
    found = sharing(signatures, np.arange(len(signatures)).reshape(-1, 2), bands, rows)
    if minhash.s_curve(0.8, bands, rows) > 0.98:
        assert found[exact >= 0.8].mean() >= 0.95


@pytest.mark.ci
def test_recall_within_two_points_at_every_level(library, edit):
    """8000 pairs a level: an error of at most .56 points, so that two points are over three."""
    signatures, exact = planted(library, edit, 100, 8000)
    assert len(exact) == 8000 * len(LEVELS)
    for bands, rows in ((18, 7), (16, 8), (32, 4)):
        for found, expected, error in recall(signatures, exact, bands, rows):
            assert abs(found - expected) < 0.02
            assert error < 0.0056


def test_default_recall_and_precision_on_the_library(library, edit):
    """Whole files and edits of them, every pair's similarity known: what a user gets."""
    draw = random.Random(4)
    documents = [Document(name, text, 'library') for name, text in library.items()]
    for name, text in library.items():
        tokens = re.split(r'(\w+)', text)  # every other one is a word
        level = draw.choice([0.7, 0.8, 0.85, 0.9, 0.95])
        tokens[1::2] = edit(tokens[1::2], level, draw)
        documents.append(Document(f'{name}+{level}', ''.join(tokens), 'planted'))
    settings = Settings()
    part = prepare(documents, settings)
    texts = [part.texts[d] for d in sorted(part.texts)]
    pairs, exact = exact_jaccard([t.shingles for t in texts])
    alike = exact >= settings.threshold
    assert np.count_nonzero(alike) > 100

    keys = np.array([t.keys for t in texts])
    met = (keys[pairs[:, 0]] == keys[pairs[:, 1]]).any(axis=1)
    assert met[alike].mean() >= 0.95

    roots, counts = cluster_texts(texts, settings)
    joined = roots[pairs[:, 0]] == roots[pairs[:, 1]]
    assert joined[alike].mean() >= 0.95
    # Precision: whatever is joined is joined by exact pairs that reach the threshold.
    truth = clusters.components(len(texts), pairs[alike])
    np.testing.assert_array_equal(truth[roots], truth)
    assert counts['large_buckets'] == 0


def test_a_lower_threshold_removes_more(library):
    documents = [Document(name, text, 'library') for name, text in library.items()]
    kept = [
        near_duplicates(documents, Settings(threshold=t)).counts['kept'] for t in (0.9, 0.6, 0.4)
    ]
    assert kept[0] > kept[1] > kept[2]


def test_the_exact_truth_itself(library):
    """The inverted index agrees with sets of Python's own tuples of words: no hash collisions."""
    some = list(library.values())[:40]
    sets = [shingles(text) for text in some]
    words = [text.encode().translate(_only_words()).split() for text in some]
    grams = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in words]
    pairs, exact = exact_jaccard(sets)
    compared = 0
    for (a, b), j in zip(pairs.tolist(), exact.tolist(), strict=True):
        if some[a].isascii() and some[b].isascii() and min(len(grams[a]), len(grams[b])):
            shared = len(grams[a] & grams[b])
            assert j == shared / (len(grams[a]) + len(grams[b]) - shared)
            compared += 1
    assert compared > 100
    assert max(len(w) for ws in words for w in ws) < shingling.LONGEST


def _only_words() -> bytes:
    return bytes(i if (chr(i).isalnum() and i < 128) or i == 95 else 32 for i in range(256))
