"""DeltaNet and Gated DeltaNet against their papers in numpy, and against Qwen3-Next's."""

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
from effjax.layers.mixers.deltanet import DeltaNet
from effjax.layers.mixers.gated_deltanet import GatedDeltaNet

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'
WIDTH, LENGTH, HEADS = 12, 9, 2


def make(kind=DeltaNet, causal=True, init='lecun', **kw):
    ctx = Context(width=WIDTH, policy=Policy(), causal=causal, init=init)
    return kind(ctx, **{'heads': HEADS, **kw}, rngs=nnx.Rngs(0))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def paper(p, x, *, negative, gate):
    """DeltaNet for one sequence x [T, D], token by token in float64."""

    def inward(name):
        own = p['inputs'][name]
        y = np.einsum('td,dhk->thk', x, own['linear']['kernel'])
        if 'conv' not in own:
            return silu(y)
        taps = own['conv']['kernel']
        out = np.zeros_like(y)
        for t in range(len(y)):
            for back in range(min(t + 1, len(taps))):
                out[t] += taps[-1 - back] * y[t - back]
        return silu(out)

    q, k, v = (inward(name) for name in ('query', 'key', 'value'))
    beta = sigmoid(x @ p['beta']['kernel']) * (2 if negative else 1)
    o = np.zeros_like(v)
    for h in range(q.shape[1]):
        s = np.zeros((q.shape[2], v.shape[2]))
        for t in range(len(x)):
            query, key = (a[t, h] / np.linalg.norm(a[t, h]) for a in (q, k))
            old = key @ s
            s = s + beta[t, h] * np.outer(key, v[t, h] - old)
            o[t, h] = query @ s / np.sqrt(len(query))
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-6) * p['norm']['scale']
    if gate:
        o = o * silu(np.einsum('td,dhk->thk', x, p['gate']['linear']['kernel']))
    return np.einsum('thk,hkd->td', o, p['out']['kernel'])


@pytest.mark.parametrize(
    'config',
    [{}, {'conv': 0, 'negative': True}, {'gate': True, 'key_dim': 4, 'value_dim': 3, 'chunk': 4}],
    ids=['plain', 'negative', 'gated'],
)
def test_against_the_paper(config):
    mixer = make(**config)
    params = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH)))
    y = mixer(jnp.asarray(x), info=SeqInfo.of(2, LENGTH))[0]
    facts = {'negative': config.get('negative', False), 'gate': config.get('gate', False)}
    expected = np.stack([paper(params, row.astype(np.float64), **facts) for row in x])
    # float32 against float64; the norm of a first token's small output enlarges its error
    np.testing.assert_allclose(y, expected, atol=3e-5, rtol=1e-4)


def test_gated_against_transformers():
    """37 tokens in chunks of 8 and of 64, as Qwen3-Next computes them."""
    with np.load(GOLDEN / 'gated_deltanet.npz') as file:
        golden = dict(file)
    x, y = golden.pop('x'), golden.pop('y')
    mixer = make(GatedDeltaNet, key_dim=5, value_dim=6)
    graphdef, params = nnx.split(mixer)
    flat = {'/'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    assert {f'params/{name}' for name in flat} == set(golden)
    for name, leaf in flat.items():
        assert leaf[...].shape == golden[f'params/{name}'].shape, name
        leaf[...] = jnp.asarray(golden[f'params/{name}'])
    for chunk in (8, 64):
        mixer = nnx.merge(graphdef, params)
        mixer.chunk = chunk
        got = mixer(jnp.asarray(x), info=SeqInfo.of(*x.shape[:2]))[0]
        # float32 on both sides
        np.testing.assert_allclose(got, y, atol=2e-5, rtol=2e-4)


def test_decays_start_as_in_the_paper():
    mixer = make(GatedDeltaNet, heads=6)
    strength = np.exp(mixer.log_strength[...])
    step = np.log1p(np.exp(np.float64(mixer.rate_bias[...])))
    assert np.all((strength > 0) & (strength < 16)) and np.all((step > 9e-4) & (step < 0.11))
    log_decay = mixer._log_decay(jnp.zeros((1, 1, WIDTH)))
    np.testing.assert_allclose(log_decay[0, 0], -strength * step, rtol=1e-5)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match='deltanet is causal.*use attention'):
        make(causal=False)
    with pytest.raises(ConfigError, match='gated_deltanet: heads 5 do not divide width 12'):
        make(GatedDeltaNet, heads=5)
    with pytest.raises(ConfigError, match='deltanet: value_dim must be at least 1, got 0'):
        make(value_dim=0)
    with pytest.raises(ConfigError, match='deltanet: conv must be at least 0 taps, got -1'):
        make(conv=-1)
    small = make(heads=1).init_state(2, 9, jnp.float32)
    x = jnp.zeros((2, LENGTH, WIDTH))
    with pytest.raises(ValueError, match='deltanet got the state of another config'):
        make()(x, info=SeqInfo.of(2, LENGTH), state=small)
