"""Mixers over a matrix that decays, each against its paper's equations in numpy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.core.registry import arguments, check_block
from effjax.costs import walk
from effjax.kernels import dplr, linear_recurrence
from effjax.layers.mixers import MIXERS

WIDTH, LENGTH, HEADS = 12, 9, 2
IDS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 2, 2, 3, 3, 0, 0]], np.int32)


def make(kind, causal=True, width=WIDTH, **kw):
    block = {'kind': kind, **({} if kind in ('mamba2', 'rwkv4') else {'heads': HEADS}), **kw}
    ctx = Context(width=width, policy=Policy(), causal=causal, init='lecun', depth=2, max_len=32)
    component = check_block(MIXERS, block, 'mixer', 'mixer')
    return component(ctx, **arguments(block), rngs=nnx.Rngs(0))


def run(kind, paper, **kw):
    """Ours with random parameters against `paper(parameters, x [T, D])`, document by document."""
    mixer = make(kind, **kw)
    graphdef, params = nnx.split(mixer)
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(params)
    params = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), params)
    x = rng.normal(size=(2, LENGTH, mixer.width)).astype(np.float32)
    positions = np.array([[np.sum(r[:t] == r[t]) for t in range(LENGTH)] for r in IDS], np.int32)
    info = SeqInfo(jnp.asarray(positions), jnp.asarray(IDS))
    y = np.asarray(nnx.merge(graphdef, params)(jnp.asarray(x), info=info)[0])
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for row, document in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
        at = IDS[row] == document
        expected = paper(wide, np.float64(x[row, at]))
        np.testing.assert_allclose(y[row, at], expected, atol=2e-5, rtol=2e-4)
    return mixer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def heads(p, x):
    return np.einsum('td,dhk->thk', x, p['linear']['kernel'])


def conv(p, x):
    """[T, H, K] with the taps [N, H, K], oldest first."""
    taps = p['conv']['kernel']
    padded = np.concatenate([np.zeros((len(taps) - 1, *x.shape[1:])), x])
    return np.stack([np.sum(taps * padded[t : t + len(taps)], 0) for t in range(len(x))])


def rms(x, eps=0.0):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)


def turn(x):
    """Rotary positions on [T, H, K]."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def retnet(p, x):
    """The paper's parallel form with all three normalisations of its scores."""
    q, k, v = (heads(p['inputs'][name], x) for name in ('query', 'key', 'value'))
    q, k = turn(q), turn(k) * k.shape[-1] ** -0.5
    out = np.zeros_like(v)
    for h in range(HEADS):
        i, j = np.indices((len(x), len(x)))
        d = np.where(i >= j, (1 - 2.0 ** (-5 - h)) ** np.maximum(i - j, 0), 0)
        scores = q[:, h] @ k[:, h].T * d / np.sqrt(d.sum(1, keepdims=True))
        scores /= np.maximum(np.abs(scores.sum(1, keepdims=True)), 1)
        out[:, h] = rms(scores @ v[:, h])
    out *= silu(heads(p['gate'], x))
    return np.einsum('thv,hvd->td', out, p['out']['kernel'])


