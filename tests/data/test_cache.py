"""The cache: whole files or none, damage noticed, clear errors."""

import pytest

from effjax.core.errors import DataError
from effjax.data import cache


def test_environment_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('EFFJAX_CACHE', str(tmp_path))
    assert cache.root() == tmp_path
    monkeypatch.delenv('EFFJAX_CACHE')
    assert cache.root().parts[-2:] == ('.cache', 'effjax')


def test_json_round_trip_leaves_no_other_file(tmp_path):
    path = tmp_path / 'a' / 'b.json'
    cache.write_json(path, {'x': [1, 'é\n']})
    assert cache.read_json(path) == {'x': [1, 'é\n']}
    assert [p.name for p in path.parent.iterdir()] == ['b.json']


def test_any_truncation_or_flipped_byte_counts_as_absent(tmp_path):
    path = tmp_path / 'a.json'
    cache.write_json(path, {'merges': ['ab', 'cd']})
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert cache.read_json(path) is None
    for n in range(len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :])
        assert cache.read_json(path) in (None, {'merges': ['ab', 'cd']})
    assert cache.read_json(tmp_path / 'none.json') is None


def test_remember_computes_once_and_again_after_damage(monkeypatch, tmp_path):
    monkeypatch.setenv('EFFJAX_CACHE', str(tmp_path))
    calls = []

    def compute():
        calls.append(1)
        return [1, 2]

    for _ in range(2):
        assert cache.remember('kind', {'a': 1}, compute) == [1, 2]
    assert len(calls) == 1
    next((tmp_path / 'kind').iterdir()).write_bytes(b'{"checksum"')
    assert cache.remember('kind', {'a': 1}, compute) == [1, 2]
    assert len(calls) == 2
    assert cache.remember('kind', {'a': 2}, compute) == [1, 2]
    assert len(calls) == 3


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match=r'cannot write the cache file .* set EFFJAX_CACHE'):
        cache.write_json(tmp_path / 'file' / 'a.json', 1)
