"""Signatures: fixed values, unbiased, with the error of theory; bands and the choice of them."""

import numpy as np
import pytest

from effjax.core.errors import ConfigError
from effjax.data import order
from effjax.data.dedup import minhash

SEEDS = minhash.permutations(128)


def pairs_of_sets(jaccard: float, size: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """Returns `count` pairs of sets, [2, size] each, that share what makes this similarity."""
    shared = round(2 * size * jaccard / (1 + jaccard))
    numbers = order.hashed(np.arange(count * (2 * size - shared)), seed).reshape(count, -1)
    return [np.stack([row[:size], row[size - shared :]]) for row in numbers]


def test_values_are_fixed_for_ever():
    assert minhash.permutations(2).tolist() == [[2388489101, 3103504562], [614081705, 3929148992]]
    signature = minhash.sign(order.hashed(np.arange(100), 1), SEEDS)
    assert signature[:4].tolist() == [44505793, 47788105, 37304564, 47055266]
    assert minhash.band_keys(signature, 16, 8)[:2].tolist() == [
        18307402902444449319,
        2229791635415635723,
    ]


def test_sign_is_the_least_image():
    values = order.hashed(np.arange(70), 5)
    high = [int(v) >> 32 for v in values]
    expected = [min((int(a) * v + int(c)) % 2**32 for v in high) for a, c in SEEDS]
    signature = minhash.sign(values, SEEDS)
    assert signature.dtype == np.uint32
    assert signature.tolist() == expected
    assert minhash.sign(values[::-1].copy(), SEEDS).tolist() == expected


@pytest.mark.parametrize('size', [1, 4095, 4096, 4097, 9000])
def test_tiles_do_not_show(size):
    values = order.hashed(np.arange(size), 5)
    halves = [minhash.sign(part, SEEDS) for part in (values[: size // 2], values[size // 2 :])]
    np.testing.assert_array_equal(minhash.sign(values, SEEDS), np.minimum(*halves))


def test_many_are_as_one_by_one():
    draw = np.random.default_rng(0)
    sizes = [0, 5, 4096, 0, 1, 9000, *draw.integers(0, 700, 60), 0]
    sets = [order.hashed(np.arange(size), i) for i, size in enumerate(sizes)]
    found = minhash.sign_many(sets, SEEDS)
    assert found.shape == (len(sets), 128) and found.dtype == np.uint32
    for one, values in zip(found, sets, strict=True):
        images = SEEDS[:, :1] * (values >> np.uint64(32)).astype(np.uint32) + SEEDS[:, 1:]
        np.testing.assert_array_equal(one, images.min(axis=1, initial=0xFFFFFFFF))
    assert minhash.sign_many([], SEEDS).shape == (0, 128)
    assert (minhash.sign_many(sets[:1], SEEDS) == 0xFFFFFFFF).all()


def test_fewer_permutations_are_the_first_of_more():
    np.testing.assert_array_equal(minhash.permutations(10, 3), minhash.permutations(200, 3)[:10])
    assert not np.array_equal(minhash.permutations(10, 3), minhash.permutations(10, 4))
    assert (minhash.permutations(1000)[:, 0] % 2 == 1).all()


def test_the_empty_set_has_a_signature_of_ones():
    assert (minhash.sign(np.empty(0, np.uint64), SEEDS) == 0xFFFFFFFF).all()


@pytest.mark.parametrize('jaccard', [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize('size', [40, 600])
def test_the_estimate_is_unbiased_with_the_error_of_theory(jaccard, size):
    count = 500
    pairs = pairs_of_sets(jaccard, size, count)
    shared = np.intersect1d(*pairs[0]).size
    exact = shared / (2 * size - shared)
    found = [minhash.estimate(*(minhash.sign(s, SEEDS) for s in pair)) for pair in pairs]
    errors = np.array(found) - exact
    deviation = np.sqrt(exact * (1 - exact) / len(SEEDS))
    # The mean of n errors has deviation / sqrt(n), and their standard deviation is known to
    # about 1 / sqrt(2 n): five and four times those.
    assert abs(errors.mean()) < 5 * deviation / np.sqrt(count)
    assert abs(errors.std() / deviation - 1) < 4 / np.sqrt(2 * count)


def test_places_of_a_signature_are_independent_enough_for_bands():
    """The part of pairs that share a band, against the S-curve: rows that depend would break it."""
    count, size = 1500, 120
    for jaccard in (0.6, 0.75):
        pairs = np.array(pairs_of_sets(jaccard, size, count, seed=9))
        shared = np.intersect1d(*pairs[0]).size
        exact = shared / (2 * size - shared)
        signatures = np.array([[minhash.sign(s, SEEDS) for s in pair] for pair in pairs])
        for bands, rows in ((32, 4), (18, 7), (16, 8)):
            keys = minhash.band_keys(signatures, bands, rows)
            met = (keys[:, 0] == keys[:, 1]).any(axis=1).mean()
            expected = minhash.s_curve(exact, bands, rows)
            # Binomial; four standard deviations and what a whole number of pairs rounds off.
            error = np.sqrt(expected * (1 - expected) / count)
            assert abs(met - expected) < 4 * error + 1 / count, (jaccard, bands, rows)


def test_band_keys():
    signatures = order.hashed(np.arange(2 * 3 * 20), 2).astype(np.uint32).reshape(2, 3, 20)
    keys = minhash.band_keys(signatures, 4, 5)
    assert keys.shape == (2, 3, 4) and keys.dtype == np.uint64
    np.testing.assert_array_equal(minhash.band_keys(signatures[1, 2], 4, 5), keys[1, 2])
    # Rows beyond the last band do not count; the order of rows, and the band's number, do.
    np.testing.assert_array_equal(minhash.band_keys(signatures, 2, 5), keys[..., :2])
    ones = np.ones(20, np.uint32)
    assert np.unique(minhash.band_keys(ones, 4, 5)).size == 4
    swapped = signatures[0, 0].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert minhash.band_keys(swapped, 4, 5)[0] != keys[0, 0, 0]


def test_s_curve():
    assert minhash.s_curve(0.0, 20, 5) == 0
    assert minhash.s_curve(1.0, 20, 5) == 1
    assert minhash.s_curve(0.8, 20, 5) == pytest.approx(0.99964, abs=1e-5)  # the textbook's table
    assert minhash.s_curve(np.array([0.2, 0.5]), 20, 5) == pytest.approx([0.006, 0.470], abs=5e-4)


@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize('permutations', [16, 100, 128, 256])
def test_choose_has_the_most_rows_that_reach_the_recall(threshold, permutations):
    chosen = minhash.choose(threshold, permutations, 0.9)
    assert chosen.bands * chosen.rows + chosen.unused == permutations
    assert chosen.unused < chosen.rows
    assert minhash.s_curve(threshold, chosen.bands, chosen.rows) >= 0.9
    for rows in range(chosen.rows + 1, permutations + 1):
        assert minhash.s_curve(threshold, permutations // rows, rows) < 0.9


def test_the_default_choice():
    assert minhash.choose(0.8, 128) == minhash.Bands(18, 7, 2)
    assert minhash.s_curve(0.8, 18, 7) > 0.98


def test_bad_settings_say_so():
    with pytest.raises(ConfigError) as e:
        minhash.band_keys(np.zeros(128, np.uint32), 20, 7)
    assert str(e.value) == (
        '20 bands of 7 rows need 140 permutations, and there are 128; '
        'raise permutations, or lower bands or rows.'
    )
    with pytest.raises(ConfigError, match='bands and rows must be at least 1, got 0 and 3.'):
        minhash.check(0, 3, 128)
    with pytest.raises(ConfigError) as e:
        minhash.choose(0.05, 16, 0.99)
    assert str(e.value) == (
        'no bands of 16 permutations find a pair at Jaccard 0.05 with probability 0.99; '
        'raise permutations or threshold, or lower recall.'
    )
    with pytest.raises(ConfigError, match='threshold must be above 0 and at most 1, got 0.'):
        minhash.choose(0, 128)
    with pytest.raises(ConfigError, match='recall must be above 0 and below 1, got 1.'):
        minhash.choose(0.8, 128, 1)
    with pytest.raises(ConfigError, match='permutations must be at least 1, got 0.'):
        minhash.permutations(0)
    with pytest.raises(ConfigError, match='permutations must be at least 1, got -1.'):
        minhash.choose(0.8, -1)
