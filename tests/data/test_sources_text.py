"""Text sources: order, splits, formats, and what they say about bad input."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from effjax.core.errors import ConfigError, DataError
from effjax.core.registry import check_block, lookup, parameters
from effjax.data import SOURCES
from effjax.data.dataset import build_source
from effjax.data.sources.files import chunks, optional
from effjax.data.sources.jsonl import Jsonl
from effjax.data.sources.parquet import Parquet
from effjax.data.sources.stdlib import Stdlib
from effjax.data.sources.text import TextFiles

TEXTS = [f'Text number {i}, é {"ab" * (i % 7)}\n' for i in range(60)]
PARTED = {'valid_fraction': 0.3}


def rows(texts=TEXTS):
    return ''.join(json.dumps({'text': t, 'name': f'n{i}'}) + '\n' for i, t in enumerate(texts))


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def text_folder(path):
    for i, text in enumerate(TEXTS):
        file = path / f'{i % 3}' / f'{i:03}.txt'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return TextFiles(path=str(path), **PARTED)


def text_glob(path):
    text_folder(path)
    return TextFiles(path=str(path / '*' / '*.txt'), **PARTED)


def jsonl_plain(path):
    (path / 'a.jsonl').write_text(rows())
    return Jsonl(path=str(path / 'a.jsonl'), **PARTED)


def jsonl_packed(path):
    half = len(TEXTS) // 2
    (path / 'a.jsonl.gz').write_bytes(gzip.compress(rows(TEXTS[:half]).encode()))
    # Two frames in one file, cut inside a line.
    data = rows(TEXTS[half:]).encode()
    (path / 'b.jsonl.zst').write_bytes(zst(data[:100]) + zst(data[100:]))
    return Jsonl(path=str(path), **PARTED)


def parquet_file(path):
    table = pyarrow.table({'text': TEXTS, 'n': list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, path / 'a.parquet', row_group_size=7)
    return Parquet(path=str(path), **PARTED)


MAKERS = [text_folder, text_glob, jsonl_plain, jsonl_packed, parquet_file]


@pytest.mark.parametrize('make', MAKERS)
def test_every_document_is_in_exactly_one_split_in_a_fixed_order(make, tmp_path):
    source = make(tmp_path)
    assert source.splits == ('train', 'valid')
    parts = {split: list(source.documents(split)) for split in source.splits}
    texts = [d.text for split in source.splits for d in parts[split]]
    assert sorted(texts) == sorted(TEXTS)
    assert not {d.text for d in parts['train']} & {d.text for d in parts['valid']}
    assert all(list(source.documents(split)) == parts[split] for split in source.splits)
    ids = [d.id for split in source.splits for d in parts[split]]
    assert len(set(ids)) == len(TEXTS)
    assert all(str(tmp_path) not in name for name in (*ids, source.name))  # no machine's paths
    said = source.describe()
    assert said['documents'] == len(TEXTS)
    assert said['bytes'] == sum(len(t.encode()) for t in TEXTS)
    assert said['valid']['documents'] == len(parts['valid'])
    json.dumps(said)


def test_all_formats_split_the_same_texts_the_same_way(tmp_path):
    held_out = []
    for i, make in enumerate(MAKERS):
        folder = tmp_path / str(i)
        folder.mkdir()
        held_out.append({d.text for d in make(folder).documents('valid')})
    assert all(h == held_out[0] for h in held_out)


def test_identical_documents_never_straddle_the_split(tmp_path):
    (tmp_path / 'a.jsonl').write_text(rows(TEXTS * 3))
    source = Jsonl(path=str(tmp_path), **PARTED)
    train, valid = ([d.text for d in source.documents(s)] for s in ('train', 'valid'))
    assert not set(train) & set(valid)
    assert len(valid) == 3 * len(set(valid))


def test_digest_follows_content_and_split(tmp_path):
    def described(texts, fraction):
        (tmp_path / 'a.jsonl').write_text(rows(texts))
        return Jsonl(path=str(tmp_path), valid_fraction=fraction).describe()

    base = described(TEXTS, 0.3)
    assert described(TEXTS, 0.3) == base
    assert described([*TEXTS[:-1], 'other'], 0.3)['corpus_digest'] != base['corpus_digest']
    resplit = described(TEXTS, 0.6)
    assert resplit['digest'] != base['digest']
    assert resplit['corpus_digest'] == base['corpus_digest']


def test_documents_are_streamed(tmp_path):
    (tmp_path / 'a.jsonl').write_text(rows() + 'not json\n')
    stream = Jsonl(path=str(tmp_path), valid_fraction=0.0).documents('train')
    assert next(stream).text == TEXTS[0]  # the bad line at the end has not been read
    with pytest.raises(DataError, match=r'a.jsonl:61 is not a JSON object'):
        list(stream)


def test_one_file_is_one_document_split_by_position(tmp_path):
    text = ''.join(TEXTS)
    (tmp_path / 'all.txt').write_bytes(text.encode())
    source = TextFiles(path=str(tmp_path / 'all.txt'), valid_fraction=0.1)
    assert source.one_document
    (train,), (valid,) = (list(source.documents(s)) for s in source.splits)
    assert train.text + valid.text == text
    assert len(train.text) == int(len(text) * 0.9)
    joined = text_folder(tmp_path / 'many')
    joined = TextFiles(path=str(tmp_path / 'many'), one_document=True, valid_fraction=0.1)
    assert len(list(joined.documents('train'))) == 1
    assert joined.describe()['documents'] == 2


def test_bytes_survive(tmp_path):
    data = 'a\r\nb\rc\u2028é\x00\n\ufeff'.encode()
    (tmp_path / 'a.txt').write_bytes(data)
    source = TextFiles(path=str(tmp_path / 'a.txt'), valid_fraction=0.0)
    (document,) = source.documents('train')
    assert document.text.encode() == data


def test_held_out_files_of_their_own_take_precedence(tmp_path):
    for name, texts in {'train': TEXTS[:40], 'valid': TEXTS[35:]}.items():
        (tmp_path / f'{name}.jsonl').write_text(rows(texts))
    source = Jsonl(path=str(tmp_path / 'train.jsonl'), valid_path=str(tmp_path / 'valid.jsonl'))
    assert [d.text for d in source.documents('valid')] == TEXTS[35:]
    assert [d.text for d in source.documents('train')] == TEXTS[:35]
    assert source.describe()['skipped_ids']['train.jsonl:36'] == 'also in the held-out split'


def test_tiny_shakespeare(shared_data):
    path = shared_data / 'tinyshakespeare' / 'input.txt'
    source = TextFiles(path=str(path), valid_fraction=0.1)
    said = source.describe()
    assert said['train']['bytes'] == 1_003_854
    assert said['valid']['bytes'] == 111_540


# Bad input: each message says what, where, and what to do.


@pytest.mark.parametrize(
    ('component', 'suffix'), [(TextFiles, 'txt'), (Jsonl, 'jsonl'), (Parquet, 'parquet')]
)
def test_missing_and_empty(component, suffix, tmp_path):
    (tmp_path / f'corpus.{suffix}x').write_bytes(b'')
    with pytest.raises(DataError, match=rf"no file.*corpus.{suffix}'.*mean 'corpus.{suffix}x'"):
        component(path=str(tmp_path / f'corpus.{suffix}'))
    with pytest.raises(DataError, match=r'set data.path|holds'):
        component(path=str(tmp_path), pattern='**/*.other')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match=r'is empty'):
        component(path=str(tmp_path / 'empty'))
    with pytest.raises(ConfigError, match=r'needs a path; set data.path'):
        component(path='')


def test_a_source_without_text(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'')
    source = TextFiles(path=str(tmp_path), valid_fraction=0.0)
    with pytest.raises(DataError, match=r"has no text in its split 'train'"):
        list(source.documents('train'))
    with pytest.raises(DataError, match=r'has no text'):
        source.describe()


def test_an_empty_held_out_split(tmp_path):
    (tmp_path / 'a.jsonl').write_text(rows(TEXTS[:2]))
    source = Jsonl(path=str(tmp_path), valid_fraction=1e-9)
    with pytest.raises(DataError, match=r'held-out split .* is empty: valid_fraction 1e-09'):
        list(source.documents('valid'))
    with pytest.raises(DataError, match=r"no split 'valid'; it has train. Set valid_fraction"):
        Jsonl(path=str(tmp_path), valid_fraction=0.0).documents('valid')
    with pytest.raises(DataError, match=r"no split 'test'; it has train, valid"):
        source.documents('test')
    with pytest.raises(ConfigError, match=r'valid_fraction must be in \[0, 1\), got 1.5'):
        Jsonl(path=str(tmp_path), valid_fraction=1.5)


def write_bad_utf8(path, kind):
    if kind == 'text':
        (path / 'bad.txt').write_bytes(b'abc \xff\n')
        (path / 'good.txt').write_bytes(b'good')
        return TextFiles, 'bad.txt'
    if kind == 'jsonl':
        (path / 'a.jsonl').write_bytes(b'{"text": "good"}\n{"text": "\xe9"}\n')
        return Jsonl, 'a.jsonl:2'
    if kind == 'surrogate':
        (path / 'a.jsonl').write_bytes(b'{"text": "good"}\n{"text": "half \\ud83d"}\n')
        return Jsonl, 'a.jsonl:2'
    table = pyarrow.table({'text': pyarrow.array([b'good', b'\xff'], pyarrow.binary())})
    pyarrow.parquet.write_table(table, path / 'a.parquet')
    return Parquet, 'a.parquet:2'


@pytest.mark.parametrize('kind', ['text', 'jsonl', 'surrogate', 'parquet'])
def test_not_utf8_is_refused_or_skipped_and_counted(kind, tmp_path):
    component, where = write_bad_utf8(tmp_path, kind)
    source = component(path=str(tmp_path), valid_fraction=0.0)
    with pytest.raises(DataError, match=rf"{where} is not UTF-8 .*on_bad_utf8='skip'"):
        list(source.documents('train'))
    source = component(path=str(tmp_path), valid_fraction=0.0, on_bad_utf8='skip')
    assert [d.text for d in source.documents('train')] == ['good']
    said = source.describe()
    assert (said['skipped'], said['documents']) == (1, 1)
    assert said['skipped_ids'][where].startswith('not UTF-8')
    with pytest.raises(ConfigError, match=r"on_bad_utf8 must be 'skip' or 'error'"):
        component(path=str(tmp_path), on_bad_utf8='drop')


def test_jsonl_errors(tmp_path):
    def first(line, **kw):
        (tmp_path / 'a.jsonl').write_text(line + '\n')
        return next(Jsonl(path=str(tmp_path), valid_fraction=0.0, **kw).documents('train'))

    with pytest.raises(DataError, match=r"a.jsonl:1 has no key 'txet'; .* mean 'text'"):
        first('{"text": "a"}', text_key='txet')
    with pytest.raises(DataError, match=r"a.jsonl:1: 'text' must be text, got int"):
        first('{"text": 3}')
    with pytest.raises(DataError, match=r"a.jsonl:1 is not a JSON object .*on_bad_line='skip'"):
        first('{"text": ')
    with pytest.raises(DataError, match=r'a list, not an object'):
        first('[1]')
    assert (
        first('{"text": \n\n\ufeff\n{"text": "b", "k": 7}', on_bad_line='skip', id_key='k').id
        == '7'
    )
    assert first('\ufeff{"text": "marked"}').text == 'marked'


def test_parquet_errors(tmp_path):
    path = tmp_path / 'a.parquet'
    pyarrow.parquet.write_table(pyarrow.table({'body': ['a', None], 'n': [1, 2]}), path)
    with pytest.raises(DataError, match=r"no column 'bodi'; it has body, n. Did you mean 'body'"):
        list(Parquet(path=str(path), text_key='bodi').documents('train'))
    with pytest.raises(DataError, match=r"column 'n' holds int64, not text"):
        list(Parquet(path=str(path), text_key='n').documents('train'))
    source = Parquet(path=str(path), text_key='body', valid_fraction=0.0)
    assert source.describe()['skipped_ids'] == {'a.parquet:2': 'null'}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r'a.parquet is not a whole parquet file'):
        list(Parquet(path=str(path)).documents('train'))


@pytest.mark.parametrize('suffix', ['gz', 'zst'])
def test_damaged_archives(suffix, tmp_path):
    data = rows().encode()
    packed = gzip.compress(data) if suffix == 'gz' else zst(data)
    file = tmp_path / f'a.jsonl.{suffix}'
    for broken in (packed[: len(packed) // 2], b'\x00' * 40 + packed[40:]):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=f'a.jsonl.{suffix} is damaged or truncated'):
            list(Jsonl(path=str(file), valid_fraction=0.0).documents('train'))


def test_a_flipped_byte_in_gzip_is_noticed(tmp_path):
    packed = bytearray(gzip.compress(rows().encode()))
    packed[len(packed) // 2] ^= 4
    (tmp_path / 'a.jsonl.gz').write_bytes(packed)
    with pytest.raises(DataError, match=r'a.jsonl.gz is damaged or truncated'):
        list(chunks(tmp_path / 'a.jsonl.gz'))


# The standard library.


@pytest.fixture(scope='module')
def stdlib():
    return Stdlib()


def test_stdlib_is_the_library_without_its_tests(stdlib):
    said = stdlib.describe()
    assert said['python'] == '.'.join(map(str, sys.version_info[:3]))
    assert said['documents'] > 300
    assert said['bytes'] > 4_000_000
    assert 0.02 < said['valid']['documents'] / said['documents'] < 0.08
    ids = [d.id for split in stdlib.splits for d in stdlib.documents(split)]
    assert {'os.py', 'json/decoder.py'} <= set(ids)
    parts = {part for name in ids for part in name.split('/')}
    assert not parts & {'test', 'tests', 'idle_test', 'site-packages', '__pycache__'}
    assert not any('_sysconfigdata' in name for name in ids)


def test_stdlib_splits_are_disjoint_and_repeatable(stdlib):
    train, valid = ([d.text for d in stdlib.documents(s)] for s in ('train', 'valid'))
    assert not set(train) & set(valid)
    assert valid == [d.text for d in Stdlib().documents('valid')]
    assert Stdlib().describe()['digest'] == stdlib.describe()['digest']


def test_a_python_without_source(monkeypatch, tmp_path):
    monkeypatch.setattr('sysconfig.get_path', lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r'no standard-library source'):
        Stdlib()


# The registry.


def test_registered_sources_have_typed_keyword_arguments():
    own_split = {'mixture', 'prepared', 'idx', 'none'}
    for kind in set(SOURCES) - own_split:
        component = lookup(SOURCES, kind, 'data source')
        allowed = parameters(component)
        if getattr(component, 'modality', '') == 'rows':  # of which any number can be made
            assert allowed['train'].annotation is allowed['valid'].annotation is int
        else:
            assert 'valid_fraction' in allowed
        assert all(p.annotation is not p.empty for p in allowed.values())


def test_no_data_is_only_to_be_looked_at():
    with pytest.raises(DataError, match="config.data.kind 'none' holds nothing to train on"):
        build_source({'kind': 'none'}, 'config.data')


def test_config_errors_suggest():
    with pytest.raises(ConfigError, match=r"unknown data source 'stdlip'.*mean 'stdlib'"):
        check_block(SOURCES, {'kind': 'stdlip'}, 'data source', 'config.data')
    with pytest.raises(ConfigError, match=r"takes no 'pth'.*mean 'path'"):
        check_block(SOURCES, {'kind': 'text', 'pth': 'x'}, 'data source', 'config.data')
    with pytest.raises(ConfigError, match=r"needs 'path'"):
        check_block(SOURCES, {'kind': 'jsonl'}, 'data source', 'config.data')


def test_importing_the_data_package_imports_nothing_heavy():
    code = (
        'import sys, effjax.data, effjax.data.tokenizers, effjax.data.sources.stdlib;'
        'heavy = {"tensorflow_datasets", "grain", "tokenizers", "pyarrow", "PIL", "jax"};'
        'print(sorted(heavy & set(sys.modules)))'
    )
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == '[]'


def test_a_missing_package_is_named():
    with pytest.raises(DataError, match=r'reading x needs the package nosuch: pip install nosuch'):
        optional('nosuch.part', 'reading x')
