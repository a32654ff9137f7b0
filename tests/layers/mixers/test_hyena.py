"""Hyena against its authors' operator, and its filters and refusals."""

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
from effjax.layers.mixers.hyena import Hyena

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'


def make(max_len=40, causal=True, width=6, **kw):
    ctx = Context(width=width, policy=Policy(), causal=causal, max_len=max_len, init='lecun')
    return Hyena(ctx, **kw, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('order', [2, 3])
def test_against_the_authors_operator(order):
    """37 of at most 40 tokens, two frequencies of time."""
    with np.load(GOLDEN / 'hyena.npz') as file:
        golden = {k.removeprefix(f'{order}/'): v for k, v in file.items() if k[0] == str(order)}
    x, y = golden.pop('x'), golden.pop('y')
    mixer = make(order=order, filter_width=8, bands=2, bias=True)
    graphdef, params = nnx.split(mixer)
    flat = {'/'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    assert {f'params/{name}' for name in flat} == set(golden)
    for name, leaf in flat.items():
        assert leaf[...].shape == golden[f'params/{name}'].shape, name
        leaf[...] = jnp.asarray(golden[f'params/{name}'])
    got = nnx.merge(graphdef, params)(jnp.asarray(x), info=SeqInfo.of(*x.shape[:2]))[0]
    # float32 on both sides, transforms of other sizes
    np.testing.assert_allclose(got, y, atol=2e-5, rtol=2e-4)


def test_filters_fade_and_their_network_is_left_alone():
    mixer = make(max_len=64)
    h = np.asarray(mixer.filter(64, jnp.float32))
    assert h.shape == (64, 1, 6)
    # The last channel falls to 1 % within 0.3 of the longest sequence.
    assert np.abs(h[20:, 0, -1]).max() < 0.02 * np.abs(h[:, 0, -1]).max() + 1e-3
    np.testing.assert_allclose(mixer.filter(9, jnp.float32), h[:9], atol=1e-6)
    meta = metadata(nnx.state(mixer, nnx.Param))['filter']
    assert all(m.no_decay and m.keep_fp32 for m in meta.values())


def test_filters_may_start_near_0():
    mixer = make(max_len=64, filter_std=0.02)
    assert np.abs(mixer.filter(64, jnp.float32)).max() < 1e-3  # four layers of 0.02 sqrt(64)
    assert not np.any(mixer.filter.hidden_bias[...]) and not np.any(mixer.filter.first_bias[...])
    assert np.std(mixer.filter.hidden[...]) == pytest.approx(0.02, rel=0.05)
    assert np.abs(make(max_len=64).filter(64, jnp.float32)).max() > 0.03
    with pytest.raises(ConfigError, match='hyena: filter_std must be above 0 or None, got 0'):
        make(filter_std=0)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match='hyena is causal'):
        make(causal=False)
    with pytest.raises(ConfigError, match='hyena: order must be at least 2, got 1'):
        make(order=1)
    with pytest.raises(ConfigError, match='0 < fast <= slow; got 64, 0, 2, 0.3 and 1.5'):
        make(bands=0)
    x = jnp.zeros((1, 41, 6))
    with pytest.raises(ValueError, match='hyena: 41 tokens, but its filters are built for 40'):
        make()(x, info=SeqInfo.of(1, 41))
    with pytest.raises(ValueError, match='hyena: 50 tokens'):
        make().init_state(1, 50, jnp.float32)
    other = make(order=3).init_state(1, 8, jnp.float32)
    with pytest.raises(ValueError, match='hyena got the state of another config'):
        make().step(x[:, 0], other)
