"""Rules from logical axes to mesh axes: resolver, fall-backs, constraints."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from effjax.core.axes import AXES, Meta
from effjax.core.config import MESH_AXES
from effjax.core.errors import ConfigError
from effjax.parallel import (
    DEFAULT_RULES,
    constrain,
    make_mesh,
    make_rules,
    mesh_context,
    resolve,
    shardings,
)


def _mesh(**sizes) -> AbstractMesh:
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))


def test_every_logical_axis_has_a_rule():
    assert set(AXES) | {'batch', 'sequence'} == set(DEFAULT_RULES)


@pytest.mark.parametrize(
    ('axes', 'shape', 'sizes', 'spec'),
    [
        (('embed', 'mlp'), (8, 16), {'fsdp': 4, 'tensor': 2}, P('fsdp', 'tensor')),
        (('vocab', 'embed'), (32, 8), {'fsdp': 4, 'tensor': 2}, P('tensor', 'fsdp')),
        (('layers', 'embed', 'heads', 'head_dim'), (3, 8, 4, 6), {'fsdp': 8}, P(None, 'fsdp')),
        (('layers', 'embed'), (3, 8), {'data': 8}, P()),
        (('embed', 'mlp'), (8, 16), {}, P()),
        ((None, 'mlp'), (8, 16), {'tensor': 2}, P(None, 'tensor')),
        (('batch', 'sequence'), (16, 8), {'data': 2, 'fsdp': 4}, P(('data', 'fsdp'))),
        (
            ('batch', 'sequence'),
            (16, 8),
            {'data': 2, 'expert': 2, 'sequence': 2},
            P(('data', 'expert'), 'sequence'),
        ),
        ((), (), {'data': 8}, P()),
    ],
)
def test_resolve_without_fallback(axes, shape, sizes, spec):
    fallbacks: list[str] = []
    assert resolve(axes, shape, _mesh(**sizes), fallbacks=fallbacks) == spec
    assert fallbacks == []


def test_fallback_where_it_does_not_divide():
    fallbacks: list[str] = []
    mesh = _mesh(fsdp=4, tensor=8)
    axes, shape = ('embed', 'kv_heads', 'head_dim'), (8, 2, 16)
    assert resolve(axes, shape, mesh, name='body/key', fallbacks=fallbacks) == P('fsdp')
    assert fallbacks == [
        "body/key: axis 'kv_heads' is not sharded over 'tensor': 2 is not divisible by tensor 8."
    ]


def test_fallback_where_a_mesh_axis_is_used_already():
    fallbacks: list[str] = []
    spec = resolve(('embed', 'embed'), (8, 8), _mesh(fsdp=4), name='w', fallbacks=fallbacks)
    assert spec == P('fsdp')
    assert fallbacks == [
        "w: axis 'embed' is not sharded over 'fsdp': it already shards axis 'embed'."
    ]


def test_several_mesh_axes_keep_those_that_divide():
    rules = make_rules({'embed': ('fsdp', 'data', 'tensor')})
    fallbacks: list[str] = []
    mesh = _mesh(data=3, fsdp=2, tensor=2)
    assert resolve(('embed',), (8,), mesh, rules, fallbacks=fallbacks) == P(('fsdp', 'tensor'))
    assert 'is not divisible by fsdp 2 x data 3' in fallbacks[0]


def test_overrides():
    rules = make_rules({'embed': ['fsdp', 'tensor'], 'mlp': None, 'vocab': 'fsdp'})
    assert (rules['embed'], rules['mlp'], rules['vocab']) == (('fsdp', 'tensor'), (), ('fsdp',))
    assert rules['heads'] == DEFAULT_RULES['heads']


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'embd': 'fsdp'}, "config.sharding.embd: unknown logical axis.*'embed'"),
        ({'embed': 'fsd'}, "config.sharding.embed: unknown mesh axis 'fsd'.*'fsdp'"),
        ({'embed': ('fsdp', 'fsdp')}, 'config.sharding.embed: a mesh axis occurs twice'),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_rules(overrides)


def test_names_must_fit_the_array():
    with pytest.raises(ValueError, match=r'body/w: 1 axis names .* for shape \(2, 3\)'):
        resolve(('embed',), (2, 3), _mesh(), name='body/w')
    with pytest.raises(ValueError, match="no sharding rule for the axis 'width'"):
        resolve(('width',), (2,), _mesh())


def test_tree_of_shardings():
    mesh = make_mesh({'data': 1})
    meta = {'a': {'w': Meta(('embed', 'mlp'))}}
    abstract = {'a': {'w': jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    tree, fallbacks = shardings(meta, abstract, mesh)
    assert tree['a']['w'].spec == P()
    assert tree['a']['w'].mesh == mesh
    assert fallbacks == []


def test_constrain_without_a_mesh_changes_nothing():
    x = jnp.ones((4, 6))
    assert constrain(x, ('batch', 'embed')) is x
    with mesh_context(make_mesh({'data': 1})):
        assert constrain(x, ('batch', 'embed')) is x
    with pytest.raises(ValueError, match='1 axis names'):
        constrain(x, ('batch',))


@pytest.mark.mesh
def test_fallbacks_of_a_tree_are_told():
    mesh = make_mesh({'fsdp': 8})
    meta = {'a': Meta(('embed',)), 'b': Meta(('embed',)), 'c': Meta(('embed',))}
    shapes = {'a': 3, 'b': 8, 'c': 5}
    abstract = {k: jax.ShapeDtypeStruct((n,), jnp.float32) for k, n in shapes.items()}
    tree, fallbacks = shardings(meta, abstract, mesh)
    assert {k: s.spec for k, s in tree.items()} == {'a': P(), 'b': P('fsdp'), 'c': P()}
    assert fallbacks == [
        "a: axis 'embed' is not sharded over 'fsdp': 3 is not divisible by fsdp 8.",
        "c: axis 'embed' is not sharded over 'fsdp': 5 is not divisible by fsdp 8.",
    ]


@pytest.mark.mesh
@pytest.mark.parametrize(
    ('sizes', 'shape', 'spec'),
    [
        ({'data': 2, 'fsdp': 2, 'tensor': 2}, (8, 4, 6), P(('data', 'fsdp'))),
        ({'data': 2, 'fsdp': 2, 'sequence': 2}, (8, 4, 6), P(('data', 'fsdp'), 'sequence')),
        ({'data': 2, 'fsdp': 2, 'tensor': 2}, (6, 4, 6), P('data')),
    ],
)
def test_constrain_shards_activations(sizes, shape, spec):
    """The batch takes data and fsdp; embed, which fsdp shards in parameters, stays whole."""
    with mesh_context(make_mesh(sizes)) as mesh:
        y = jax.jit(lambda x: constrain(x * 2, ('batch', 'sequence', 'embed')))(jnp.ones(shape))
        assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 3)


@pytest.mark.mesh
def test_constrain_uses_the_rules_of_the_context():
    with mesh_context(make_mesh({'data': 4, 'tensor': 2}), make_rules({'heads': None})) as mesh:
        y = jax.jit(lambda x: constrain(x, ('batch', None, 'heads')))(jnp.ones((4, 2, 2)))
        assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P('data')), 3)


@pytest.mark.mesh
def test_constrain_inside_shard_map_leaves_manual_axes_alone():
    with mesh_context(make_mesh({'data': 4, 'tensor': 2})):

        def f(x):
            return constrain(x, ('batch', 'heads')) * 2

        x = jnp.arange(16.0).reshape(8, 2)
        partly = jax.shard_map(f, in_specs=P('data'), out_specs=P('data'), axis_names={'data'})
        wholly = jax.shard_map(f, in_specs=P('data'), out_specs=P('data'))
        assert jnp.array_equal(jax.jit(partly)(x), 2 * x)
        assert jnp.array_equal(jax.jit(wholly)(x), 2 * x)
