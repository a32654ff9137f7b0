"""`build`: abstract, cheap, and the same parameters whatever runs or shards them."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import models
from effjax.core import trees
from effjax.core.axes import Meta
from effjax.core.config import as_dict, defaults
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.models import build, init_params


def config(**changes):
    out = as_dict(defaults())
    out |= {'steps': 1, 'seq_len': 16, 'precision': {'kind': 'fp32'}}
    out['model'] = {
        'kind': 'decoder', 'vocab_size': 31, 'width': 16, 'layers': 2,
        'mixer': {'kind': 'attention', 'heads': 2}, 'ffn': {'kind': 'gelu', 'hidden': 32},
    }  # fmt: skip
    for path, value in changes.items():
        node = out
        *keys, last = path.split('__')
        for key in keys:
            node = node[key]
        node[last] = value
    return out


def test_unpacks_as_graphdef_state_shardings():
    built = build(config())
    _, state, shardings = built
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    metas = jax.tree.leaves(built.meta)
    leaves = jax.tree.leaves(state)
    assert all(isinstance(m, Meta) for m in metas) and len(metas) == len(leaves)
    for meta, leaf in zip(metas, leaves, strict=True):
        assert len(meta.axes) == leaf.ndim
    body = jax.tree.leaves(built.meta['params']['body'])
    assert all(m.stacked for m in body)
    assert not built.meta['params']['embedding']['table'].stacked


SMALL = {'model__layers': 1, 'model__ffn': None, 'model__vocab_size': 32}


@pytest.fixture(scope='module')
def initialised():
    """A built model and its state, with one block: initialisers compile slowly."""
    built = build(config(**SMALL))
    return built, init_params(built, jax.random.key(0))


def test_initialisation_fits_the_abstract_state_and_runs(initialised):
    built, state = initialised
    assert trees.differences(trees.flatten(built.abstract_state), trees.flatten(state)) == []
    model = models.merge(built.graphdef, state)
    hidden, _ = model(jnp.zeros((2, 16), jnp.int32), SeqInfo.of(2, 16))
    assert hidden.shape == (2, 16, 16)


def test_initial_values_depend_on_the_key_only(initialised):
    """The programs that initialise for another execution are the same, letter for letter."""

    def program(**changes):
        built = build(config(**changes))
        init = jax.make_jaxpr(lambda key: models.split(built.make(nnx.Rngs(params=key)))[1])
        return str(init(jax.random.key(0)))

    a = program(execution__layers='scan')
    assert a == program(execution__layers='unroll', execution__remat='full')
    assert a == program(execution__layers='scan', mesh__data=1)
    built, state = initialised
    other = init_params(built, jax.random.key(1))
    table = other['params']['embedding']['table']
    assert not np.array_equal(table, state['params']['embedding']['table'])


def test_keys_are_strings():
    def check(node):
        if isinstance(node, dict):
            assert all(isinstance(key, str) for key in node)
            for child in node.values():
                check(child)

    check(build(config()).abstract_state)


def test_a_large_model_is_built_without_memory():
    before = len(jax.live_arrays())
    model = config(
        model__width=12288, model__layers=96, model__vocab_size=50257,
        model__mixer={'kind': 'attention', 'heads': 96},
        model__ffn={'kind': 'gelu', 'hidden': 49152},
    )  # fmt: skip
    start = time.monotonic()
    assert build(model).model.param_count() > 170e9
    assert time.monotonic() - start < 20
    assert len(jax.live_arrays()) - before < 10  # keys at most


def test_execution_choices_reach_the_model():
    built = build(config(execution__layers='scan', execution__remat='dots'))
    (segment,) = built.model.body.describe()
    assert (segment['layers'], segment['remat']) == ('scan', 'dots')


def test_the_implementation_of_attention_reaches_mixers_that_do_not_name_one():
    def chosen(**changes):
        model = build(config(execution__attention='xla', **changes)).model
        return model.body.segment_0.slot_0.mixer.implementation

    assert chosen() == 'xla'
    named = {'kind': 'attention', 'heads': 2, 'implementation': 'reference'}
    assert chosen(model__mixer=named) == 'reference'


def test_precision_reaches_the_model():
    built = build(config(precision={'kind': 'bf16'}))
    assert built.model.compute_dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(built.abstract_state)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model__kind': 'decodr'}, r"unknown model 'decodr' at config\.model.*'decoder'"),
        ({'model__widht': 3}, r"config\.model\.widht: model 'decoder' takes no 'widht'.*'width'"),
        ({'model__width': 16.5}, r'config\.model\.width: expected int, got 16\.5'),
        ({'seq_len': 64, 'model__max_len': 32}, r'config\.seq_len 64 is longer than the 32'),
        ({'model__segments': [{'pattern': [{'mixer': {'kind': 'attention', 'heads': 3}}]}],
          'model__layers': 0}, r'config\.model\.segments\.0\.pattern\.0\.mixer'),
    ],
)  # fmt: skip
def test_bad_configs_are_refused_before_anything_compiles(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(config(**changes))


def test_split_and_merge_are_inverse(initialised):
    built, state = initialised
    _, again = models.split(models.merge(built.graphdef, state))
    jax.tree.map(np.testing.assert_array_equal, state, again)


@pytest.mark.mesh
@pytest.mark.parametrize('mesh', [{'data': 8}, {'data': 1, 'fsdp': 4, 'tensor': 2}])
def test_initialised_sharded_and_equal_on_every_mesh(mesh):
    one = init_params(build(config(**SMALL, mesh__data=1)), jax.random.key(0))
    sizes = {f'mesh__{axis}': size for axis, size in mesh.items()}
    built = build(config(**SMALL, **sizes))
    state = init_params(built, jax.random.key(0))
    # The random bits are the same; a vectorised tail of the normal's inverse rounds differently.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, state)
    table = state['params']['embedding']['table']
    assert len(table.sharding.device_set) == 8
