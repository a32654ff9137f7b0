"""Mamba-2 against transformers, its initial values, and what it refuses."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.axes import metadata
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers.mixers.mamba2 import Mamba2

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'


def make(causal=True, width=12, **kw):
    ctx = Context(width=width, policy=Policy(), causal=causal)
    return Mamba2(ctx, **{'head_dim': 6, 'state': 5, **kw}, rngs=nnx.Rngs(0))


def test_against_transformers():
    """Two groups of two heads, 37 tokens; then 20 of them, and the rest from the state."""
    with np.load(GOLDEN / 'mamba2.npz') as stored:
        golden = dict(stored)
    x, y = jnp.asarray(golden.pop('x')), golden.pop('y')
    mixer = make(groups=2)
    graphdef, params = nnx.split(mixer)
    flat = {'/'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    assert {f'params/{name}' for name in flat} == set(golden)
    for name, leaf in flat.items():
        assert leaf[...].shape == golden[f'params/{name}'].shape, name
        leaf[...] = jnp.asarray(golden[f'params/{name}'])
    mixer = nnx.merge(graphdef, params)
    got = mixer(x, info=SeqInfo.of(2, 37))[0]
    # float32 on both sides
    np.testing.assert_allclose(got, y, atol=2e-5, rtol=2e-4)
    first, state, _ = mixer(x[:, :20], info=SeqInfo.of(2, 20), return_state=True)
    rest = SeqInfo(20 + SeqInfo.of(2, 17).positions)
    second = mixer(x[:, 20:], info=rest, state=state)[0]
    np.testing.assert_allclose(np.concatenate([first, second], 1), y, atol=2e-5, rtol=2e-4)


def test_starts_as_in_the_paper():
    mixer = make(width=192)
    rates = np.exp(mixer.log_rate[...])
    assert mixer.heads == 64 and np.all((rates >= 1) & (rates <= 16)) and np.ptp(rates) > 10
    step = np.log1p(np.exp(np.float64(mixer.step_bias[...])))
    assert np.all((step > 9e-4) & (step < 0.11)) and np.ptp(np.log(step)) > 3
    assert np.all(mixer.skip[...] == 1)
    meta = metadata(nnx.state(mixer, nnx.Param))
    for name in ('log_rate', 'step_bias', 'skip'):
        assert meta[name].no_decay and meta[name].keep_fp32


def test_sizes_that_cannot_be_are_said():
    for kw, message in (
        ({'state': 0}, 'mamba2: state must be at least 1'),
        ({'head_dim': 5}, 'mamba2: 1 groups of heads of 5 do not divide 2 x width 12'),
        ({'groups': 3}, 'mamba2: 3 groups of heads of 6 do not divide'),
        ({'causal': False}, 'mamba2 is causal'),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**kw)
