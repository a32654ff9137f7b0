"""Datasets: from a config block to training batches and honest evaluations."""

import json

import numpy as np
import pytest

from effjax.core.errors import ConfigError, DataError
from effjax.data import dataset as dataset_lib
from effjax.data import shards, tokenizer_copy

# Real enough for a BPE of 300 entries; documents of very different lengths, two of them tiny.
WORDS = 'to be or not that is the question whether tis nobler in mind suffer slings and arrows'
TEXTS = [
    ' '.join(WORDS.split()[i % 7 : 8 + i % 9]) * (1 + i % 5) + f' – {i}' for i in range(80)
] + ['é', 'x']


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """A jsonl file of documents."""
    path = tmp_path_factory.mktemp('corpus') / 'documents.jsonl'
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in TEXTS))
    return str(path)


@pytest.fixture
def build(corpus, tmp_path):
    """Builds a dataset of the corpus, its cache in a folder of the test's own."""

    def make(seq_len=16, **block):
        block = {'kind': 'jsonl', 'path': corpus, 'valid_fraction': 0.2, **block}
        return dataset_lib.build(block, seq_len=seq_len, cache_dir=tmp_path / 'cache')

    return make


def targets_of(batches):
    return [t for b in batches for t in b['targets'][b['weights'] > 0].tolist()]


TOKENIZERS = [{'kind': 'byte'}, {'kind': 'bpe', 'vocab_size': 300}, {'kind': 'char'}]


@pytest.mark.parametrize('tokenizer', TOKENIZERS, ids=lambda t: t['kind'])
@pytest.mark.parametrize('packing', ['pack', 'split', 'stream'])
def test_evaluation_covers_the_held_out_text_once_in_order(build, packing, tokenizer):
    data = build(packing=packing, tokenizer=tokenizer)
    texts = [d.text for d in data.documents('valid')]
    batches = data.eval('valid', 4, 16)
    expected = [t for ids in data.tokenizer.encode_batch(texts) for t in ids.tolist()]
    assert targets_of(batches) == expected == targets_of(batches)
    assert batches.tokens == len(expected)
    assert batches.bytes == sum(len(t.encode()) for t in texts)
    assert len(batches) == len(list(batches))
    for batch in batches:
        assert all(array.shape == (4, 16) for array in batch.values())
    last = batches[len(batches) - 1]
    # A row may also lack targets because it holds a document's last token and nothing else.
    assert (last['weights'].max(1) == 0).sum() < 4
    if packing != 'stream':  # which has no documents to tell apart
        padded = last['segment_ids'].max(1) == 0
        assert padded.sum() < 4 and not last['weights'][padded].any()
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize('packing', ['pack', 'split'])
def test_training_sees_the_training_text_once_an_epoch(build, packing):
    data = build(packing=packing)
    sampler = data.train(batch_size=1, seq_len=16, seed=3)
    position, seen = sampler.initial(), []
    while all(p['epoch'] == 0 for p in position['sources'].values()):
        seen += targets_of([sampler.batch(position)])
        position = sampler.advance(position)
    texts = ''.join(d.text for d in data.documents('train')).encode()
    assert sorted(seen) == sorted(texts)


def test_train_and_valid_do_not_overlap(build):
    data = build()
    train, valid = ({d.id for d in data.documents(s)} for s in ('train', 'valid'))
    assert train and valid and not train & valid and len(train | valid) == len(TEXTS)


def test_a_subset_is_spread_evenly_and_counts_its_own_bytes(build):
    data = build()
    whole = data.eval('valid', 2, 16)
    some = data.eval('valid', 2, 16, batches=2)
    assert len(some) == 2 and some.tokens == len(targets_of(some)) < whole.tokens
    # With the byte tokenizer a target is a byte, in whatever part of a document.
    assert some.bytes == some.tokens
    rows = np.concatenate([b['tokens'] for b in whole])
    chosen = [np.flatnonzero((rows == r).all(1))[0] for b in some for r in b['tokens']]
    assert np.diff(chosen).min() >= len(whole) * 2 // 4 - 1
    assert len(data.eval('valid', 2, 16, batches=1000)) == len(whole)


