"""H3 against the paper's two recurrences in numpy, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers.mixers.h3 import H3

WIDTH, LENGTH = 6, 13


def make(causal=True, **kw):
    ctx = Context(width=WIDTH, policy=Policy(), causal=causal, init='lecun')
    return H3(ctx, **kw, rngs=nnx.Rngs(0))


def paper(p, x):
    """One sequence [T, D] in float64: the shift as a matrix on its state, A diagonal."""
    q, k, v = (
        np.einsum('td,dhk->thk', x, p[name]['kernel']) + p[name]['bias']
        for name in ('query', 'key', 'value')
    )
    taps = p['shift']['kernel'][::-1]  # the authors' C: the newest key first
    step, shift = np.exp(p['log_step']), np.zeros_like(taps)
    a = -np.exp(p['log_rate']) + 1j * p['angle']
    c = p['read_real'] + 1j * p['read_imag']
    decay, write = np.exp(a * step[:, None]), (np.exp(a * step[:, None]) - 1) / a
    heads, dim = q.shape[1:]
    state = np.zeros((heads, dim, dim, a.shape[1]), complex)
    y = np.zeros((len(x), heads, dim))
    for t in range(len(x)):
        shift = np.concatenate([k[t : t + 1], shift[:-1]])
        key = np.sum(taps * shift, axis=0) + p['key_skip'] * k[t]
        kv = key[:, :, None] * v[t][:, None, :]
        state = decay[:, None, None] * state + write[:, None, None] * kv[..., None]
        read = 2 * np.sum(c[:, None, None] * state, axis=-1).real
        y[t] = np.einsum('hk,hkv->hv', q[t], read + p['skip'][:, None, None] * kv)
    return np.einsum('thk,hkd->td', y, p['out']['kernel']) + p['out']['bias']


@pytest.mark.parametrize(
    'config', [{}, {'head_dim': 2, 'shift': 3}, {'shift': 32}], ids=['one', 'heads', 'long']
)
def test_against_the_paper(config):
    mixer = make(**{'state': 6, 'bias': True, 'chunk': 4, **config})
    params = jax.tree.map(
        lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    )
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    expected = np.stack([paper(params, row) for row in np.asarray(x, np.float64)])
    info = SeqInfo.of(2, LENGTH)
    convolved = mixer(x, info=info)[0]
    scanned = mixer(x, info=info, return_state=True)[0]
    # float32 against float64
    np.testing.assert_allclose(convolved, expected, atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(scanned, expected, atol=2e-5, rtol=1e-4)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match='h3 is causal'):
        make(causal=False)
    with pytest.raises(ConfigError, match='h3: head_dim 4 does not divide width 6'):
        make(head_dim=4)
    with pytest.raises(ConfigError, match='h3: state must be even and chunk at least 1, got 3'):
        make(state=3)
    with pytest.raises(ConfigError, match='at least one tap, not 0'):
        make(shift=0)
    small = make(state=4).init_state(2, 9, jnp.float32)
    with pytest.raises(ValueError, match='h3 got the state of another config'):
        make(state=8).step(jnp.zeros((2, WIDTH)), small)
