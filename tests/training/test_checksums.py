"""Checksums: every kind of damage is found and named."""

import pytest

from effjax.training import checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'deep' / 'er').mkdir(parents=True)
    (tmp_path / 'a').write_bytes(b'first')
    (tmp_path / 'empty').write_bytes(b'')
    (tmp_path / 'deep' / 'er' / 'b').write_bytes(bytes(100_000))
    checksums.write(tmp_path)
    return tmp_path


def test_intact(folder):
    assert checksums.problem(folder) is None
    assert checksums.problem(folder, contents=False) is None
    (folder / '.DS_Store').write_bytes(b'not ours')
    assert checksums.problem(folder) is None


@pytest.mark.parametrize('where', [0, 50_000, 99_999])
def test_one_bit(folder, where):
    path = folder / 'deep' / 'er' / 'b'
    content = bytearray(path.read_bytes())
    content[where] ^= 16
    path.write_bytes(content)
    assert checksums.problem(folder) == 'deep/er/b: its checksum differs'
    assert checksums.problem(folder, contents=False) is None
    assert checksums.problem(folder, under='a') is None


def test_size_and_presence(folder):
    (folder / 'empty').write_bytes(b'x')
    assert checksums.problem(folder, contents=False) == 'empty: has 1 bytes, expected 0'
    (folder / 'empty').unlink()
    assert checksums.problem(folder, contents=False) == 'empty: is missing'
    (folder / 'empty').mkdir()
    assert checksums.problem(folder) == 'empty: is missing'


@pytest.mark.parametrize(
    'text', ['', '{}', '[]', '{"files": 3}', '{"files": {}, "list": ""}', 'null', '{"files": {"a":']
)
def test_list_that_is_not_one(folder, text):
    (folder / checksums.FILE).write_text(text)
    assert checksums.problem(folder) == 'checksums.json is damaged'


def test_list_that_cannot_be_read(folder):
    (folder / checksums.FILE).write_bytes(b'\xff\xfe')
    assert checksums.problem(folder) == 'checksums.json cannot be read (UnicodeDecodeError)'
    (folder / checksums.FILE).unlink()
    assert checksums.problem(folder) == 'checksums.json is missing: the save was interrupted'
