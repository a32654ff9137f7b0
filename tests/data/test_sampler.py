"""Samplers: the same samples whatever the number of hosts, the batch size, or where one resumes."""

import json

import chex
import numpy as np
import pytest

from effjax.core.errors import DataError
from effjax.data.sampler import ExampleSampler, TextPart, TextSampler
from effjax.data.shards import TokenStream

PACKINGS = ('pack', 'split', 'stream')


def make_stream(documents=60, length=41, first=1):
    """Documents of tokens that are all different; BOS is 0."""
    total = documents * (length + 1)
    ids = np.arange(first, first + total, dtype=np.uint16)
    starts = np.arange(0, total, length + 1)
    ids[starts] = 0
    return TokenStream([ids], [np.stack([starts, np.full(documents, length)], axis=1)])


def make_sampler(packing='pack', batch_size=8, seq_len=16, seed=0, record=32, shares=(1.0,)):
    parts = [
        TextPart(f's{i}', f'key{i}', make_stream(first=1 + 10_000 * i), packing, share)
        for i, share in enumerate(shares)
    ]
    return TextSampler(parts, record=record, batch_size=batch_size, seq_len=seq_len, seed=seed)


def walk(sampler, steps, position=None):
    """Returns the batches of some steps, and the position after them."""
    position = position or sampler.initial()
    out = []
    for _ in range(steps):
        out.append(sampler.batch(position))
        # As a checkpoint would keep it.
        position = json.loads(json.dumps(sampler.advance(position)))
    return out, position


def rows_of(batches):
    return np.concatenate([b['tokens'] for b in batches])


def targets_of(batches):
    return [t for b in batches for t in b['targets'][b['weights'] > 0].tolist()]


@pytest.mark.parametrize('shares', [(1.0,), (0.5, 0.2, 0.3)])
@pytest.mark.parametrize('packing', PACKINGS)
def test_batches_have_their_form_and_are_pure(packing, shares):
    sampler = make_sampler(packing, shares=shares)
    position = walk(sampler, 3)[1]
    kept = json.dumps(position)
    first, second = sampler.batch(position), sampler.batch(position)
    chex.assert_trees_all_equal(first, second)
    assert json.dumps(position) == kept
    assert sampler.advance(position) == sampler.advance(position)
    chex.assert_shape(list(first.values()), (8, 16))
    names = ['tokens', 'targets', 'positions', *(['segment_ids'] if packing != 'stream' else [])]
    assert {k: v.dtype.name for k, v in first.items()} == {
        **dict.fromkeys(names, 'int32'),
        'weights': 'float32',
    }
    # Another sampler of the same arguments is the same; another seed is another order.
    chex.assert_trees_all_equal(first, make_sampler(packing, shares=shares).batch(position))
    other = make_sampler(packing, shares=shares, seed=1).batch(position)
    assert (other['tokens'] != first['tokens']).any()


@pytest.mark.parametrize('hosts', [1, 2, 4, 8])
@pytest.mark.parametrize('packing', PACKINGS)
def test_any_number_of_hosts_reads_the_same_global_batch(packing, hosts):
    sampler = make_sampler(packing, shares=(0.7, 0.3))
    position = sampler.initial()
    for _ in range(4):
        whole = sampler.batch(position)
        size = 8 // hosts
        parts = [sampler.batch(position, slice(h * size, (h + 1) * size)) for h in range(hosts)]
        joined = {k: np.concatenate([p[k] for p in parts]) for k in whole}
        chex.assert_trees_all_equal(joined, whole)
        position = sampler.advance(position)


def test_rows_may_be_any_index():
    sampler = make_sampler(shares=(0.7, 0.3))
    position = sampler.initial()
    whole = sampler.batch(position)['tokens']
    np.testing.assert_array_equal(sampler.batch(position, slice(1, 8, 3))['tokens'], whole[1:8:3])
    np.testing.assert_array_equal(
        sampler.batch(position, np.array([5, 0]))['tokens'], whole[[5, 0]]
    )


@pytest.mark.parametrize('packing', PACKINGS)
def test_resuming_goes_on_where_the_position_says(packing):
    sampler = make_sampler(packing, shares=(0.6, 0.4))
    whole, end = walk(sampler, 12)
    _, middle = walk(make_sampler(packing, shares=(0.6, 0.4)), 5)
    rest, after = walk(make_sampler(packing, shares=(0.6, 0.4)), 7, middle)
    np.testing.assert_array_equal(rows_of(rest), rows_of(whole[5:]))
    assert after == end