def test_bytes_without_bos_leave_out_what_is_not_predicted(tmp_path):
    (tmp_path / 'one.txt').write_text('ab' * 500)
    block = {
        'kind': 'text',
        'path': str(tmp_path / 'one.txt'),
        'valid_fraction': 0.1,
        'tokenizer': {'kind': 'char'},
        'packing': 'stream',
    }
    data = dataset_lib.build(block, seq_len=8, cache_dir=tmp_path)
    assert data.info.bos_id is None and data.info.vocab_size == 2
    batches = data.eval('valid', 4, 8)
    # 100 characters are held out; nothing stands before the first of them.
    assert batches.tokens == batches.bytes == 99
    batch = data.train(4, 8, 0).batch(data.train(4, 8, 0).initial())
    assert batch['weights'].all()


def test_info_says_what_there_is(build):
    data = build(tokenizer={'kind': 'bpe', 'vocab_size': 300})
    info = data.info
    assert (info.kind, info.vocab_size, info.bos_id, info.eos_id) == ('text', 300, 299, 299)
    assert info.splits == ('train', 'valid')
    text = TEXTS[0]
    assert info.tokenizer.decode(info.tokenizer.encode(text)) == text
    described = json.loads(json.dumps(data.describe()))
    assert described['prepared']['jsonl']['train']['bytes'] == described['train']['bytes']
    assert info.digest == build(tokenizer={'kind': 'bpe', 'vocab_size': 300}).info.digest
    assert info.digest != build().info.digest


def test_text_is_tokenised_once(build, monkeypatch):
    first = build()
    monkeypatch.setattr(shards, 'prepare', None)  # a second preparation would fail
    again = build(seq_len=64, packing='split')
    assert again.info.digest == first.info.digest


def test_prepared_text_is_the_same_data(build, corpus, tmp_path):
    block = {'kind': 'bpe', 'vocab_size': 300}
    data = build(tokenizer=block)
    source = dataset_lib.build_source({'kind': 'jsonl', 'path': corpus, 'valid_fraction': 0.2}, 'x')
    kept = dataset_lib.build_tokenizer(source, block, tmp_path / 'cache')
    shards.prepare(source, kept, tmp_path / 'out')
    ready = dataset_lib.build({'kind': 'prepared', 'path': str(tmp_path / 'out')}, seq_len=16)
    assert ready.info.digest == data.info.digest
    assert [d.text for d in ready.documents('valid')] == [d.text for d in data.documents('valid')]
    one, two = (d.train(4, 16, 0) for d in (data, ready))
    np.testing.assert_array_equal(
        one.batch(one.initial())['tokens'], two.batch(two.initial())['tokens']
    )
    with pytest.raises(ConfigError, match='brings its own tokenizer; remove the key'):
        dataset_lib.build(
            {'kind': 'prepared', 'path': str(tmp_path / 'out'), 'tokenizer': block}, seq_len=16
        )


def test_images(tmp_path):
    data = dataset_lib.build({'kind': 'digits'}, seq_len=1)
    assert data.info.kind == 'image' and data.info.classes == 10
    assert data.info.image_shape == (8, 8, 1) and data.info.vocab_size == 0
    sampler = data.train(batch_size=5, seq_len=1, seed=0)
    batch = sampler.batch(sampler.initial())
    assert batch['image'].shape == (5, 8, 8, 1) and batch['weights'].all()
    batches = data.eval('valid', 100)
    assert sum(b['weights'].sum() for b in batches) == batches.tokens
    assert all(b['image'].shape == (100, 8, 8, 1) for b in batches)
    assert len(data.eval('valid', 10, batches=2)) == 2
    assert data.eval('valid', 10, batches=2).tokens == 20


