"""Mamba against transformers, its initial values, and what it refuses."""

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
from effjax.layers.mixers.mamba import Mamba

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'


def make(causal=True, width=12, **kw):
    ctx = Context(width=width, policy=Policy(), causal=causal)
    return Mamba(ctx, **kw, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(('file', 'norms'), [('mamba', False), ('falcon_mamba', True)])
def test_against_transformers(file, norms):
    """37 tokens in chunks of 8 and of 64; then 20 of them, and the rest from the state."""
    with np.load(GOLDEN / f'{file}.npz') as stored:
        golden = dict(stored)
    x, y = jnp.asarray(golden.pop('x')), golden.pop('y')
    mixer = make(state=5, dt_rank=3, norms=norms)
    graphdef, params = nnx.split(mixer)
    flat = {'/'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    assert {f'params/{name}' for name in flat} == set(golden)
    for name, leaf in flat.items():
        assert leaf[...].shape == golden[f'params/{name}'].shape, name
        leaf[...] = jnp.asarray(golden[f'params/{name}'])
    for chunk in (8, 64):
        mixer = nnx.merge(graphdef, params)
        mixer.chunk = chunk
        got = mixer(x, info=SeqInfo.of(2, 37))[0]
        # float32 on both sides
        np.testing.assert_allclose(got, y, atol=2e-5, rtol=2e-4)
    first, state, _ = mixer(x[:, :20], info=SeqInfo.of(2, 20), return_state=True)
    rest = SeqInfo(20 + SeqInfo.of(2, 17).positions)
    second = mixer(x[:, 20:], info=rest, state=state)[0]
    np.testing.assert_allclose(np.concatenate([first, second], 1), y, atol=2e-5, rtol=2e-4)


def test_starts_as_in_the_paper():
    mixer = make(width=32)
    assert mixer.rank == 2 and mixer.inner == 64
    np.testing.assert_allclose(np.exp(mixer.log_rate[...][3]), np.arange(1, 17), rtol=1e-5)
    step = np.log1p(np.exp(np.float64(mixer.step_bias[...])))
    assert np.all((step > 9e-4) & (step < 0.11)) and np.ptp(np.log(step)) > 3
    assert np.all(mixer.skip[...] == 1)
    meta = metadata(nnx.state(mixer, nnx.Param))
    for name in ('log_rate', 'step_bias', 'skip'):
        assert meta[name].no_decay and meta[name].keep_fp32


def test_what_it_refuses():
    with pytest.raises(ConfigError, match='mamba is causal.*use attention'):
        make(causal=False)
    with pytest.raises(ConfigError, match='mamba: dt_rank must be at least 1, got 0'):
        make(dt_rank=0)
    state = make(state=4).init_state(2, 9, jnp.float32)
    with pytest.raises(ValueError, match='mamba got the state of another config'):
        make()(jnp.zeros((2, 5, 12)), info=SeqInfo.of(2, 5), state=state)
