"""RWKV-4 against transformers, its initial values, and what it refuses."""

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
from effjax.layers.mixers.rwkv4 import RWKV4

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'


def make(causal=True, **kw):
    ctx = Context(width=12, policy=Policy(), causal=causal)
    return RWKV4(ctx, **kw, rngs=nnx.Rngs(0))


def test_against_transformers():
    """37 tokens, the same forty times as large, and cut in two."""
    with np.load(GOLDEN / 'rwkv4.npz') as stored:
        golden = dict(stored)
    x, y, loud = (golden.pop(name) for name in ('x', 'y', 'loud'))
    mixer = make(inner=10)
    graphdef, params = nnx.split(mixer)
    flat = {'/'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    assert {f'params/{name}' for name in flat} == set(golden)
    for name, leaf in flat.items():
        assert leaf[...].shape == golden[f'params/{name}'].shape, name
        leaf[...] = jnp.asarray(golden[f'params/{name}'])
    mixer = nnx.merge(graphdef, params)
    got = mixer(jnp.asarray(x), info=SeqInfo.of(2, 37))[0]
    # float32 on both sides
    np.testing.assert_allclose(got, y, atol=2e-5, rtol=2e-4)
    got = mixer(jnp.asarray(40 * x), info=SeqInfo.of(2, 37))[0]
    # Keys of a hundred: an exponent's last digit moves its weight by 1e-5.
    np.testing.assert_allclose(got, loud, atol=1e-2, rtol=1e-3)
    first, state, _ = mixer(jnp.asarray(x[:, :20]), info=SeqInfo.of(2, 20), return_state=True)
    rest = SeqInfo(20 + SeqInfo.of(2, 17).positions)
    second = mixer(jnp.asarray(x[:, 20:]), info=rest, state=state)[0]
    np.testing.assert_allclose(np.concatenate([first, second], 1), y, atol=2e-5, rtol=2e-4)


def test_starts_as_its_authors_do():
    mixer = make()
    rate = np.exp(np.float64(mixer.log_rate[...]))
    assert np.all(np.diff(rate) > 0) and rate[0] == pytest.approx(np.exp(-5))
    np.testing.assert_allclose(np.exp(mixer.bonus[...][:3]), 0.3 * np.exp([0, 0.5, -0.5]), 1e-5)
    meta = metadata(nnx.state(mixer, nnx.Param))
    assert all(meta[name].no_decay and meta[name].keep_fp32 for name in ('log_rate', 'bonus'))


def test_what_cannot_be_is_said():
    for kw, message in (({'inner': 0}, 'inner must be'), ({'causal': False}, 'rwkv4 is causal')):
        with pytest.raises(ConfigError, match=message):
            make(**kw)