@pytest.mark.parametrize(
    ('block', 'message'),
    [
        ({'kind': 'jsonI'}, r"unknown data source 'jsonI' at config.data.kind.*mean 'jsonl'"),
        ({'pth': 'x'}, r"config.data.pth: data source 'jsonl' takes no 'pth'.*mean 'path'"),
        ({'workers': -1}, r'config.data.workers must be an int of at least 0, got -1'),
        ({'cache': 3}, r'config.data.cache must be a folder, got 3'),
        ({'packin': 'x'}, r"config.data.packin: .*Did you mean 'packing'"),
        ({'packing': 'packed'}, r'config.data.packing must be one of pack, split, stream'),
        ({'valid_fraction': 'x'}, r'config.data.valid_fraction: expected float'),
        ({'tokenizer': {'kind': 'bpee'}}, r"unknown tokenizer 'bpee'.*mean 'bpe'"),
        ({'kind': 'digits', 'path': 'x'}, r"'digits' takes no 'path'"),
    ],
)
def test_bad_blocks_have_clear_messages(build, block, message):
    if 'kind' in block:
        with pytest.raises(ConfigError, match=message):
            dataset_lib.build(block, seq_len=16)
    else:
        with pytest.raises(ConfigError, match=message):
            build(**block)


def test_bad_data_has_clear_messages(build):
    with pytest.raises(ConfigError, match=r"'tokenizer' belongs to text; remove it"):
        dataset_lib.build({'kind': 'digits', 'tokenizer': {'kind': 'byte'}}, seq_len=16)
    with pytest.raises(DataError, match=r"no split 'test'; it has train, valid"):
        build().eval('test', 4, 16)
    with pytest.raises(DataError, match=r'jsonl/train has \d+ tokens, too few .* seq_len 100000'):
        build().train(4, 100_000, 0)
    with pytest.raises(DataError, match=r'held-out split .* is empty: valid_fraction 1e-09'):
        build(valid_fraction=1e-9)
    with pytest.raises(DataError, match=r"no split 'valid'; it has train"):
        build(valid_fraction=0.0).eval('valid', 4, 16)


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe', 'wordpiece'])
def test_trained_tokenizers_survive_a_copy(tmp_path, kind):
    sizes = {'bpe': {'vocab_size': 300}, 'wordpiece': {'vocab_size': 150}}
    block = {'kind': kind, **sizes.get(kind, {})}
    kept = tokenizer_copy.build(block, lambda: iter(TEXTS), tmp_path / 'cache', 'digest')
    kept.save(tmp_path / 'copy')
    loaded = tokenizer_copy.load(tmp_path / 'copy')
    assert loaded.tokenizer.digest == kept.tokenizer.digest
    for text in TEXTS[:5]:
        np.testing.assert_array_equal(loaded.tokenizer.encode(text), kept.tokenizer.encode(text))
    # A copy of a copy is the same again.
    loaded.save(tmp_path / 'again')
    assert tokenizer_copy.load(tmp_path / 'again').tokenizer.digest == kept.tokenizer.digest
    (tmp_path / 'copy' / 'tokenizer.json').write_text('{}')
    with pytest.raises(DataError, match='missing or damaged; prepare the data again'):
        tokenizer_copy.load(tmp_path / 'copy')


def test_tokenizer_files_are_copied(tmp_path, shared_data):
    folder = tmp_path / 'gpt2'
    folder.mkdir()
    found = {p.name: p for p in (shared_data / 'tokenizers').rglob('*') if p.is_file()}
    for name in ('encoder.json', 'vocab.bpe'):
        (folder / name).write_bytes(found[name].read_bytes())
    kept = tokenizer_copy.build(
        {'kind': 'gpt2', 'path': str(folder)}, lambda: iter(()), tmp_path, ''
    )
    kept.save(tmp_path / 'copy')
    for name in ('encoder.json', 'vocab.bpe'):
        (folder / name).unlink()
    loaded = tokenizer_copy.load(tmp_path / 'copy')
    assert loaded.tokenizer.digest == kept.tokenizer.digest
    loaded.save(tmp_path / 'again')
    assert tokenizer_copy.load(tmp_path / 'again').tokenizer.digest == kept.tokenizer.digest