@pytest.mark.parametrize('packing', PACKINGS)
def test_another_batch_size_sees_the_same_samples(packing):
    whole, end = walk(make_sampler(packing, shares=(0.6, 0.4)), 12)
    start, position = walk(make_sampler(packing, shares=(0.6, 0.4)), 4)
    rest, after = walk(make_sampler(packing, batch_size=16, shares=(0.6, 0.4)), 4, position)
    np.testing.assert_array_equal(rows_of(start + rest), rows_of(whole))
    assert after == end


@pytest.mark.parametrize('packing', ['pack', 'split'])
def test_an_epoch_with_changing_shapes_repeats_nothing(packing):
    seen, position = [], None
    for batch_size, seq_len, steps in ((8, 8, 3), (4, 32, 3), (16, 16, 2), (2, 32, 4)):
        sampler = make_sampler(packing, batch_size=batch_size, seq_len=seq_len)
        batches, position = walk(sampler, steps, position)
        seen += targets_of(batches)
    assert position['sources']['key0']['epoch'] == 0
    assert len(seen) == len(set(seen)) > 700


@pytest.mark.parametrize('packing', ['pack', 'split'])
def test_an_epoch_holds_every_token_once(packing):
    sampler = make_sampler(packing, batch_size=1)
    position, seen = sampler.initial(), []
    while not position['sources'] or position['sources']['key0']['epoch'] == 0:
        seen += targets_of([sampler.batch(position)])
        position = sampler.advance(position)
    assert len(seen) == len(set(seen)) == 60 * 41


def test_a_source_that_pauses_keeps_its_place_and_new_ones_begin():
    both = make_sampler(shares=(0.5, 0.5))
    only = make_sampler(shares=(1.0,))
    first, position = walk(both, 4)
    second, position = walk(only, 2, position)
    assert position['sample'] == 48
    third, position = walk(both, 4, position)
    # Source 1 (ids above 10,000) saw what it would have seen without the pause.
    mine = [r for r in rows_of(first + third) if r.max() > 10_000]
    plain = [r for r in rows_of(walk(both, 12)[0]) if r.max() > 10_000]
    np.testing.assert_array_equal(mine, plain[: len(mine)])
    seen = targets_of(first) + targets_of(second) + targets_of(third)
    assert len(seen) == len(set(seen))


def test_shares_are_met():
    shares = (0.7, 0.2, 0.1)
    sampler = make_sampler('stream', batch_size=50, shares=shares)
    named = []
    position = sampler.initial()
    for _ in range(40):
        named += [d.split('@')[0] for d in sampler.describe(position)]
        position = sampler.advance(position)
    for i, share in enumerate(shares):
        assert abs(named.count(f's{i}') - share * 2000) <= 8


def test_describe_names_each_row():
    sampler = make_sampler()
    position = walk(sampler, 2)[1]
    stream, batch = make_stream(), sampler.batch(position)
    described = sampler.describe(position)
    assert len(described) == 8
    for text, row in zip(described, batch['tokens'], strict=True):
        start, length = text.removeprefix('s0@').split('+')
        ids = stream.gather(np.array([int(start)]), np.array([int(length)]), 16)[0]
        np.testing.assert_array_equal(ids, row)


def test_too_little_text_is_said():
    with pytest.raises(DataError, match=r's0/train has 2520 tokens, too few .* seq_len 4096'):
        make_sampler(seq_len=4096)


class Images:
    """Ten images that show their own index."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = np.broadcast_to(index[:, None, None, None], (len(index), 2, 2, 1))
        return {'image': image.astype(np.uint8), 'label': index.astype(np.int32)}


def test_images_come_once_an_epoch_in_a_new_order():
    sampler = ExampleSampler(Images(), name='ten', key='k', batch_size=4, seed=0)
    position, labels = sampler.initial(), []
    for _ in range(5):
        batch = sampler.batch(position)
        assert batch['image'].shape == (4, 2, 2, 1) and batch['image'].dtype == np.uint8
        assert batch['label'].dtype == np.int32 and batch['weights'].tolist() == [1] * 4
        assert (batch['image'][:, 0, 0, 0] == batch['label']).all()
        assert sampler.describe(position) == [f'ten#{i}' for i in batch['label']]
        halves = [sampler.batch(position, s)['label'] for s in (slice(0, 2), slice(2, 4))]
        np.testing.assert_array_equal(np.concatenate(halves), batch['label'])
        labels += batch['label'].tolist()
        position = json.loads(json.dumps(sampler.advance(position)))
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
    assert labels[:10] != labels[10:]
    # Another batch size goes on.
    other = ExampleSampler(Images(), name='ten', key='k', batch_size=20, seed=0)
    assert other.batch(other.initial())['label'].tolist() == labels
