"""The RG-LRU against transformers and its paper's formulas, its slopes, and what it refuses."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers.mixers.rg_lru import RGLRU, _sqrt

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'


def make(causal=True, bias=False, width=12, **kw):
    ctx = Context(width=width, policy=Policy(), causal=causal, bias=bias)
    return RGLRU(ctx, **{'heads': 3, **kw}, rngs=nnx.Rngs(0))


def test_against_transformers():
    """37 tokens in chunks of 8 and of 64; then 20 of them, and the rest from the state."""
    with np.load(GOLDEN / 'rg_lru.npz') as stored:
        golden = dict(stored)
    x, y = jnp.asarray(golden.pop('x')), golden.pop('y')
    mixer = make(bias=True)
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
    mixer = make(width=300)
    a = np.exp(-np.logaddexp(0, np.float64(mixer.decay[...])))
    assert 0.9 <= a.min() < 0.91 and 0.995 < a.max() < 0.9991


def test_slope_where_nothing_decays():
    """Gates shut tight: 1 - a^2 is 0 and its root has no slope there; ours is bounded."""
    assert jax.grad(_sqrt)(0.0) == pytest.approx(1000) and jax.grad(_sqrt)(0.25) == 1
    mixer = make(bias=True)
    mixer.forget.bias[...] = jnp.full((3, 4), -200.0)
    x = jax.random.normal(jax.random.key(0), (1, 6, 12))
    graphdef, params = nnx.split(mixer)

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x, info=SeqInfo.of(1, 6))[0] ** 2)

    grads = jax.grad(loss, argnums=(0, 1))(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_what_it_refuses():
    with pytest.raises(ConfigError, match='rg_lru is causal.*use attention'):
        make(causal=False)
    with pytest.raises(ConfigError, match='rg_lru: heads 5 do not divide its 12 channels'):
        make(heads=5)
    with pytest.raises(ConfigError, match='rg_lru: conv must be at least 1, got 0'):
        make(conv=0)
