"""The encoder: transformers' BERT, the published sizes, its costs, and what it refuses."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import models
from effjax.core import trees
from effjax.core.config import load
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.costs import walk
from effjax.models.encoder import MASK, Encoder
from effjax.models.setup import Setup
from effjax.tasks.masked_lm import MaskedLM

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETUP = Setup(Policy(compute='float32'), seq_len=10)
TINY = {
    'vocab_size': 19,
    'width': 12,
    'layers': 2,
    'mixer': {'kind': 'attention', 'heads': 2},
    'ffn': {'kind': 'gelu', 'hidden': 20},
}


def make(**changes):
    return Encoder(SETUP, **{**TINY, **changes}, rngs=nnx.Rngs(params=jax.random.key(0)))


@pytest.fixture(scope='module')
def golden():
    """The arrays of tests/golden/make_bert.py."""
    with np.load(ROOT / 'tests' / 'golden' / 'bert.npz') as file:
        return {name: jnp.asarray(file[name]) for name in file.files}


def test_transformers_bert_has_the_same_logits(golden):
    graphdef, abstract = models.split(nnx.eval_shape(make))
    flat = trees.flatten(abstract['params'])
    assert {f'params/{name}' for name in flat} == set(golden) - {'tokens', 'logits'}
    params = trees.map_named(lambda name, _: golden[f'params/{name}'], abstract['params'])
    model = models.merge(graphdef, {'params': params, 'buffers': {}})
    tokens = golden['tokens']
    assert jnp.any(tokens == MASK)
    hidden, _ = model(tokens, SeqInfo.of(*tokens.shape))
    # float32 through two layers whose activations reach 10.
    np.testing.assert_allclose(model.logits(hidden), golden['logits'], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(('size', 'published'), [('base', 108.9e6), ('large', 334.1e6)])
def test_the_published_sizes_have_their_parameters(size, published):
    config = load(str(ROOT / 'configs' / f'bert.py:{size}'))
    with config.unlocked():
        config.model.vocab_size = 30522
    built = models.build(config)
    params = built.abstract_state['params']
    assert built.model.param_count() == trees.count(params)
    # Without the head, and the mask, which is one of the 30522 there; two token types are missing.
    own = ('head_bias', 'transform', 'transform_norm', 'mask_token')
    count = trees.count({k: v for k, v in params.items() if k not in own})
    assert abs(count + 2 * built.model.width - published) < 0.05e6


@pytest.mark.parametrize(
    'options', [{}, {'transform': False, 'embed_width': 8}], ids=['', 'narrow']
)
def test_parts_equal_the_walk(options):
    """Attention counts all pairs, and the head works at the hidden places alone."""
    task = MaskedLM({}, rate=0.3)
    rows, length = 2, 10
    graphdef, state = models.split(nnx.eval_shape(lambda: make(**options)))
    batch = {
        'tokens': jax.ShapeDtypeStruct((rows, length), jnp.int32),
        'weights': jax.ShapeDtypeStruct((rows, length), jnp.float32),
    }

    def loss(state, batch):
        info = SeqInfo.of(rows, length)
        return task.evaluate(models.merge(graphdef, state), batch, info)['loss'][0]

    result = walk(loss, state, batch, strict=True)
    model = models.merge(graphdef, state)
    costs = task.cost(model, rows, length)
    assert sum(c.params for c in costs.values()) == trees.count(state['params'])
    assert costs['attention'].matmul == 2 * (
        2 * rows * length * 12 * 4 * 12 + 4 * rows * 2 * 6 * length**2
    )
    assert result.total == sum(c.model_flops for c in costs.values())
    assert costs['head'].model_flops * length == 3 * model.cost(rows, length)['head'].model_flops
    assert not any(c.state_bytes for c in costs.values())


def test_both_sides_are_seen_and_a_mask_hides_its_token():
    model = make(block='sequential', final_norm=True, positions={'kind': 'rope'})
    tokens = jnp.arange(10)[None] % 7
    info = SeqInfo.of(1, 10)
    plain = model(tokens, info)[0]
    for place in (0, 9):
        other = model(tokens.at[0, place].set(11), info)[0]
        assert np.all(np.any(np.asarray(plain != other), axis=-1))
    hidden = [model(t.at[0, 4].set(MASK), info)[0] for t in (tokens, tokens.at[0, 4].set(12))]
    np.testing.assert_array_equal(*hidden)


def test_it_does_not_generate(tmp_path):
    with pytest.raises(ConfigError, match="'encoder' generates no text.*use a 'decoder'"):
        make().init_state(1, 4)
    from effjax import generate

    (tmp_path / 'config.json').write_text('{"model": {"kind": "encoder"}}')
    with pytest.raises(ConfigError, match="holds a 'encoder', which generates no text"):
        generate.load(tmp_path)
