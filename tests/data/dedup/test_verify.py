"""Exact similarities against Python's sets."""

import numpy as np
import pytest

from effjax.data.dedup import verify


def random_sets(count: int, seed: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(0, 40, count)
    return [np.unique(draw.integers(60, size=s).astype(np.uint64) << np.uint64(58)) for s in sizes]


@pytest.mark.parametrize('seed', range(3))
def test_as_python_sets(seed):
    sets = random_sets(40, seed)
    for a in sets:
        for b in sets:
            one, other = set(a.tolist()), set(b.tolist())
            union = len(one | other)
            assert verify.common(a, b) == len(one & other)
            assert verify.jaccard(a, b) == (len(one & other) / union if union else 0)
            assert verify.containment(a, b) == (len(one & other) / len(one) if one else 0)


@pytest.mark.parametrize('threshold', [0.1, 0.25, 1 / 3, 0.5, 0.8, 1.0])
def test_many_pairs_as_one_by_one(threshold):
    sets = random_sets(60, 7)
    pairs = np.array([(a, b) for a in range(60) for b in range(60)])
    found = verify.similar(sets, pairs, threshold)
    expected = [verify.jaccard(sets[a], sets[b]) >= threshold for a, b in pairs]
    assert found.dtype == bool
    assert found.tolist() == expected
    assert verify.similar(sets, pairs[:0], threshold).tolist() == []


def test_right_at_the_threshold():
    a, b = np.arange(9, dtype=np.uint64), np.arange(1, 10, dtype=np.uint64)
    assert verify.jaccard(a, b) == 0.8
    assert verify.similar([a, b], np.array([[0, 1]]), 0.8).tolist() == [True]
    part = np.arange(4, dtype=np.uint64)
    whole = np.arange(5, dtype=np.uint64)
    # The bound by sizes alone is the similarity itself here.
    assert verify.similar([part, whole], np.array([[0, 1]]), 0.8).tolist() == [True]


def test_largest_values():
    top = np.array([0, 2**64 - 1], np.uint64)
    assert verify.jaccard(top, top) == 1.0
    assert verify.common(top, np.array([2**64 - 2], np.uint64)) == 0
