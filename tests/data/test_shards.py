"""Prepared shards: written once and whole, read from mapped files, damage noticed."""

import json
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from effjax.core.errors import DataError
from effjax.data import shards, tokenizer_copy
from effjax.data.documents import Document


class Bytes:
    """A tokenizer of bytes that keeps itself; BOS is 256."""

    vocab_size, bos_id, digest = 257, 256, 'bytes'

    def encode_batch(self, texts):
        return [list(t.encode()) for t in texts]

    def decode(self, ids):
        return bytes(ids).decode()

    @property
    def tokenizer(self):
        return self

    def save(self, folder):
        folder.mkdir(parents=True)
        (folder / 'tokenizer.json').write_text('{}')


class Wide(Bytes):
    """The same with ids that need 32 bits."""

    vocab_size, digest = 70_000, 'wide'

    def encode_batch(self, texts):
        return [[b + 69_000 for b in t.encode()] for t in texts]


class Source:
    """Documents in memory."""

    modality, one_document, splits = 'text', False, ('train', 'valid')

    def __init__(self, train, valid=('held out',)):
        self._texts = {'train': train, 'valid': valid}

    def documents(self, split):
        for i, text in enumerate(self._texts[split]):
            yield Document(str(i), text, 'memory')

    def describe(self):
        return {'source': 'memory', 'digest': 'memory'}


TEXTS = ('alpha', 'bêta', '', 'gamma delta', 'x' * 30)


def tokens_of(stream):
    return stream.gather(np.array([0]), np.array([stream.size]), stream.size)[0].tolist()


@pytest.mark.parametrize('shard_tokens', [1 << 20, 1])
def test_what_is_written_is_read(tmp_path, shard_tokens, monkeypatch):
    monkeypatch.setattr(shards, '_BATCH_DOCUMENTS', 2)
    manifest = shards.prepare(Source(TEXTS), Bytes(), tmp_path / 'p', shard_tokens=shard_tokens)
    prepared = shards.open_prepared(tmp_path / 'p')
    assert prepared.manifest == json.loads(json.dumps(manifest))
    expected = [t for text in TEXTS if text for t in (256, *text.encode())]
    stream = prepared.splits['train']
    assert tokens_of(stream) == expected
    assert stream.starts.tolist() == [i for i, t in enumerate(expected) if t == 256]
    assert stream.raw_bytes.tolist() == [len(t.encode()) for t in TEXTS if t]
    facts = manifest['splits']['train']
    assert (facts['documents'], facts['without_tokens']) == (4, 1)
    assert facts['bytes'] == sum(len(t.encode()) for t in TEXTS)
    assert facts['tokens'] == stream.size == facts['bytes'] + 4
    assert len(facts['shards']) == (1 if shard_tokens > 1 else 3)
    assert manifest['dtype'] == '<u2' and (tmp_path / 'p/tokenizer/tokenizer.json').is_file()
    assert '4 documents' in shards.summary(manifest)


def test_large_vocabularies_take_32_bits(tmp_path):
    shards.prepare(Source(TEXTS), Wide(), tmp_path / 'p')
    prepared = shards.open_prepared(tmp_path / 'p')
    assert prepared.manifest['dtype'] == '<u4'
    assert max(tokens_of(prepared.splits['train'])) > 65_535


def test_progress_is_told(tmp_path):
    told = []
    shards.prepare(Source(TEXTS), Bytes(), tmp_path / 'p', progress=lambda *a: told.append(a))
    assert told == [('train', 4, 51, 51 + 4), ('valid', 1, 8, 9)]


def test_memory_does_not_grow_with_the_source(tmp_path):
    class Large(Source):
        def documents(self, split):
            for i in range(400 if split == 'train' else 1):
                yield Document(str(i), chr(97 + i % 26) * 40_000, 'large')

    tracemalloc.start()
    shards.prepare(Large(()), Bytes(), tmp_path / 'p')
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 16 MB of text as Python ints take 128 MB of pointers alone; a batch of 4 Mi characters a
    # quarter of that, and its arrays of 8 bytes as much again, some of them twice.
    assert peak < 150e6
    assert shards.open_prepared(tmp_path / 'p').splits['train'].size == 400 * 40_001


@pytest.mark.parametrize('part', ['tokens', 'documents'])
def test_damage_is_found(tmp_path, part):
    folder = tmp_path / 'p'
    shards.prepare(Source(TEXTS), Bytes(), folder)
    file = folder / f'train-00000.{part}'
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(
        DataError, match=rf'train-00000.{part} has \d+ bytes, not \d+ bytes; delete'
    ):
        shards.open_prepared(folder, verify=False)
    file.write_bytes(good[:7] + bytes([good[7] ^ 1]) + good[8:])
    with pytest.raises(DataError, match=rf'train-00000.{part} is damaged .*prepare it again'):
        shards.open_prepared(folder)
    shards.open_prepared(folder, verify=False)
    file.unlink()
    with pytest.raises(DataError, match=rf'train-00000.{part} is missing'):
        shards.open_prepared(folder)


