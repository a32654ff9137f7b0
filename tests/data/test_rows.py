"""Synthetic rows: their rules checked token by token, their draws, their dataset."""

import numpy as np
import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data import dataset, rows
from effjax.data.sources import listops
from effjax.data.sources.induction import Induction
from effjax.data.sources.listops import ListOps
from effjax.data.sources.mqar import Mqar
from effjax.data.sources.selective_copy import SelectiveCopy

SMALL = {
    'mqar': {'seq_len': 26, 'pairs': 5, 'vocab_size': 40, 'train': 300, 'valid': 40},
    'induction': {'seq_len': 9, 'vocab_size': 5, 'train': 300, 'valid': 40},
    'selective_copy': {'seq_len': 17, 'copies': 3, 'vocab_size': 6, 'train': 300, 'valid': 40},
    'listops': {'seq_len': 30, 'min_len': 4, 'train': 30, 'valid': 20},
}


def build(kind, **changes):
    return dataset.build_source({'kind': kind, **SMALL[kind], **changes}, 'config.data')


@pytest.mark.parametrize('kind', SMALL)
def test_rows_are_a_function_of_their_number(kind):
    source, again = build(kind), build(kind)
    train, valid = source.examples('train'), source.examples('valid')
    whole = train[:20]
    assert set(whole) >= {'tokens', 'at', 'labels'}
    for name, array in whole.items():
        assert array.dtype == np.int32 and len(array) == 20
        np.testing.assert_array_equal(array, again.examples('train')[:20][name])
        np.testing.assert_array_equal(array[[7, 3]], train[np.array([7, 3])][name])
    assert whole['tokens'].shape == (20, source.seq_len)
    assert whole['at'].shape == whole['labels'].shape == (20, source.queries)
    assert (np.diff(whole['at'], axis=1) > 0).all()
    assert whole['tokens'].min() >= 0 and whole['tokens'].max() < source.vocab_size
    assert not np.array_equal(whole['tokens'], valid[:20]['tokens'])
    other = build(kind, seed=1)
    assert not np.array_equal(whole['tokens'], other.examples('train')[:20]['tokens'])
    assert other.describe()['digest'] != source.describe()['digest']
    longer = build(kind, train=50)
    np.testing.assert_array_equal(longer.examples('train')[:20]['tokens'], whole['tokens'])


def test_mqar_asks_each_key_once_and_the_label_is_its_value():
    made = Mqar(**SMALL['mqar']).examples('train')[:]
    for tokens, at, labels in zip(made['tokens'], made['at'], made['labels'], strict=True):
        keys, values = tokens[:10:2], tokens[1:10:2]
        assert len(set(keys)) == len(set(values)) == 5
        assert keys.min() >= 1 and keys.max() < 20 <= values.min()
        assert (at >= 10).all() and (at % 2 == 0).all()
        assert sorted(tokens[at]) == sorted(keys)
        pairs = dict(zip(keys, values, strict=True))
        assert [pairs[k] for k in tokens[at]] == labels.tolist()
        rest = np.delete(tokens[10:], at - 10)
        assert (rest == 0).all()


