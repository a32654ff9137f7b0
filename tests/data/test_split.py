"""The held-out split: by content alone, disjoint, of the right size."""

import random

import numpy as np
import pytest

from effjax.data import split


def contents(n: int) -> list[bytes]:
    return [f'document {i}'.encode() for i in range(n)]


def test_split_by_content_has_the_fraction_asked_for():
    n, fraction = 20_000, 0.05
    valid = sum(split.by_content(c, fraction) == 'valid' for c in contents(n))
    # Binomial: standard deviation 31 documents; five of them.
    assert abs(valid - n * fraction) < 5 * 31


def test_split_by_content_does_not_depend_on_the_others():
    documents = contents(500)
    before = {c: split.by_content(c, 0.1) for c in documents}
    random.Random(0).shuffle(documents)
    assert all(split.by_content(c, 0.1) == before[c] for c in documents[:100])


def test_a_larger_fraction_only_moves_train_to_valid():
    for content in contents(500):
        if split.by_content(content, 0.05) == 'valid':
            assert split.by_content(content, 0.2) == 'valid'


@pytest.mark.parametrize('fraction', [0.0, 0.3])
def test_indices_cover_everything_once(fraction):
    digests = [split.digest(c) for c in contents(300)]
    train, valid = (split.indices(digests, s, fraction) for s in ('train', 'valid'))
    assert sorted([*train, *valid]) == list(range(300))
    assert (len(valid) == 0) == (fraction == 0)
    assert np.all(np.diff(train) > 0)


def test_fraction_of_is_below_one():
    assert split.fraction_of(b'\xff' * 16) < 1.0
    assert split.fraction_of(b'\x00' * 16) == 0.0


def test_by_position_cuts_as_nanogpt_does():
    text = 'x' * 1_115_394  # tiny Shakespeare's length; nanoGPT trains on the first 1003854
    train, valid = split.by_position(text, 0.1)
    assert (len(train), len(valid)) == (1_003_854, 111_540)
