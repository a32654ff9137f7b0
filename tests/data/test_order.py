"""Hashes, permutations and the choice of a source: pure, even, without memory."""

from collections import Counter

import numpy as np
import pytest

from effjax.data import order


@pytest.mark.parametrize('size', [*range(1, 20), 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size):
    image = order.permute(np.arange(size), size, order.fold('key', size))
    assert image.dtype == np.int64
    assert sorted(image.tolist()) == list(range(size))


def test_permute_asks_for_any_part_of_it_in_any_shape():
    whole = order.permute(np.arange(1000), 1000, 7)
    np.testing.assert_array_equal(order.permute(np.arange(990, 1000), 1000, 7), whole[990:])
    assert order.permute(np.array([[1, 2], [3, 4]]), 1000, 7).shape == (2, 2)
    assert order.permute(np.arange(0), 1000, 7).shape == (0,)


def test_permute_reaches_every_permutation_about_equally_often():
    seen = Counter(
        tuple(order.permute(np.arange(4), 4, order.fold(k)).tolist()) for k in range(2400)
    )
    # 24 permutations, 100 each on average; five standard deviations of a fair draw are 49.
    assert len(seen) == 24
    assert min(seen.values()) >= 51 and max(seen.values()) <= 149


def test_a_huge_permutation_costs_nothing():
    image = order.permute(np.arange(100), 10**15, 3)
    assert len(set(image.tolist())) == 100
    assert image.min() >= 0 and image.max() < 10**15


def test_values_are_fixed_for_ever():
    # A change of these numbers changes the order of data under every checkpoint.
    assert order.fold('a', 1) == order.fold('a', 1) != order.fold('a', '1')
    assert order.fold('train', 3) == 13293961492659037747
    # The first outputs of splitmix64 from seed 0, as published with its source.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert order.hashed(np.arange(1, 4), 0).tolist() == published
    assert order.permute(np.arange(6), 6, 1).tolist() == [4, 2, 1, 3, 5, 0]


def test_draw_is_uniform():
    drawn = order.draw(np.arange(20000), 10, 3)
    # Binomial with mean 2000 and standard deviation 42.
    assert np.abs(np.bincount(drawn, minlength=10) - 2000).max() < 5 * 42


@pytest.mark.parametrize('shares', [[0.5, 0.5], [1 / 3] * 3, [0.7, 0.2, 0.1], [0.001, 0.999]])
def test_choose_meets_shares_over_any_stretch(shares):
    chosen = order.choose(np.arange(200_000), shares, 12345)
    for source, share in enumerate(shares):
        off = np.concatenate([[0], np.cumsum((chosen == source) - share)])
        # The largest deviation over all stretches is the range of the running deviation.
        assert off.max() - off.min() <= 8


def test_choose_is_a_function_of_the_index_alone():
    whole = order.choose(np.arange(1000), [0.3, 0.7], 9)
    np.testing.assert_array_equal(order.choose(np.arange(500, 600), [0.3, 0.7], 9), whole[500:600])
    assert order.choose(np.arange(5), [1.0], 9).tolist() == [0] * 5
    assert not order.choose(np.arange(1000), [1.0, 0.0], 9).any()