def test_mqar_gaps_follow_the_power_law():
    """One pair: its slot has the law's own chances; 20,000 rows leave a deviation of 0.005."""
    source = Mqar(seq_len=18, pairs=1, vocab_size=40, power=0.01, train=20_000)
    at = source.examples('train')[:]['at'][:, 0]
    slots = np.arange(1, 9, dtype=np.float64)
    law = slots**-0.99 / (slots**-0.99).sum()
    np.testing.assert_allclose(np.bincount((at - 2) // 2, minlength=8) / 20_000, law, atol=0.015)


def test_mqar_fills_with_noise_if_asked():
    plain, filled = (
        Mqar(**SMALL['mqar'], random_fill=f).examples('train')[:] for f in (False, True)
    )
    same = plain['tokens'] > 0
    np.testing.assert_array_equal(plain['tokens'][same], filled['tokens'][same])
    assert (filled['tokens'][~same] > 0).mean() > 0.9


def test_induction_asks_what_followed_the_trigger():
    made = Induction(**SMALL['induction']).examples('train')[:]
    for tokens, at, label in zip(made['tokens'], made['at'], made['labels'], strict=True):
        (first,) = np.flatnonzero(tokens[:-1] == 4)
        assert tokens[-1] == 4 and at.tolist() == [8] and first <= 6
        assert label[0] == tokens[first + 1] != 4
    places = (made['tokens'][:, :-1] == 4).argmax(1)
    assert set(places) == set(range(7))  # 300 draws of 7 places


def test_selective_copy_says_the_data_in_order():
    made = SelectiveCopy(**SMALL['selective_copy']).examples('train')[:]
    for tokens, at, labels in zip(made['tokens'], made['at'], made['labels'], strict=True):
        assert at.tolist() == [14, 15, 16] and (tokens[at] == 5).all()
        data = tokens[:14][tokens[:14] > 0]
        assert data.tolist() == labels.tolist() and data.max() <= 4


def test_listops_says_the_value_of_its_tree():
    source = ListOps(**SMALL['listops'])
    made = source.examples('train')[:]
    for tokens, at, label, segments in zip(
        made['tokens'], made['at'], made['labels'], made['segment_ids'], strict=True
    ):
        length = int(segments.sum())
        assert at[0] == length - 1 and 4 <= length <= 30 and (tokens[length:] == 0).all()
        words = [listops.VOCAB[t] for t in tokens[:length]]
        assert _value(words) == label[0] - 1 and not words


def _value(words):
    """An evaluator of its own, straight from the text; it eats the words."""
    word = words.pop(0)
    if not word.startswith('['):
        return int(word)
    arguments = []
    while words[0] != ']':
        arguments.append(_value(words))
    words.pop(0)
    return {
        '[MIN': min(arguments),
        '[MAX': max(arguments),
        '[MED': int(np.median(arguments)),
        '[SM': sum(arguments) % 10,
    }[word]


def test_draws_without_replacement():
    index = np.arange(500)
    for count, size in ((3, 50), (5, 6), (1, 1)):
        drawn = rows.distinct(index, count, size, key=3)
        assert drawn.shape == (500, count) and drawn.min() >= 0 and drawn.max() < size
        assert all(len(set(row)) == count for row in drawn.tolist())
    # Each number is equally likely in each place: 500 draws of 6 numbers leave sd 0.017.
    share = np.bincount(rows.distinct(index, 5, 6, 3)[:, 0], minlength=6) / 500
    np.testing.assert_allclose(share, 1 / 6, atol=0.07)


def test_a_dataset_of_rows_trains_and_evaluates():
    data = dataset.build({'kind': 'induction', **SMALL['induction']}, seq_len=9)
    assert (data.info.kind, data.info.vocab_size, data.info.queries) == ('rows', 5, 1)
    sampler = data.train(4, 9, seed=0)
    batch = sampler.batch(sampler.initial())
    assert batch['tokens'].shape == (4, 9) and batch['weights'].tolist() == [1] * 4
    held_out = data.eval('valid', 16, 9)
    assert len(held_out) == 3 and held_out[2]['weights'].sum() == 8
    with pytest.raises(DataError, match=r'config.seq_len is 8, but the rows .* have 9 tokens'):
        data.train(4, 8, seed=0)


@pytest.mark.parametrize(
    ('kind', 'changes', 'message'),
    [
        ('mqar', {'seq_len': 18}, 'need an even seq_len of at least 20'),
        ('mqar', {'vocab_size': 10}, 'too few keys'),
        ('mqar', {'power': 0.0}, 'power must be above 0'),
        ('mqar', {'train': 0}, 'config.data.train must be at least 1 row'),
        ('induction', {'seq_len': 2}, 'seq_len must be at least 3'),
        ('induction', {'vocab_size': 2}, 'vocab_size must be at least 3'),
        ('selective_copy', {'seq_len': 5}, 'seq_len must be at least 6 for 3 copies'),
        ('selective_copy', {'vocab_size': 3}, 'vocab_size must be at least 4'),
        ('listops', {'min_len': 31}, 'min_len must be from 4 to seq_len'),
        ('listops', {'arguments': 1}, 'arguments at least 2'),
    ],
)
def test_bad_arguments(kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(kind, **changes)


def test_listops_that_cannot_be_says_so(monkeypatch):
    monkeypatch.setattr(listops, '_TRIES', 50)
    source = ListOps(seq_len=500, min_len=400, depth=1, arguments=3, train=2, valid=1)
    with pytest.raises(ConfigError, match='none of 50 trees had 400 to 500 tokens'):
        source.examples('train')[:1]


def test_text_keys_do_not_belong_to_rows():
    with pytest.raises(ConfigError, match="'tokenizer' belongs to text; remove it"):
        build('mqar', tokenizer={'kind': 'byte'})
