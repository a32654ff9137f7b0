"""Mixtures: shares met, each source its own place, epoch and held-out split."""

import json

import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data import dataset as dataset_lib
from effjax.data import shards


@pytest.fixture
def sources(tmp_path):
    """Two sources whose characters differ: upper-case letters and digits."""
    blocks = {}
    for name, alphabet in (('letters', 'ABCDEFGH'), ('digits', '01234567')):
        path = tmp_path / f'{name}.jsonl'
        texts = [alphabet[i % 8 :] * (1 + i % 4) + alphabet[: i // 8] for i in range(60)]
        path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
        blocks[name] = {'kind': 'jsonl', 'path': str(path), 'valid_fraction': 0.2}
    return blocks


@pytest.fixture
def build(sources, tmp_path):
    def make(weights, **block):
        block = {'kind': 'mixture', 'sources': sources, 'weights': weights, **block}
        return dataset_lib.build(block, seq_len=8, cache_dir=tmp_path / 'cache')

    return make


def targets_of(batches):
    return bytes(t for b in batches for t in b['targets'][b['weights'] > 0].tolist())


@pytest.mark.parametrize('packing', ['pack', 'split', 'stream'])
def test_rows_come_in_the_shares_asked_for(build, packing):
    sampler = build({'letters': 3, 'digits': 1}, packing=packing).train(16, 8, seed=0)
    position, letters = sampler.initial(), 0
    for _ in range(20):
        batch = sampler.batch(position)
        names = [d.split('@')[0] for d in sampler.describe(position)]
        for name, row, weights in zip(names, batch['targets'], batch['weights'], strict=True):
            text = bytes(row[(weights > 0) & (row != 256)].tolist())
            assert text.isalpha() if name == 'letters' else text.isdigit()
        letters += names.count('letters')
        position = sampler.advance(position)
    assert abs(letters - 0.75 * 320) <= 8
    assert position['sample'] == 320


def test_each_source_has_its_own_held_out_split(build):
    data = build({'letters': 1, 'digits': 1})
    assert data.info.splits == (
        'train', 'valid', 'letters/train', 'letters/valid', 'digits/train', 'digits/valid',
    )  # fmt: skip
    letters = targets_of(data.eval('letters/valid', 4, 8))
    digits = targets_of(data.eval('digits/valid', 4, 8))
    assert letters.isalpha() and digits.isdigit()
    both = data.eval('valid', 4, 8)
    assert targets_of(both) == letters + digits
    assert both.tokens == both.bytes == len(letters) + len(digits)
    assert ''.join(d.text for d in data.documents('valid')).encode() == letters + digits


def test_a_weight_of_zero_leaves_a_source_out_of_training_only(build):
    data = build({'letters': 1, 'digits': 0})
    sampler = data.train(8, 8, seed=0)
    assert targets_of([sampler.batch(sampler.initial())]).isalpha()
    assert targets_of(data.eval('digits/valid', 4, 8)).isdigit()


def test_other_weights_go_on_in_each_source(build):
    first = build({'letters': 1, 'digits': 1}).train(8, 8, seed=0)
    position = first.initial()
    for _ in range(3):
        position = first.advance(position)
    before = dict(position['sources'])
    second = build({'letters': 1, 'digits': 3}).train(8, 8, seed=0)
    after = second.advance(position)
    assert before.keys() == after['sources'].keys()
    assert all(after['sources'][k]['tokens'] > before[k]['tokens'] for k in before)
    assert (
        build({'letters': 1, 'digits': 1}).info.digest
        == build({'letters': 1, 'digits': 3}).info.digest
    )


def test_one_tokenizer_is_trained_on_all_sources(build):
    data = build({'letters': 1, 'digits': 1}, tokenizer={'kind': 'char'})
    assert set(data.tokenizer.characters) == set('ABCDEFGH01234567')


def test_prepared_sources_mix_if_their_tokenizers_agree(build, sources, tmp_path):
    def prepare(name, kind):
        source = dataset_lib.build_source(sources[name], 'x')
        kept = dataset_lib.build_tokenizer(source, {'kind': kind}, tmp_path)
        shards.prepare(source, kept, tmp_path / kind / name)
        return {'kind': 'prepared', 'path': str(tmp_path / kind / name)}

    weights = {'letters': 1, 'digits': 1}
    ready = {name: prepare(name, 'byte') for name in sources}
    data = build(weights, sources=ready)
    assert data.info.digest == build(weights).info.digest
    half = build(weights, sources={**ready, 'letters': sources['letters']})
    assert half.info.digest == data.info.digest
    other = {**ready, 'letters': prepare('letters', 'char')}
    with pytest.raises(ConfigError, match='made with different tokenizers'):
        build(weights, sources=other)


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        ({'letters': 1}, "give 'digits' a weight"),
        ({'letters': 1, 'digit': 1, 'digits': 1}, "no such source. Did you mean 'digits'"),
        ({'letters': 1, 'digits': -1}, 'must be a number of at least 0, got -1'),
        ({'letters': 1, 'digits': 'x'}, "must be a number of at least 0, got 'x'"),
        ({'letters': 0, 'digits': 0}, 'are all 0'),
    ],
)
def test_bad_weights_have_clear_messages(build, weights, message):
    with pytest.raises(ConfigError, match=message):
        build(weights)


def test_bad_sources_have_clear_messages(build, sources, tmp_path):
    weights = {'letters': 1, 'digits': 1}
    with pytest.raises(ConfigError, match='a mixture needs at least one source'):
        build({}, sources={})
    with pytest.raises(ConfigError, match=r'sources.letters.packing: .* belongs to the mixture'):
        build(weights, sources={**sources, 'letters': {**sources['letters'], 'packing': 'split'}})
    with pytest.raises(ConfigError, match=r'sources.letters: a mixture mixes text sources'):
        build(weights, sources={**sources, 'letters': {'kind': 'digits'}})
    with pytest.raises(ConfigError, match=r'a name may not contain a slash'):
        build({'a/b': 1}, sources={'a/b': sources['letters']})
    with pytest.raises(ConfigError, match=r'sources.letters: expected a block'):
        build(weights, sources={**sources, 'letters': 'x'})
    with pytest.raises(DataError, match=r'nothing.jsonl'):
        path = str(tmp_path / 'nothing.jsonl')
        build(weights, sources={**sources, 'letters': {'kind': 'jsonl', 'path': path}})
