"""Packing: every token of every document a target exactly once, and nothing crosses documents."""

import numpy as np
import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data import packing
from effjax.data.packing import Rows
from effjax.data.shards import TokenStream

BOS = 0
LENGTHS = (5, 1, 17, 40, 3, 64, 2, 30, 9, 100)  # tokens of documents, without BOS


def make_stream(lengths=LENGTHS, per_shard=100):
    """A stream whose tokens are all different: token i of it is i + 1, BOS is 0."""
    tokens, documents, at, shard, rows = [], [], 0, [], []
    for i, n in enumerate(lengths):
        rows.append((len(shard), 3 * n))
        shard += [BOS, *range(at + 2, at + n + 2)]
        at += n + 1
        if len(rows) == per_shard or i == len(lengths) - 1:
            tokens.append(np.array(shard, np.uint16))
            documents.append(np.array(rows, np.int64))
            shard, rows = [], []
    return TokenStream(tokens, documents)


def all_tokens(stream):
    """Every token of every document, sorted."""
    ids = stream.gather(np.array([0]), np.array([stream.size]), stream.size)[0]
    return sorted(ids[ids != BOS].tolist())


def targets_of(batch):
    return batch['targets'][batch['weights'] > 0].tolist()


def take_epochs(order, seq_len, count, epochs=1):
    """Takes rows, `count` at a time, until so many epochs are over."""
    rows, position = [], None
    while position is None or position['epoch'] < epochs:
        taken, position = order.take(position, count, seq_len)
        rows.append(taken)
    return Rows.join(rows), position


@pytest.mark.parametrize('per_shard', [100, 1, 3])
def test_streams_join_shards(per_shard):
    stream = make_stream(per_shard=per_shard)
    whole = make_stream()
    np.testing.assert_array_equal(stream.starts, whole.starts)
    start, length = np.array([0, 7, 200, 30]), np.array([50, 1, 81, 0])
    got = stream.gather(start, length, 90)
    assert got.dtype == np.int32 and got.shape == (4, 90)
    np.testing.assert_array_equal(got, whole.gather(start, length, 90))
    assert got[1].tolist() == [whole.gather(np.array([7]), np.array([1]), 1)[0, 0]] + [0] * 89


@pytest.mark.parametrize('seq_len', [1, 4, 8, 16, 33, 64, 1000])
@pytest.mark.parametrize('kind', ['pack', 'split'])
@pytest.mark.parametrize('record', [16, 64])
def test_every_token_is_a_target_once_an_epoch(kind, seq_len, record):
    stream = make_stream()
    order = packing.make_order(kind, stream, record, key=5)
    for epoch in range(2):
        block = order.take(None, 0, seq_len)[1]
        block['epoch'] = epoch
        rows = []
        while block['epoch'] == epoch:
            taken, block = order.take(block, 1, seq_len)
            rows.append(taken)
        batch = packing.make_batch(stream, Rows.join(rows), seq_len, kind, training=True)
        assert sorted(targets_of(batch)) == all_tokens(stream)


@pytest.mark.parametrize('seq_len', [1, 7, 16, 400])
@pytest.mark.parametrize('kind', ['pack', 'split', 'stream'])
def test_held_out_rows_cover_every_token_once_in_order(kind, seq_len):
    stream = make_stream()
    rows = packing.make_order(kind, stream, 16, key=5).held_out(seq_len)
    batch = packing.make_batch(stream, rows, seq_len, kind, training=False)
    assert targets_of(batch) == all_tokens(stream)


@pytest.mark.parametrize('kind', ['pack', 'split'])
def test_targets_segments_and_positions_follow_the_documents(kind):
    stream = make_stream()
    rows = packing.make_order(kind, stream, 32, key=1).take(None, 40, 32)[0]
    batch = packing.make_batch(stream, rows, 32, kind, training=True)
    for name in ('tokens', 'targets', 'segment_ids', 'positions'):
        assert batch[name].shape == (40, 32) and batch[name].dtype == np.int32, name
    assert batch['weights'].dtype == np.float32
    ids, seg, pos = batch['tokens'], batch['segment_ids'], batch['positions']
    real = batch['weights'] > 0
    # Token values are consecutive inside a document: the target is the next one of the same.
    inside = real & (ids != BOS)
    np.testing.assert_array_equal(batch['targets'][inside], ids[inside] + 1)
    assert (batch['targets'][real] != BOS).all() and (batch['targets'][~real] == 0).all()
    # A segment begins at the row's start and at each BOS, and nowhere else.
    begins = np.diff(seg, axis=1, prepend=0) == 1
    expected = (ids == BOS) & (seg > 0)
    expected[:, 0] = True
    np.testing.assert_array_equal(begins, expected)
    assert (pos[begins] == 0).all()
    assert (pos[:, 1:][~begins[:, 1:] & (seg[:, 1:] > 0)] > 0).all()
    assert (np.diff(pos, axis=1)[(np.diff(seg, axis=1) == 0) & (seg[:, 1:] > 0)] == 1).all()
    # Padding is at the end of a row and empty.
    padded = seg == 0
    assert (np.diff(padded.astype(int), axis=1) >= 0).all()
    assert not ids[padded].any() and not pos[padded].any() and not real[padded].any()


def test_split_rows_hold_one_document_each():
    stream = make_stream()
    rows = packing.make_order('split', stream, 32, key=1).take(None, 40, 32)[0]
    batch = packing.make_batch(stream, rows, 32, 'split', training=True)
    assert batch['segment_ids'].max() == 1
    assert (rows.length <= 32).all() and (rows.length >= 1).all()


