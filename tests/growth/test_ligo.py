"""LiGO: its special cases bit for bit, and maps that can be learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import trees
from effjax.core.errors import ConfigError
from effjax.growth import transform

pytestmark = pytest.mark.usefixtures('x64')


def grown(lab, small, large, operator, **kw):
    instance = lab.make(operator, **kw)
    params = lab.noise(lab.model_of(small).abstract)
    change = lab.plan_of(small, large, instance)
    return params, transform(lab.state_of(params), change, instance)['params']


@pytest.mark.parametrize(
    ('depth', 'operator'), [('stackbert', 'stack'), ('interlace', 'interpolate')]
)
def test_equal_widths_are_stacking_and_interpolation(lab, depth, operator):
    small, large = (lab.config_of(lab.decoder, layers=n) for n in (2, 6))
    _, a = grown(lab, small, large, 'ligo', depth=depth)
    _, b = grown(lab, small, large, operator)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sel_is_a_selection_of_rows_and_columns(lab):
    small, large = lab.config_of(lab.decoder), lab.doubled(lab.decoder)
    old, new = (trees.flatten(t) for t in grown(lab, small, large, 'ligo', width='sel'))
    for name, x in old.items():
        expected = x
        for dim, size in enumerate(new[name].shape):
            expected = jnp.take(expected, np.arange(size) % x.shape[dim], axis=dim)
        np.testing.assert_array_equal(new[name], expected, err_msg=name)


def test_both_are_the_composition(lab):
    """Depth and width by one-hot maps: stacking, then selection."""
    small, middle = lab.config_of(lab.decoder), lab.config_of(lab.decoder, layers=4)
    large = lab.doubled(lab.decoder, layers=4)
    _, a = grown(lab, small, large, 'ligo', depth='stackbert', width='sel')
    _, deep = grown(lab, small, middle, 'stack')
    instance = lab.make('ligo', width='sel')
    change = lab.plan_of(middle, large, instance)
    b = transform(lab.state_of(deep), change, instance)['params']
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_maps_have_the_shapes_of_the_paper_and_rows_of_sum_one(lab):
    small, large = lab.config_of(lab.forms['llama']), lab.doubled(lab.forms['llama'], layers=4)
    instance = lab.make('ligo')
    maps = instance.init_maps(lab.plan_of(small, large, instance), 0)
    slot = 'body/segment_0/slot_0'
    shapes = {name: m.shape for name, m in maps['width'].items()}
    assert shapes == {
        'embed': (8, 8),
        f'{slot}/mixer:query': (4, 8, 8),
        f'{slot}/mixer:key': (4, 4, 4),
        f'{slot}/mixer:value': (4, 4, 4),
        f'{slot}/ffn:mlp': (4, 6, 6),
    }
    assert all(m.shape == (4, 2) for m in maps['depth'].values())
    assert f'{slot}/mixer/query/bias' in maps['depth']  # mixed apart from its weight
    for m in jax.tree.leaves(maps):
        np.testing.assert_allclose(m.sum(-1), 1, rtol=1e-6)


def test_maps_get_gradients_and_learned_ones_are_used(lab):
    small, large = lab.config_of(lab.decoder), lab.doubled(lab.decoder, layers=4)
    initial = lab.make('ligo')
    change = lab.plan_of(small, large, initial)
    params = lab.noise(lab.model_of(small).abstract)
    maps = initial.init_maps(change, 0)

    def size(maps):
        learned = lab.make('ligo', maps=maps)
        out = transform(lab.state_of(params), change, learned)['params']
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out))

    grads = jax.jit(jax.grad(size))(maps)
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    a, b = (
        transform(lab.state_of(params), change, lab.make('ligo', **kw))['params']
        for kw in ({}, {'maps': maps})
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    with pytest.raises(ConfigError, match="'ligo' grows no moments: .* use moments='reset'."):
        leaf = change.leaves['embedding/table']
        initial.bind(change, 0)(leaf, params['embedding']['table'], 'first')
    del maps['width']['embed']
    with pytest.raises(
        ConfigError, match=r"'ligo' got maps of another change \(width/embed \(8, 8\) is missing\)"
    ):
        lab.make('ligo', maps=maps).bind(change, 0)
