"""Mega against its paper in numpy, token by token and pair by pair, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers.mixers import mega
from effjax.layers.mixers.mega import Mega

WIDTH, LENGTH = 6, 23
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def make(causal=True, **kw):
    ctx = Context(width=WIDTH, policy=Policy(), causal=causal, bias=True, init='lecun', max_len=32)
    mixer = Mega(ctx, **{'key_dim': 4, 'value_dim': 5, 'averages': 3, **kw}, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.5 * rng.normal(size=p.shape).astype(np.float32), params)
    return nnx.merge(graphdef, params)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def turn(vector, t):
    """A vector whose pairs (i, i + K/2) are turned by t / 10000^(2 i / K)."""
    half = len(vector) // 2
    angle = t / 10000.0 ** (np.arange(half) / half)
    a, b = vector[:half], vector[half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def averages(p, x):
    """The damped averages of x [T, D], read: [T, D]."""
    strength, damping = sigmoid(p['strength']), sigmoid(p['damping'])
    average, out = np.zeros_like(strength), np.zeros_like(x)
    for t in range(len(x)):
        average = strength * p['enter'] * x[t][:, None] + (1 - strength * damping) * average
        out[t] = np.sum(p['leave'] * average, axis=1) / np.sqrt(average.shape[1])
    return out


def paper(p, x, *, chunk, weights, causal=True):
    """Mega for one sequence x [T, D] in float64: y with x + y = its output."""

    def linear(name, x):
        return x @ p[name]['kernel'] + p[name]['bias']

    m = averages(p['average'], x)
    if not causal:
        own = sigmoid(p['back']['strength']) * p['back']['enter'] * p['back']['leave']
        m = m + averages(p['back'], x[::-1])[::-1] - x * np.sum(own, 1) / np.sqrt(own.shape[1])
    m = silu(m + p['skip'] * x)
    z, v = silu(linear('shared', m)), silu(linear('value', x))
    q = z * p['query_scale'] + p['query_offset']
    k = z * p['key_scale'] + p['key_offset']
    o = np.zeros((len(x), v.shape[1]))
    for i in range(len(x)):
        first = 0 if chunk is None else i - i % chunk
        end = len(x) if chunk is None else min(first + chunk, len(x))
        keys = np.arange(first, i + 1 if causal else end)
        score = k[keys] @ q[i]
        bias = np.array([turn(p['query_position'], i) @ turn(p['key_position'], j) for j in keys])
        if weights == 'softmax':
            w = np.exp(score / np.sqrt(len(q[i])) + bias)
            w /= w.sum()
        else:
            w = 0.5 * (
                1
                + scipy.special.erf((score / len(keys) + bias - 0.707107) / (0.282095 * np.sqrt(2)))
            )
        o[i] = w @ v[keys]
    h = silu(linear('inward', m) + linear('out', o * silu(linear('reset', m))))
    return sigmoid(linear('update', m)) * (h - x)


QUICK = ((5, 'softmax'), (None, 'laplace'))
FORMS = pytest.mark.parametrize(
    ('chunk', 'weights'),
    [
        pytest.param(chunk, weights, marks=() if (chunk, weights) in QUICK else pytest.mark.ci)
        for chunk in (None, 5, 40)
        for weights in ('softmax', 'laplace')
    ],
)


@FORMS
def test_against_the_paper(chunk, weights, monkeypatch):
    """The whole, and nine tokens and the rest from their state; queries in blocks of 8."""
    monkeypatch.setattr(mega, 'QUERIES', 8)
    mixer = make(chunk=chunk, weights=weights)
    params = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH)))
    expected = [paper(params, row.astype(np.float64), chunk=chunk, weights=weights) for row in x]

    @jit
    def both(x):
        info = SeqInfo.of(2, LENGTH).positions
        whole = mixer(x, info=SeqInfo(info))[0]
        first, state, _ = mixer(x[:, :9], info=SeqInfo(info[:, :9]), return_state=True)
        second = mixer(x[:, 9:], info=SeqInfo(info[:, 9:]), state=state)[0]
        return whole, jnp.concatenate([first, second], 1)

    whole, joined = both(x)
    # float32 against float64
    np.testing.assert_allclose(whole, expected, atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(joined, expected, atol=2e-5, rtol=1e-4)


@FORMS
def test_both_ways_against_the_paper(chunk, weights, monkeypatch):
    """Alone, and packed: chunks count from a document's first token, wherever it stands."""
    monkeypatch.setattr(mega, 'QUERIES', 8)
    mixer = make(causal=False, chunk=chunk, weights=weights)
    params = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH)))
    facts = {'chunk': chunk, 'weights': weights, 'causal': False}
    call = jit(lambda x, info: mixer(x, info=info)[0])
    whole = call(x, SeqInfo.of(1, LENGTH))
    expected = paper(params, x[0].astype(np.float64), **facts)
    np.testing.assert_allclose(whole[0], expected, atol=2e-5, rtol=1e-4)
    ids = np.array([[1] * 8 + [0] * 2 + [2] * 13], np.int32)
    place = np.concatenate([np.arange(8), [0, 0], np.arange(13)])[None].astype(np.int32)
    packed = call(x, SeqInfo(jnp.asarray(place), jnp.asarray(ids)))
    for part in (slice(0, 8), slice(10, 23)):
        expected = paper(params, x[0, part].astype(np.float64), **facts)
        np.testing.assert_allclose(packed[0, part], expected, atol=2e-5, rtol=1e-4)


