"""Tiny models for the tests of this folder."""

import jax
import pytest
from flax import nnx

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


@pytest.fixture(scope='session')
def make_decoder():
    """`make_decoder(layers='scan', remat='none', compute='float32', seq_len=16, **config)`."""

    def make(run='scan', remat='none', compute='float32', seq_len=16, **config):
        setup = Setup(Policy(compute=compute), Execution(run, remat), seq_len)
        return Decoder(setup, **{**TINY, **config}, rngs=nnx.Rngs(params=jax.random.key(0)))

    return make


@pytest.fixture(scope='session')
def tokens():
    """int32 [2, 16] in the tiny vocabulary."""
    return jax.random.randint(jax.random.key(1), (2, 16), 0, TINY['vocab_size'])
