"""Tiny models in float64 and train states for them, for the tests of this folder."""

import functools
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import models
from effjax.core import trees
from effjax.core.config import as_dict, defaults
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.core.registry import arguments, lookup
from effjax.growth import OPERATORS, plan
from effjax.models import MODELS
from effjax.models.setup import Execution, Setup

VOCAB, SEQ = 11, 6
MIXER = {'kind': 'attention', 'heads': 2}
DECODER = {
    'kind': 'decoder', 'vocab_size': VOCAB, 'width': 8, 'layers': 2,
    'mixer': MIXER, 'ffn': {'kind': 'gelu', 'hidden': 12},
}  # fmt: skip
# Forms of a model: between them every kind of leaf that may be widened.
FORMS = {
    'plain': DECODER,
    # grouped queries, norms of heads, biases, a gated part, a tied head, RMSNorm, rotation
    'llama': {
        **DECODER, 'bias': True,
        'mixer': {**MIXER, 'heads': 4, 'kv_heads': 2, 'head_dim': 2, 'qk_norm': True},
        'ffn': {'kind': 'swiglu', 'hidden': 6},
    },
    # an untied head, LayerNorm, learned positions, both parts behind one norm
    'gpt': {
        **DECODER, 'bias': True, 'tied': False, 'block': 'parallel',
        'norm': {'kind': 'layernorm', 'eps': 1e-5}, 'positions': {'kind': 'learned'},
        'mixer': {**MIXER, 'head_dim': 4},
    },
    # norms behind the sums, a product and a norm before the tied head
    'bert': {**DECODER, 'kind': 'encoder', 'mixer': {**MIXER, 'head_dim': 4}},
    # a narrow table with products around it, tied, without a transform
    'albert': {
        **DECODER, 'kind': 'encoder', 'mixer': {**MIXER, 'head_dim': 4}, 'embed_width': 5,
        'transform': False,
    },
    # an untied head of an encoder, two streams, no position's table
    'reversible': {
        **DECODER, 'kind': 'encoder', 'mixer': {**MIXER, 'head_dim': 4}, 'tied': False,
        'block': 'reversible', 'positions': {'kind': 'rope'},
    },
    'vit': {
        'kind': 'vit', 'image_size': 4, 'channels': 1, 'classes': 3, 'patch': 2, 'width': 8,
        'layers': 2, 'mixer': {**MIXER, 'head_dim': 4}, 'ffn': {'kind': 'gelu', 'hidden': 12},
    },
}  # fmt: skip


def config_of(model, **sizes):
    """A complete config; sizes are `layers`, `heads__mixer`, ... of its model."""
    config = as_dict(defaults())
    config |= {'steps': 1, 'seq_len': SEQ, 'precision': {'kind': 'fp32'}}
    config['model'] = as_dict(model)
    for name, value in sizes.items():
        node = config['model']
        *path, key = name.split('__')
        for part in path:
            node = node[part]
        node[key] = value
    return config


def doubled(model, **sizes):
    """The config of a form with everything but head_dim twice as wide."""
    mixer = model['mixer']
    twice = {
        'width': 2 * model['width'],
        'mixer__heads': 2 * mixer['heads'],
        'ffn__hidden': 2 * model['ffn']['hidden'],
    }
    if 'kv_heads' in mixer:
        twice['mixer__kv_heads'] = 2 * mixer['kv_heads']
    return config_of(model, **{**twice, **sizes})


def noise(abstract, dtype=jnp.float64, seed=0):
    """Arrays for a tree of shapes: noise, or 1 and noise for scales. Compiles nothing."""

    def fill(name, leaf):
        draw = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=leaf.shape)
        around_one = name.endswith('scale')
        return jnp.asarray(1 + 0.3 * draw if around_one else 0.5 * draw, dtype)

    return trees.map_named(fill, abstract)


class Model:
    """A config's model in float64: its shapes, its loss, and its logits, jitted."""

    def __init__(self, config):
        self.config = config
        component = lookup(MODELS, config['model']['kind'], 'model')
        setup = Setup(Policy('float64', 'float64'), Execution('scan'), SEQ)

        def make():
            return component(setup, **arguments(config['model']), rngs=nnx.Rngs(0))

        self.graphdef, abstract = models.split(nnx.eval_shape(make))
        self.abstract = abstract['params']
        self.logits = jax.jit(self.raw_logits)

    def raw_logits(self, params):
        model = models.merge(self.graphdef, {'params': params, 'buffers': {}})
        if self.config['model']['kind'] == 'vit':
            draw = np.random.default_rng(1).normal(size=(3, 4, 4, 1))
            return model(jnp.asarray(draw, jnp.float64), SeqInfo.of(3, 1))[0]
        tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, SEQ)), jnp.int32)
        hidden, _ = model(tokens, SeqInfo.of(2, SEQ))
        if hasattr(model, 'features'):
            return model.features(hidden) @ model.head_weight() + model.head_bias[...]
        return hidden @ model.head_weight()

    def loss(self, params):
        """Mean cross-entropy against fixed labels."""
        logits = jax.nn.log_softmax(self.raw_logits(params))
        labels = np.arange(logits[..., 0].size).reshape(logits.shape[:-1]) * 7 % logits.shape[-1]
        return -jnp.mean(jnp.take_along_axis(logits, jnp.asarray(labels)[..., None], -1))


@functools.cache
def _model(text):
    return Model(eval(text))  # a config as its own repr: plain dicts and numbers


def model_of(config):
    """The float64 model of a config, made once."""
    return _model(repr(config))


@functools.cache
def _built(text):
    return models.build(eval(text))


def make(operator, **kw):
    """An operator of its arguments."""
    return lookup(OPERATORS, operator, 'operator')(**kw)


def plan_of(small, large, operator):
    """What `growth.plan` says, on models that are built once a config."""
    return plan(small, large, operator, built=(_built(repr(small)), _built(repr(large))))


def state_of(params, optimizer_state=None, ema=None):
    """A train state around parameters."""
    return {
        'params': params,
        'buffers': {},
        'frozen': {},
        'optimizer': {} if optimizer_state is None else optimizer_state,
        'ema': {} if ema is None else ema,
        'loss_scale': {'scale': jnp.float32(8)},
        'step': jnp.int32(5),
        'stage': jnp.int32(1),
    }


@pytest.fixture(scope='session')
def lab():
    """The functions above, for test files."""
    return types.SimpleNamespace(
        forms=FORMS, decoder=DECODER, config_of=config_of, doubled=doubled, noise=noise,
        model_of=model_of, state_of=state_of, plan_of=plan_of, make=make,
        built_of=lambda config: _built(repr(config)),
    )  # fmt: skip


@pytest.fixture
def x64():
    """float64 for a test."""
    with jax.enable_x64(True):
        yield