def test_the_rest_of_a_document_may_follow_padding():
    mixer = make(chunk=4)
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    info = SeqInfo.of(1, LENGTH).positions
    whole = mixer(x, info=SeqInfo(info))[0]
    _, state, _ = mixer(x[:, :9], info=SeqInfo(info[:, :9]), return_state=True)
    gap = 6
    padded = jnp.pad(x[:, 9:], ((0, 0), (gap, 0), (0, 0)), constant_values=7.0)
    place = jnp.pad(info[:, 9:], ((0, 0), (gap, 0)))
    ids = jnp.pad(jnp.ones_like(info[:, 9:]), ((0, 0), (gap, 0)))
    rest = mixer(padded, info=SeqInfo(place, ids), state=state)[0][:, gap:]
    np.testing.assert_allclose(rest, whole[:, 9:], atol=2e-5, rtol=1e-4)


def test_a_chunk_needs_no_square_of_the_length():
    def largest(length, chunk):
        mixer = make(chunk=chunk)
        x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
        jaxpr = jax.make_jaxpr(lambda x: mixer(x, info=SeqInfo.of(1, length))[0])(x)
        return max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)

    assert largest(1024, 8) <= 1024 * 64 < 1024 * 1024
    assert largest(1024, None) < 1024 * 1024


def test_the_state_of_a_chunk_does_not_grow():
    assert make(chunk=4).state_bytes(1, 8, jnp.float32) == make(chunk=4).state_bytes(
        1, 4096, jnp.float32
    )
    grown = make().state_bytes(1, 20, jnp.float32) - make().state_bytes(1, 10, jnp.float32)
    assert grown == 10 * 4 * (4 + 5)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match='mega over both directions has no decoding state'):
        make(causal=False).init_state(1, 4, jnp.float32)
    with pytest.raises(ConfigError, match='mega: chunk must be at least 1, got 0'):
        make(chunk=0)
    with pytest.raises(ConfigError, match='key_dim must be even'):
        make(key_dim=3)
    with pytest.raises(ConfigError, match="weights are 'softmax' or 'laplace', not 'relu2'"):
        make(weights='relu2')
    assert make(causal=False).state_bytes(1, 4, jnp.float32) == 0
    state = make(averages=2).init_state(2, 9, jnp.float32)
    with pytest.raises(ValueError, match='mega got the state of another config'):
        make()(jnp.zeros((2, 5, WIDTH)), info=SeqInfo.of(2, 5), state=state)
