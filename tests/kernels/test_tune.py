"""Sizes come from a device's table, else from the rule; `tune` writes what is fastest and right."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.errors import DataError, DeviceError
from effjax.kernels import choice, diagonal_scan, sizes, tune

RULE = {'size': 16, 'width': 128}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes this device's table: text, or entries."""
    monkeypatch.setattr(sizes, 'TABLES', tmp_path)
    file = sizes.file_of(jax.devices()[0].device_kind)

    def write(found):
        sizes.read.cache_clear()
        file.write_text(found if isinstance(found, str) else json.dumps({'entries': found}))
        return file

    yield write
    sizes.read.cache_clear()


def test_sizes_are_the_tables_where_it_has_any(table):
    table({'scan decay=float32': {'sizes': {'size': 32, 'width': 128}}})
    assert sizes.tuned('scan', 'decay=float32', RULE) == {'size': 32, 'width': 128}
    assert sizes.tuned('scan', 'decay=complex64', RULE) == RULE
    assert sizes.tuned('other', 'decay=float32', RULE) == RULE
    with choice.target('tpu'):  # planned for another device than the one at hand
        assert sizes.tuned('scan', 'decay=float32', RULE) == RULE
    with sizes.trying('scan', {'size': 64, 'width': 128}):
        assert sizes.tuned('scan', 'decay=float32', RULE)['size'] == 64
    assert sizes.tuned('scan', 'decay=float32', RULE)['size'] == 32


def test_bad_tables_are_said(table):
    table({'scan a': {'sizes': {'rows': 32}}})
    with pytest.raises(
        DataError, match=r'"scan a" has the sizes \[\'rows\'\], but the kernel takes'
    ):
        sizes.tuned('scan', 'a', RULE)
    for text in ('{', '[]', '{"entries": {"scan a": 3}}'):
        table(text)
        with pytest.raises(DataError, match='is damaged; delete it'):
            sizes.tuned('scan', 'a', RULE)


def test_the_tables_of_the_package_are_whole():
    for file in sizes.TABLES.glob('*.json'):
        read = sizes.read(file)
        assert sizes.file_of(read['device']) == file
        known = {t.name: t for kind in ('gpu', 'tpu') for t in tune.tunables(f'pallas_{kind}')}
        for name, entry in read['entries'].items():
            assert set(entry['sizes']) == set(known[name].rule)
            assert 0 < entry['ms'] <= entry['rule_ms']


@pytest.mark.parametrize('implementation', ['pallas_gpu', 'pallas_tpu'])
def test_every_size_reaches_its_kernel(implementation):
    """Each tunable's program changes with its sizes."""
    platform = implementation.removeprefix('pallas_')
    for one in tune.tunables(implementation):
        few = tuple(
            jax.ShapeDtypeStruct((1, 256, *x.shape[2:]) if x.ndim > 2 else x.shape, x.dtype)
            for x in one.example
        )
        one = dataclasses.replace(one, example=few)
        other = next(found for found in one.sizes if found != one.rule)

        def traced(found, one=one):
            def f(*arrays):  # jax keeps traces of the same function
                o, pull = jax.vjp(one.run, *arrays)
                return pull(o) if one.backward else o

            with sizes.trying(one.kernel, found):
                return str(jax.make_jaxpr(f)(*one.example))

        with choice.target(platform):
            assert traced(one.rule) != traced(other), one.name


def toy(run, **changes):
    rule = {'n': 1}
    shape = jax.ShapeDtypeStruct((2, 8, 3), jnp.float32)
    values = {
        'kernel': 'toy', 'shapes': 'any', 'implementation': 'xla', 'rule': rule,
        'sizes': tuple({'n': n} for n in (1, 2, 3, 4)), 'example': (shape, shape), 'run': run,
        'backward': True, **changes,
    }  # fmt: skip
    return tune.Tunable(**values)


def test_what_is_fastest_and_right_is_written(tmp_path, capsys, monkeypatch):
    seen = []

    def run(x, a):
        n = sizes.tuned('toy', 'any', {'n': 1})['n']
        seen.append(n)
        if n == 3:
            raise ValueError('too much shared memory\nand more')
        y = diagonal_scan(x, -jnp.abs(a), implementation='xla')
        return y * 2 if n == 2 else y

    seconds = iter((4.0, 1.0))  # of the rule, and of 4: the others are never timed
    monkeypatch.setattr(tune, '_seconds', lambda *_: next(seconds))
    file = tmp_path / 'tables' / 'toy.json'
    file.parent.mkdir()
    file.write_text(json.dumps({'device': 'cpu', 'entries': {'older': {'sizes': {}}}}))
    tune.tune([toy(run)], file)
    saved = json.loads(file.read_text())
    entry = saved['entries']['toy any']
    assert entry['sizes'] == {'n': 4} and (entry['ms'], entry['rule_ms']) == (1000.0, 4000.0)
    assert 'older' in saved['entries'] and set(seen) == {1, 2, 3, 4}
    printed = capsys.readouterr().out
    assert "{'n': 2}: left out, its results are 3.0e+00 from the rule's" in printed
    assert "{'n': 3}: left out, ValueError: too much shared memory\n" in printed
    assert '4.00 times the speed of its rule' in printed
    assert not list(file.parent.glob('.*'))


def test_a_gain_within_noise_leaves_the_rule(tmp_path, monkeypatch):
    seconds = iter((1.0, 0.99))
    monkeypatch.setattr(tune, '_seconds', lambda *_: next(seconds))

    def run(x, a):
        return diagonal_scan(x, -jnp.abs(a), implementation='xla')

    tune.tune([toy(run, sizes=({'n': 1}, {'n': 2}))], tmp_path / 'toy.json')
    entry = json.loads((tmp_path / 'toy.json').read_text())['entries']['toy any']
    assert entry['sizes'] == {'n': 1} and entry['ms'] == entry['rule_ms'] == 1000.0


def test_really_timed(tmp_path):
    def run(x, a):
        return diagonal_scan(x, -jnp.abs(a), implementation='xla')

    tune.tune([toy(run, sizes=())], tmp_path / 'toy.json', calls=1, rounds=1)
    entry = json.loads((tmp_path / 'toy.json').read_text())['entries']['toy any']
    assert entry['ms'] > 0 and entry['example'] == ['float32[2, 8, 3]'] * 2


def test_another_implementation_than_asked_for_is_an_error(tmp_path):
    def run(x, a):
        return diagonal_scan(x, -jnp.abs(a), implementation='reference')

    with pytest.raises(DeviceError, match='toy any: reference ran in place of xla'):
        tune.tune([toy(run)], tmp_path / 'toy.json')

    def broken(x, a):
        raise ValueError('nothing works')

    with pytest.raises(DeviceError, match='toy any: its own sizes do not run: nothing works'):
        tune.tune([toy(broken)], tmp_path / 'toy.json')


def test_it_needs_an_accelerator():
    with pytest.raises(DeviceError, match='no kernel has sizes to tune on cpu'):
        tune.main([])
    assert np.isclose(tune._apart([jnp.ones(4)], [jnp.full(4, 2.0)]), 0.5)
