"""Tiny models for the tests of this folder."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import models
from effjax.core import trees
from effjax.core.policy import Policy
from effjax.models.decoder import Decoder
from effjax.models.setup import Execution, Setup

TINY = {
    'vocab_size': 31,
    'width': 16,
    'layers': 4,
    'mixer': {'kind': 'attention', 'heads': 2},
    'ffn': {'kind': 'gelu', 'hidden': 32},
}


def filled(abstract):
    """Arrays for a tree of shapes: noise, or 1 and noise for scales. Compiles nothing."""

    def fill(name, leaf):
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
        around_one = name.rsplit('/', 1)[-1] in ('scale', 'alpha', 'beta', 'gamma')
        return jnp.asarray(1 + 0.1 * noise if around_one else 0.3 * noise, leaf.dtype)

    return trees.map_named(fill, abstract)


@pytest.fixture(scope='session')
def fill():
    """`fill(make) -> module`: the module that `make()` builds, its parameters being noise."""

    def run(make):
        graphdef, abstract = models.split(nnx.eval_shape(make))
        return models.merge(graphdef, filled(abstract))

    return run


@pytest.fixture(scope='session')
def make_decoder(fill):
    """`make_decoder(run='scan', remat='none', compute='float32', seq_len=16, init=None, **config)`.

    Its parameters are noise, so that nothing is at the special values of an initialisation; with
    `init` they are initialised by that scheme.
    """

    def make(run='scan', remat='none', compute='float32', seq_len=16, init=None, **config):
        setup = Setup(Policy(compute=compute), Execution(run, remat), seq_len)
        config = {**TINY, **config, 'init': init or 'gpt2'}

        def real():
            return Decoder(setup, **config, rngs=nnx.Rngs(params=jax.random.key(0)))

        return fill(real) if init is None else real()

    return make


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, tokens, info):
    model = models.merge(graphdef, state)
    hidden, _ = model(tokens, info)
    return hidden, model.logits(hidden)


@pytest.fixture(scope='session')
def forward():
    """`forward(model, tokens, info) -> (hidden, logits)`, compiled once a structure and shape."""

    def run(model, tokens, info):
        return _forward(*models.split(model), tokens, info)

    return run


@pytest.fixture(scope='session')
def tokens():
    """int32 [2, 16] in the tiny vocabulary."""
    return jax.random.randint(jax.random.key(1), (2, 16), 0, TINY['vocab_size'])
