"""Candidate pairs against all pairs of every bucket, in any order of the input."""

import itertools

import numpy as np
import pytest

from effjax.data.dedup import candidates, clusters


def random_keys(n: int, kinds: int, bands: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    keys = draw.integers(kinds, size=(n, bands)) * bands + np.arange(bands)
    return keys.astype(np.uint64).ravel(), np.repeat(np.arange(n), bands)


def slow_pairs(keys, documents, centres: int) -> set[tuple[int, int]]:
    out = set()
    for key in set(keys.tolist()):
        members = sorted(set(documents[keys == key].tolist()))
        out |= {(a, b) for i, a in enumerate(members[:centres]) for b in members[i + 1 :]}
    return out


@pytest.mark.parametrize('centres', [1, 2, 5, 1000])
@pytest.mark.parametrize('kinds', [3, 40, 5000])
def test_each_of_the_first_members_meets_all_others(centres, kinds):
    keys, documents = random_keys(120, kinds, 3)
    found = candidates.pairs(keys, documents, centres)
    assert found.dtype == np.int64
    assert {tuple(p) for p in found.tolist()} == slow_pairs(keys, documents, centres)
    assert len(np.unique(found, axis=0)) == len(found)
    assert (found[:, 0] < found[:, 1]).all()


def test_small_buckets_give_all_pairs():
    keys, documents = np.zeros(6, np.uint64), np.arange(6)
    found = candidates.pairs(keys, documents, 5).tolist()
    assert found == [list(p) for p in itertools.combinations(range(6), 2)]


def test_order_and_repetition_do_not_matter():
    keys, documents = random_keys(200, 30, 4)
    expected = candidates.pairs(keys, documents, 3)
    order = np.random.default_rng(1).permutation(np.r_[np.arange(keys.size), np.arange(50)])
    np.testing.assert_array_equal(candidates.pairs(keys[order], documents[order], 3), expected)


def test_rounds_are_by_centre_and_end():
    keys, documents = np.array([7, 7, 7, 9, 9, 8], np.uint64), np.array([2, 0, 5, 0, 2, 1])
    found = [r.tolist() for r in candidates.rounds(candidates.buckets(keys, documents), 64)]
    assert found == [[[0, 2], [0, 5]], [[2, 5]]]


def test_nothing_in_common():
    for count in (0, 1, 5):
        keys = np.arange(count, dtype=np.uint64)
        groups = candidates.buckets(keys, np.arange(count))
        assert groups.sizes.size == 0
        assert candidates.pairs(keys, np.arange(count), 3).shape == (0, 2)


def test_a_star_would_lose_what_its_centre_is_not_similar_to():
    """Documents 1 and 2 are similar, and share their only bucket with a smaller stranger."""
    keys, documents = np.zeros(3, np.uint64), np.arange(3)
    similar = {(1, 2)}

    def joined(centres: int) -> list[int]:
        found = candidates.pairs(keys, documents, centres)
        kept = np.array([p for p in found.tolist() if tuple(p) in similar], np.int64)
        return clusters.components(3, kept.reshape(-1, 2)).tolist()

    assert joined(1) == [0, 1, 2]
    assert joined(2) == [0, 1, 1]


def test_pairs_already_connected_need_no_verification():
    """Skipping them, as the reference does, leaves the components what they are."""
    draw = np.random.default_rng(3)
    for seed in range(20):
        keys, documents = random_keys(60, 12, 3, seed)
        similar = draw.random((60, 60)) < 0.1
        everything = candidates.pairs(keys, documents, 60)
        expected = clusters.components(60, everything[similar[tuple(everything.T)]])
        forest, seen = clusters.Forest(60), set()
        for pairs in candidates.rounds(candidates.buckets(keys, documents), 60):
            pairs = pairs[forest.apart(pairs)]
            seen |= {tuple(p) for p in pairs.tolist()}
            forest.join(pairs[similar[tuple(pairs.T)]])
        np.testing.assert_array_equal(forest.roots, expected)
        assert seen <= {tuple(p) for p in everything.tolist()}
