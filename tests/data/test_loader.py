"""The loader: order kept, waiting measured, errors told, threads ended."""

import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time

import chex
import numpy as np
import pytest

from effjax import data
from effjax.core.errors import DataError
from effjax.data.loader import Loader


class Counting:
    """A sampler of its own position; may be slow or fail."""

    batch_size, workers = 4, 0

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


@pytest.mark.parametrize('prefetch', [1, 3])
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


def test_errors_reach_the_consumer_with_the_position():
    sampler = Counting(8, DataError('shard 3 is gone.'))
    with Loader(sampler, {'sample': 0}) as loader:
        assert next(loader)[1] == {'sample': 4}
        assert next(loader)[1] == {'sample': 8}
        with pytest.raises(DataError, match=r'shard 3 is gone.*position \{"sample": 8\}'):
            next(loader)
    sampler = Counting(0, KeyError('bug'))
    with Loader(sampler, {'sample': 0}) as loader:
        with pytest.raises(KeyError) as caught:
            next(loader)
        assert 'in the batch at position {"sample": 0}' in caught.value.__notes__
    assert not loader_threads()


def test_closing_ends_it():
    loader = Loader(Counting(), {'sample': 0})
    next(loader)
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(loader)


def _images(folder):
    PIL = pytest.importorskip('PIL.Image')
    for label in ('cat', 'dog'):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            image = np.full((8, 8, 3), 20 * i + (label == 'dog'), np.uint8)
            PIL.fromarray(image).save(folder / label / f'{i}.png')


def _datasets(tmp_path, workers):
    """Text in mapped shards, and images in files."""
    texts = [f'document number {i} ' * (1 + i % 5) for i in range(60)]
    path = tmp_path / 'corpus.jsonl'
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    text = {'kind': 'jsonl', 'path': str(path), 'valid_fraction': 0.2, 'workers': workers}
    images = {'kind': 'images', 'path': str(tmp_path / 'images'), 'workers': workers}
    return [data.build(b, seq_len=16, cache_dir=tmp_path / 'cache') for b in (text, images)]


def _take(dataset, steps, position=None, rows=None):
    sampler = dataset.train(4, 16, seed=0)
    out = []
    with Loader(sampler, position or sampler.initial(), rows=rows) as loader:
        for _ in range(steps):
            batch, position, _ = next(loader)
            out.append({k: np.array(v) for k, v in batch.items()})
    return out, position


@pytest.mark.process
def test_workers_change_nothing_but_who_makes_the_batches(tmp_path):
    _images(tmp_path / 'images')
    (text, images), (shared_text, shared_images) = (_datasets(tmp_path, n) for n in (0, 2))
    # Three steps with two processes, then on with none, and the other way round.
    expected, end = _take(text, 6)
    first, position = _take(shared_text, 3)
    chex.assert_trees_all_equal(first + _take(text, 3, position)[0], expected)
    rest, after = _take(shared_text, 3, _take(text, 3)[1], rows=slice(2, 4))
    half = [{k: v[2:] for k, v in batch.items()} for batch in expected[3:]]
    chex.assert_trees_all_equal(rest, half)
    assert after == end
    chex.assert_trees_all_equal(_take(shared_images, 3)[0], _take(images, 3)[0])
    assert not multiprocessing.active_children()


class Failing(Counting):
    """Dies, or fails, in its worker."""

    workers = 1

    def batch(self, position, rows=None):
        if self.error is None:
            os._exit(3)
        return super().batch(position, rows)


@pytest.mark.process
def test_errors_of_workers_are_told():
    with Loader(Failing(4, DataError('a file is gone.')), {'sample': 0}) as loader:
        next(loader)
        with pytest.raises(DataError, match=r'a file is gone.*position \{"sample": 4\}'):
            next(loader)
    with (
        Loader(Failing(), {'sample': 0}) as loader,
        pytest.raises(DataError, match=r'a worker process .* died.*lower config.data.workers'),
    ):
        next(loader)


_KILLED = """
import sys, time
from effjax import data
from effjax.data import Loader

if __name__ == '__main__':
    block = dict(kind='digits', workers=2)
    sampler = data.build(block, seq_len=1).train(4, 1, 0)
    loader = Loader(sampler, sampler.initial())
    next(loader)
    import multiprocessing
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


@pytest.mark.process
def test_workers_end_with_a_killed_trainer(tmp_path, repository):
    script = tmp_path / 'train.py'
    script.write_text(_KILLED)
    environment = {**os.environ, 'PYTHONPATH': str(repository)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2
        trainer.kill()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid):
    try:
        state = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
    except OSError:
        return False
    return state != 'Z'  # nobody waits for the orphans of a killed process here