def test_stream_marks_no_document_and_may_predict_bos_in_training_only():
    stream = make_stream()
    rows = packing.make_order('stream', stream, 16, key=1).take(None, 200, 16)[0]
    batch = packing.make_batch(stream, rows, 16, 'stream', training=True)
    assert 'segment_ids' not in batch and (batch['weights'] == 1).all()
    assert (batch['positions'] == np.arange(16)).all()
    np.testing.assert_array_equal(batch['targets'][:, :-1], batch['tokens'][:, 1:])
    assert (batch['targets'] == BOS).any()
    held = packing.make_batch(stream, rows, 16, 'stream', training=False)
    assert (held['targets'][held['weights'] > 0] != BOS).all()


def test_stream_windows_reach_both_ends_evenly():
    stream = make_stream()
    rows = packing.make_order('stream', stream, 16, key=3).take(None, 20000, 16)[0]
    last = stream.size - 16 - 1
    assert rows.start.min() == 0 and rows.start.max() == last
    # 264 starts, 75.8 draws each on average; six standard deviations are 52.
    assert np.bincount(rows.start).max() < 130


def test_the_cut_moves_from_epoch_to_epoch():
    stream = make_stream()
    order = packing.make_order('pack', stream, 32, key=1)
    rows, _ = take_epochs(order, 32, 1, epochs=6)
    assert len(set((rows.start % 32).tolist())) > 3


def test_neighbouring_rows_come_from_different_records():
    stream = make_stream((99,) * 500)  # 50,000 tokens, 50 records
    order = packing.make_order('pack', stream, 1000, key=2)
    rows, _ = order.take(None, 16, 10)
    # 16 of the 800 rows of a block of 8 records: without the second permutation all would be
    # neighbours in one record.
    places = np.sort(rows.start)
    assert len(np.unique(places // 1000)) >= 6
    assert (np.diff(places) == 10).sum() <= 2


@pytest.mark.parametrize('kind', ['pack', 'split'])
def test_another_number_of_rows_goes_on_with_the_next_row(kind):
    order = packing.make_order(kind, make_stream(), 16, key=5)
    whole, end = order.take(None, 60, 16)
    parts, position = [], None
    for count in (1, 7, 0, 12, 40):
        rows, position = order.take(position, count, 16)
        parts.append(rows)
    got = Rows.join(parts)
    np.testing.assert_array_equal(got.start, whole.start)
    np.testing.assert_array_equal(got.length, whole.length)
    assert position == end


@pytest.mark.ci
@pytest.mark.parametrize('kind', ['pack', 'split'])
def test_another_seq_len_sees_nothing_twice_and_skips_less_than_a_block(kind):
    stream = make_stream((37,) * 1500)
    record = 64
    order = packing.make_order(kind, stream, record, key=5)
    for first in (1, 5, 63, 64, 200):
        rows, position = order.take(None, first, 16)
        seen = targets_of(packing.make_batch(stream, rows, 16, kind, True))
        tokens_before = position['tokens']
        rest = []
        while position['epoch'] == 0:
            rows, position = order.take(position, 1, 64)
            rest += targets_of(packing.make_batch(stream, rows, 64, kind, True))
        assert not set(seen) & set(rest)
        assert len(rest) == len(set(rest))
        total = len(all_tokens(stream))
        missed = total - len(seen) - len(rest)
        assert 0 <= missed < packing.BLOCK * record
        # The position counts what was consumed and skipped: together whole epochs.
        assert missed <= position['skipped'] < packing.BLOCK * record
        assert position['tokens'] > tokens_before
        epoch_inputs = stream.size if kind == 'pack' else total
        assert position['tokens'] + position['skipped'] == epoch_inputs


def test_back_to_the_same_seq_len_or_between_blocks_nothing_is_skipped():
    order = packing.make_order('pack', make_stream((37,) * 500), 64, key=5)
    _, position = order.take(None, 3, 64)
    while position['row']:
        _, position = order.take(position, 1, 64)
    _, position = order.take(position, 1, 16)
    assert position['skipped'] == 0


def test_longer_rows_than_records_begin_the_next_epoch():
    stream = make_stream((37,) * 500)
    order = packing.make_order('pack', stream, 64, key=5)
    _, position = order.take(None, 3, 64)
    rows, position = order.take(position, 2, 256)
    assert position['record'] == 256 and position['epoch'] == 1 and rows.length.max() == 256
    assert position['tokens'] + position['skipped'] - int(rows.length.sum()) == stream.size
    # Shorter ones keep the longer records.
    _, position = order.take(position, 1, 64)
    assert position['record'] == 256


def test_a_position_keeps_its_records_when_the_dataset_is_built_with_others():
    stream = make_stream((37,) * 500)
    old = packing.make_order('pack', stream, 64, key=5)
    new = packing.make_order('pack', stream, 512, key=5)
    _, position = old.take(None, 9, 64)
    expected, after = old.take(position, 20, 64)
    got, other = new.take(position, 20, 64)
    np.testing.assert_array_equal(got.start, expected.start)
    assert after == other


def test_errors_name_the_fault():
    with pytest.raises(ConfigError, match="must be one of pack, split, stream, got 'packed'"):
        packing.make_order('packed', make_stream(), 16, 0)
    with pytest.raises(
        DataError, match='a/train has 281 tokens, too few for one row of seq_len 281'
    ):
        packing.check_length('pack', make_stream(), 281, 'a/train')
    with pytest.raises(DataError, match='a/train has no token that another one precedes'):
        packing.check_length('split', make_stream((0, 0)), 8, 'a/train')
    packing.check_length('split', make_stream(), 281, 'a/train')
    packing.check_length('stream', make_stream(), 280, 'a/train')
