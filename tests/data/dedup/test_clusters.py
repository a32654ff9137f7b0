"""Components against SciPy's, for any order of the edges; and which document is kept."""

import time

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from effjax.data.dedup import clusters


def expected_components(n: int, pairs: np.ndarray) -> np.ndarray:
    graph = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(n, n))
    labels = connected_components(graph, directed=False)[1]
    smallest = np.full(labels.max() + 1, n)
    np.minimum.at(smallest, labels, np.arange(n))
    return smallest[labels]


@pytest.mark.parametrize('edges', [0, 10, 60, 100, 400])
def test_as_scipy_and_in_any_order(edges):
    draw = np.random.default_rng(edges)
    pairs = draw.integers(100, size=(edges, 2))
    found = clusters.components(100, pairs)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected_components(100, pairs))
    other = draw.permutation(pairs)[:, ::-1]
    np.testing.assert_array_equal(clusters.components(100, other), found)
    forest = clusters.Forest(100)
    for batch in np.array_split(other, 7):  # and in batches
        forest.join(batch)
    np.testing.assert_array_equal(forest.roots, found)


def shapes(n: int) -> dict[str, np.ndarray]:
    numbers, shuffled = np.arange(n), np.random.default_rng(0).permutation(n)
    return {
        'path': np.stack([numbers[:-1], numbers[1:]], axis=1),
        'shuffled path': np.stack([shuffled[:-1], shuffled[1:]], axis=1),
        'star from the largest': np.stack([numbers[:-1], np.full(n - 1, n - 1)], axis=1),
        'comb': np.stack([numbers[1:], numbers[1:] // 2], axis=1),
        'mirrored': np.stack([numbers, n - 1 - numbers], axis=1),
    }


@pytest.mark.parametrize('shape', shapes(2))
def test_awkward_shapes_are_near_linear(shape):
    n = 100_000
    pairs = shapes(n)[shape]
    started = time.process_time()
    found = clusters.components(n, pairs)
    assert time.process_time() - started < 2  # a tenth of a second; quadratic would be hours
    np.testing.assert_array_equal(found, expected_components(n, pairs))


def test_apart():
    forest = clusters.Forest(4)
    pairs = np.array([[0, 1], [1, 2], [2, 3]])
    assert forest.apart(pairs).tolist() == [True] * 3
    forest.join(np.array([[2, 1]]))
    assert forest.apart(pairs).tolist() == [True, False, True]


def test_keepers():
    cluster = np.array([5, 0, 5, 0, 5, 9])
    rank = np.array([1, 0, 0, 0, 0, 7])
    size = np.array([0, 3, 2, 2, 2, 1])
    assert clusters.keepers(cluster, rank, size, np.arange(6)).tolist() == [2, 3, 2, 3, 2, 5]
    assert clusters.keepers(cluster, rank, size, -np.arange(6)).tolist() == [4, 3, 4, 3, 4, 5]
    assert clusters.keepers(np.empty(0, np.int64), np.empty(0)).tolist() == []
