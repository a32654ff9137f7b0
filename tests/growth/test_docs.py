"""The page on growth: its example runs, its table names every operator and argument."""

import re

import jax.numpy as jnp
import pytest

from effjax.core import trees
from effjax.core.registry import lookup, parameters
from effjax.growth import OPERATORS


@pytest.fixture
def page(repository):
    return (repository / 'docs' / 'growth.md').read_text()


def test_every_operator_and_argument_is_documented(page):
    docstrings = {n: lookup(OPERATORS, n, 'operator').__doc__ for n in OPERATORS}
    assert all(f'| `{name}` |' in page for name in OPERATORS)
    for name, text in docstrings.items():
        operator = lookup(OPERATORS, name, 'operator')
        described = ''.join(c.__doc__ or '' for c in operator.__mro__)
        missing = [a for a in parameters(operator) if f'{a}: ' not in described]
        assert text and not missing, (name, missing)


def test_the_example_runs(lab, page):
    code = re.search(r'```python\n(.*?)```', page, re.DOTALL)[1]
    config = lab.config_of({**lab.decoder, 'width': 64, 'mixer': {'kind': 'attention', 'heads': 4}})
    params = lab.noise(lab.built_of(config).abstract_state['params'], jnp.float32)
    names = {'config': config, 'state': lab.state_of(params, {'mu': params})}
    names['state']['optimizer'] = _fresh(lab, config, params)
    exec(code, names)
    state, optimizer = names['state'], names['optimizer_of'](names['wide'])
    table = state['params']['embedding']['table']
    assert table.shape[1] == 128
    expected = trees.flatten(optimizer.abstract_state(state['params']))
    assert trees.differences(expected, trees.flatten(state['optimizer'])) == []


def _fresh(lab, config, params):
    from effjax.training import optimizers

    meta = lab.built_of(config).meta['params']
    return optimizers.build(config['optimizer'], meta=meta).init(params)
