"""The loader: order kept, waiting measured, errors told, threads ended."""

import threading
import time

import numpy as np
import pytest

from effjax.core.errors import DataError
from effjax.data.loader import Loader


class Counting:
    """A sampler of its own position; may be slow or fail."""

    batch_size = 4

    def __init__(self, fail_at=None, error=None, seconds=0.0):
        self.fail_at, self.error, self.seconds = fail_at, error, seconds
        self.made = 0

    def initial(self):
        return {'sample': 0}

    def batch(self, position, rows=None):
        time.sleep(self.seconds)
        if position['sample'] == self.fail_at:
            raise self.error
        self.made += 1
        every = np.arange(position['sample'], position['sample'] + 4)
        return {'tokens': every[rows if rows is not None else slice(None)]}

    def advance(self, position):
        return {'sample': position['sample'] + 4}

    def describe(self, position):
        return []


def loader_threads():
    return [t for t in threading.enumerate() if t.name == 'effjax-loader']


@pytest.mark.parametrize('prefetch', [0, 1, 3])
def test_batches_come_in_order_with_the_position_after_them(prefetch):
    sampler = Counting()
    placed = []

    def put(batch):
        placed.append(batch)
        return batch['tokens'] * 10

    with Loader(sampler, {'sample': 8}, rows=slice(1, 3), put=put, prefetch=prefetch) as loader:
        for i, (batch, position, waited) in zip(range(5), loader, strict=False):
            assert batch.tolist() == [10 * (8 + 4 * i + 1), 10 * (8 + 4 * i + 2)]
            assert position == {'sample': 8 + 4 * (i + 1)}
            assert waited >= 0
    # zip takes one more batch than it needs; the buffer and the thread hold the others.
    assert len(placed) <= 6 + prefetch + 1
    assert not loader_threads()


def test_waiting_is_measured():
    with Loader(Counting(seconds=0.05), {'sample': 0}, prefetch=1) as loader:
        assert next(loader)[2] > 0.03
        time.sleep(0.2)  # the step: the next batch is made meanwhile
        assert next(loader)[2] < 0.03


def test_no_more_than_asked_for_is_made_ahead():
    sampler = Counting()
    with Loader(sampler, {'sample': 0}, prefetch=2) as loader:
        next(loader)
        time.sleep(0.1)
        assert sampler.made <= 1 + 2 + 1  # taken, buffered, in hand


@pytest.mark.parametrize('prefetch', [0, 2])
def test_errors_reach_the_consumer_with_the_position(prefetch):
    sampler = Counting(8, DataError('shard 3 is gone.'))
    with Loader(sampler, {'sample': 0}, prefetch=prefetch) as loader:
        assert next(loader)[1] == {'sample': 4}
        assert next(loader)[1] == {'sample': 8}
        with pytest.raises(DataError, match=r'shard 3 is gone.*position \{"sample": 8\}'):
            next(loader)
    sampler = Counting(0, KeyError('bug'))
    with Loader(sampler, {'sample': 0}, prefetch=prefetch) as loader:
        with pytest.raises(KeyError) as caught:
            next(loader)
        assert 'in the batch at position {"sample": 0}' in caught.value.__notes__
    assert not loader_threads()


@pytest.mark.parametrize('prefetch', [0, 2])
def test_closing_ends_it(prefetch):
    loader = Loader(Counting(), {'sample': 0}, prefetch=prefetch)
    next(loader)
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(loader)