def gla(p, x, convolved=False):
    q, k, v = (heads(p['inputs'][name], x) for name in ('query', 'key', 'value'))
    if convolved:
        names = ('query', 'key', 'value')
        q, k, v = (conv(p['inputs'][n], y) for n, y in zip(names, (q, k, v), strict=True))
    low = x @ p['decay_in']['kernel']
    logits = np.einsum('tr,rhk->thk', low, p['decay_out']['kernel']) + p['decay_bias']
    alpha = sigmoid(logits) ** (1 / 16)
    out = np.zeros_like(v)
    for h in range(HEADS):
        s = np.zeros((q.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            s = alpha[t, h][:, None] * s + np.outer(k[t, h], v[t, h])
            out[t, h] = q[t, h] @ s / np.sqrt(q.shape[-1])
    out = rms(out, 1e-6) * p['norm']['scale'] * silu(heads(p['gate'], x))
    return np.einsum('thv,hvd->td', out, p['out']['kernel'])


def weighted(p, x, score):
    """Attention with weights score(q, k) >= 0, one pair after another."""
    q, k, v = (heads(p['inputs'][name], x) for name in ('query', 'key', 'value'))
    out = np.zeros_like(v)
    for h in range(HEADS):
        for i in range(len(x)):
            weights = np.array([score(q[i, h], k[j, h]) for j in range(i + 1)])
            out[i, h] = weights @ v[: i + 1, h] / weights.sum()
    return np.einsum('thv,hvd->td', out, p['out']['kernel'])


def elu_score(q, k):
    q, k = (np.where(x > 0, x + 1, np.exp(x)) for x in (q, k))
    return q @ k


def taylor_score(q, k):
    s = q @ k / np.sqrt(len(q))
    return 1 + s + s**2 / 2


def before(x):
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def head_norm(p, x, eps=64e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + eps) * p['scale'] + p['shift']


def rwkv6(p, x):
    """Equations 14 to 20 of the paper: a state read before it is written, with a bonus."""
    difference = before(x) - x
    first = x + difference * p['first_share']

    def mixture(name):
        low = np.tanh(first @ p[f'{name}_down']['kernel']) @ p[f'{name}_up']['kernel']
        return x + difference * (p[f'{name}_share'] + low)

    r, k, v, g = (heads(p[name], mixture(name)) for name in ('receptance', 'key', 'value', 'gate'))
    low = np.tanh(mixture('decay') @ p['rate_down']['kernel'])
    rate = np.einsum('tr,rhk->thk', low, p['rate_up']['kernel']) + p['rate_bias']
    w, out = np.exp(-np.exp(rate)), np.zeros_like(v)
    for h in range(HEADS):
        s = np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            new = np.outer(k[t, h], v[t, h])
            out[t, h] = r[t, h] @ (s + p['bonus'][h][:, None] * new)
            s = w[t, h][:, None] * s + new
    return np.einsum('thv,hvd->td', head_norm(p, out) * silu(g), p['out']['kernel'])


def rwkv7(p, x):
    """The paper's wkv in its own layout, [V, K], rows of values."""
    mixed = lambda name: x + (before(x) - x) * p[f'{name}_share']  # noqa: E731

    def low(name, inside):
        inner = inside(mixed(name) @ p[f'{name}_down']['kernel'])
        return np.einsum('tr,rhk->thk', inner, p[f'{name}_up']['kernel'])

    r, k, v = (heads(p[name], mixed(name)) for name in ('receptance', 'key', 'value'))
    w = np.exp(-np.exp(-0.5) * sigmoid(low('decay', np.tanh) + p['decay_bias']))
    a = sigmoid(low('rate', lambda y: y) + p['rate_bias'])
    g, out = low('gate', sigmoid), np.zeros_like(v)
    removal, k = k * p['removal'], k * (1 + (a - 1) * p['renewal'])
    removal /= np.linalg.norm(removal, axis=-1, keepdims=True)
    for h in range(HEADS):
        s = np.zeros((v.shape[-1], k.shape[-1]))
        for t in range(len(x)):
            e = removal[t, h]
            s = s @ (np.diag(w[t, h]) - np.outer(e, a[t, h] * e)) + np.outer(v[t, h], k[t, h])
            out[t, h] = s @ r[t, h]
    out = head_norm(p, out)
    out += np.sum(r * p['bonus'] * k, -1, keepdims=True) * v
    return np.einsum('thv,hvd->td', out * g, p['out']['kernel'])


def test_rwkv6():
    run('rwkv6', rwkv6, rank=3, decay_rank=5)


def test_rwkv7():
    run('rwkv7', rwkv7, rank=3, gate_rank=5, chunk=4)


def test_linear_attention():
    run('linear_attention', lambda p, x: weighted(p, x, elu_score))
    run('linear_attention', lambda p, x: weighted(p, x, elu_score), key_dim=3, value_dim=5)


def test_based():
    mixer = run('based', lambda p, x: weighted(p, x, taylor_score), key_dim=5)
    assert mixer.feature_count == 21  # the paper's 1 + 5 + 25 with equal products joined
    assert make('based').feature_count == 153


def test_retnet():
    mixer = run('retnet', retnet, eps=1e-12)
    # Of the paper: values twice as wide as keys.
    assert mixer.value_dim == 2 * mixer.key_dim == 2 * WIDTH // HEADS
    np.testing.assert_allclose(np.exp(mixer.log_decay), [1 - 1 / 32, 1 - 1 / 64])


def test_gla():
    mixer = run('gla', gla)
    assert mixer.value_dim == 2 * mixer.key_dim == WIDTH // HEADS
    run('gla', lambda p, x: gla(p, x, convolved=True), conv=3, value_dim=5)


@pytest.mark.parametrize(
    ('kind', 'kw', 'groups', 'sizes'),
    [
        ('retnet', {'conv': 3}, 2, (6, 12)),
        ('gla', {'conv': 2, 'rank': 3}, 2, (3, 6)),
        ('linear_attention', {'key_dim': 5}, 2, (5, 7)),
        ('based', {'key_dim': 3, 'value_dim': 4}, 2, (10, 5)),
        ('mamba2', {'head_dim': 6, 'state': 5, 'groups': 2}, 2, (5, 6)),
        ('rwkv6', {'rank': 3}, 2, (6, 6)),
        ('rwkv7', {'rank': 3}, 2, (6, 6)),
        ('rwkv4', {'inner': 7}, 0, ()),
    ],
)
def test_cost_against_the_walk(kind, kw, groups, sizes):
    """Products of the layer are those of its projections and of its operation by itself."""
    mixer = make(kind, **kw)
    x, info = jnp.zeros((2, 40, WIDTH)), SeqInfo.of(2, 40)
    layer = walk(lambda x: mixer(x, info=info)[0], x).kind('matmul')
    if groups:
        heads = 4 if kind == 'mamba2' else HEADS
        key, value = jnp.zeros((2, 40, groups, sizes[0])), jnp.zeros((2, 40, heads, sizes[1]))
        decay = {'gla': key, 'rwkv6': key, 'mamba2': value[..., 0], 'retnet': value[0, 0, :, 0]}
        if kind == 'rwkv7':
            run = lambda k, v: dplr(k, k, v, k, k, k)  # noqa: E731
        else:
            bonus = key[0, 0] if kind == 'rwkv6' else None
            run = lambda k, v: linear_recurrence(k, k, v, decay.get(kind), bonus=bonus)  # noqa: E731
        layer -= walk(run, key, value).kind('matmul')
    cost = mixer.cost(2, 40)
    assert layer == cost.matmul and cost.scan > 0


@pytest.mark.parametrize('kind', ['retnet', 'gla', 'linear_attention', 'based', 'rwkv6', 'rwkv7'])
@pytest.mark.parametrize('heads', [0, 5])
def test_heads_that_do_not_fit_are_said(kind, heads):
    with pytest.raises(ConfigError, match=f'{kind}: .*heads {heads} do not divide width 12'):
        make(kind, heads=heads)


def test_sizes_that_cannot_be_are_said():
    for kind, kw, message in (
        ('retnet', {'key_dim': 3}, 'retnet: key_dim must be even'),
        ('based', {'key_dim': 0}, 'based: key_dim is at least 1'),
        ('linear_attention', {'eps': 0.0}, 'linear_attention: eps is above 0'),
        ('rwkv6', {'rank': 0}, 'rwkv6: rank and decay_rank are at least 1'),
        ('rwkv7', {'gate_rank': 0}, 'rwkv7: rank, gate_rank and chunk are at least 1'),
        ('gla', {'rank': 0}, 'gla: rank is at least 1'),
        ('gla', {'temperature': 0.0}, 'temperature above 0'),
    ):
        with pytest.raises(ConfigError, match=message):
            make(kind, **kw)