def test_a_bad_manifest_is_found(tmp_path):
    with pytest.raises(DataError, match=r'holds no prepared data .*effjax.prepare --config'):
        shards.open_prepared(tmp_path / 'none')
    folder = tmp_path / 'p'
    shards.prepare(Source(TEXTS), Bytes(), folder)
    good = (folder / 'manifest.json').read_text()
    (folder / 'manifest.json').write_text(good.replace('memory', 'memorx'))
    with pytest.raises(DataError, match=r'manifest.json is damaged'):
        shards.open_prepared(folder)
    (folder / 'manifest.json').write_text(good[:-10])
    with pytest.raises(DataError, match=r'manifest.json is damaged'):
        shards.open_prepared(folder)


def test_another_format_is_refused(tmp_path, monkeypatch):
    shards.prepare(Source(TEXTS), Bytes(), tmp_path / 'p')
    monkeypatch.setattr(shards, 'FORMAT', 99)
    with pytest.raises(DataError, match='has format 1, this version reads 99; delete'):
        shards.open_prepared(tmp_path / 'p')


def test_an_interrupted_preparation_leaves_nothing(tmp_path):
    class Broken(Source):
        def documents(self, split):
            yield Document('0', 'text', 'broken')
            raise RuntimeError('cut')

    with pytest.raises(RuntimeError, match='cut'):
        shards.prepare(Broken(()), Bytes(), tmp_path / 'p')
    assert list(tmp_path.iterdir()) == []


def test_faults_have_clear_messages(tmp_path):
    with pytest.raises(DataError, match=r"split 'valid' is empty: .*give it some text"):
        shards.prepare(Source(TEXTS, valid=('',)), Bytes(), tmp_path / 'p')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').write_text('')
    with pytest.raises(DataError, match=r'full exists already; give a new folder'):
        shards.prepare(Source(TEXTS), Bytes(), tmp_path / 'full')
    with pytest.raises(DataError, match=r'cannot write prepared data to .*file/p'):
        shards.prepare(Source(TEXTS), Bytes(), tmp_path / 'full' / 'file' / 'p')
    with pytest.raises(DataError, match=r'cannot write to the cache .*set EFFJAX_CACHE or'):
        shards.cached(Source(TEXTS), Bytes(), tmp_path / 'full' / 'file')
    small = Bytes()
    small.vocab_size = 100
    with pytest.raises(DataError, match='gave id 256 but has a vocabulary of 100'):
        shards.prepare(Source(TEXTS), small, tmp_path / 'p')


def test_the_cache_is_used_and_two_writers_agree(tmp_path):
    source, told = Source(TEXTS), []
    first = shards.cached(source, Bytes(), tmp_path, progress=lambda *a: told.append(a))
    assert told
    told.clear()
    again = shards.cached(source, Bytes(), tmp_path, progress=lambda *a: told.append(a))
    assert not told and again.folder == first.folder and again.digest == first.digest
    assert shards.cached(source, Wide(), tmp_path).folder != first.folder
    assert not list(tmp_path.rglob('*.lock'))
    # A second writer that finds the folder finished meanwhile keeps what is there.
    with shards._replaced(tmp_path / 'race') as mine:
        (mine / 'manifest.json').write_text('mine')
        with shards._replaced(tmp_path / 'race') as theirs:
            (theirs / 'manifest.json').write_text('theirs')
    assert (tmp_path / 'race' / 'manifest.json').read_text() == 'theirs'
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_processes_that_need_the_same_text_tokenise_it_once(tmp_path):
    class Slow(Source):
        passes = 0

        def documents(self, split):
            Slow.passes += split == 'train'
            time.sleep(0.1)
            return super().documents(split)

    # A lock belongs to an open file: threads are as good as processes here.
    def use():
        return shards.cached(Slow(TEXTS), Bytes(), tmp_path).digest

    with ThreadPoolExecutor(4) as pool:
        digests = {future.result() for future in [pool.submit(use) for _ in range(4)]}
    assert len(digests) == 1 and Slow.passes == 1


_PROGRAM = """
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'grain', 'apache_beam', 'torch', 'tokenizers'):
    sys.modules[name] = None  # importing it raises ImportError
from effjax.data import build
from effjax.data.loader import Loader
dataset = build(dict(kind='prepared', path=sys.argv[1]), seq_len=8)
sampler = dataset.train(batch_size=4, seq_len=8, seed=0)
with Loader(sampler, sampler.initial()) as loader:
    batch, position, waited = next(loader)
assert batch['tokens'].shape == (4, 8) and waited >= 0
print(dataset.eval('valid', 2, 8).bytes)
"""


def test_reading_needs_no_data_library(tmp_path):
    kept = tokenizer_copy.build({'kind': 'byte'}, lambda: iter(()), tmp_path, '')
    shards.prepare(Source(TEXTS * 3), kept, tmp_path / 'p')
    done = subprocess.run(
        [sys.executable, '-c', _PROGRAM, str(tmp_path / 'p')], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['8']
