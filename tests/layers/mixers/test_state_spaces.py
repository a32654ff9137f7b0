"""S4, S4D and S5: against dense systems discretised by scipy, their starts, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx

from effjax.core.axes import metadata
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers.mixers.s4 import S4, kernel
from effjax.layers.mixers.s4d import S4D
from effjax.layers.mixers.s5 import S5
from effjax.layers.mixers.state_space import hippo, hippo_dplr, power_sums

WIDTH, LENGTH = 6, 23


def make(kind, causal=True, width=WIDTH, **kw):
    ctx = Context(width=width, policy=Policy(), causal=causal, init='lecun')
    return kind(ctx, **kw, rngs=nnx.Rngs(0))


def arrays(mixer):
    params = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


def respond(a, b, c, step, u, method='zoh'):
    """y of x' = A x + B u, y = C x in float64: discretised by scipy, then token by token."""
    b, c = b.reshape(len(a), -1), c.reshape(-1, len(a))
    system = (a, b, c, np.zeros((len(c), b.shape[1])))
    a, b, *_ = scipy.signal.cont2discrete(system, step, method)
    x, y = np.zeros((len(a), 1)), []
    for row in u.reshape(len(u), -1):
        x = a @ x + b @ row[:, None]
        y.append((c @ x)[:, 0])
    return np.array(y)


def out(p, y):
    """The gate behind a state space, gelu by tanh as the layers compute it."""
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    gate = 1 / (1 + np.exp(-y @ p['out']['gate']['kernel']))
    return y @ p['out']['value']['kernel'] * gate


def both_forms(mixer, x):
    """The form without a state, and the first nine tokens and the rest with one."""
    whole = mixer(x, info=SeqInfo.of(*x.shape[:2]))[0]
    info = SeqInfo.of(*x.shape[:2]).positions
    first, state, _ = mixer(x[:, :9], info=SeqInfo(info[:, :9]), return_state=True)
    second = mixer(x[:, 9:], info=SeqInfo(info[:, 9:]), state=state)[0]
    return np.asarray(whole), np.concatenate([first, second], 1)


def inputs():
    return np.asarray(jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH)))


@pytest.mark.parametrize('start', ['lin', 'legs'])
def test_s4d_against_scipy(start):
    mixer = make(S4D, state=8, start=start, chunk=5)
    x, p = inputs(), arrays(mixer)
    a = -np.exp(p['log_rate']) + 1j * p['angle']
    c = p['read_real'] + 1j * p['read_imag']
    y = np.zeros(x.shape)
    for b, d in np.ndindex(2, WIDTH):
        step = np.exp(p['log_step'][d])
        states = respond(np.diag(a[d]), np.ones(4, complex), c[d], step, x[b, :, d])
        y[b, :, d] = 2 * states[:, 0].real + p['skip'][d] * x[b, :, d]
    for got in both_forms(mixer, jnp.asarray(x)):
        # float32 against float64
        np.testing.assert_allclose(got, out(p, y), atol=1e-5)


def test_s4_against_scipy():
    """The dense matrix of all conjugate pairs, by the bilinear rule; parameters moved at random."""
    mixer = make(S4, state=8, chunk=5)
    rng = np.random.default_rng(0)
    for name in ('log_rate', 'angle', 'low_real', 'low_imag', 'write_real', 'write_imag'):
        leaf = getattr(mixer, name)
        leaf[...] = leaf[...] + 0.3 * rng.normal(size=leaf[...].shape)
    x, p = inputs(), arrays(mixer)

    def pairs(name):
        value = p[f'{name}_real'] + 1j * p[f'{name}_imag']
        return np.concatenate([value, value.conj()], -1)

    rate = -np.exp(p['log_rate']) + 1j * p['angle']
    rate = np.concatenate([rate, rate.conj()], -1)
    low, write, read = pairs('low'), pairs('write'), pairs('read')
    y = np.zeros(x.shape)
    for row, d in np.ndindex(2, WIDTH):
        a = np.diag(rate[d]) - np.outer(low[d], low[d].conj())
        step = np.exp(p['log_step'][d])
        states = respond(a, write[d], read[d], step, x[row, :, d], 'bilinear')
        assert np.abs(states.imag).max() < 1e-12
        y[row, :, d] = states[:, 0].real + p['skip'][d] * x[row, :, d]
    for got in both_forms(mixer, jnp.asarray(x)):
        np.testing.assert_allclose(got, out(p, y), atol=1e-5)


def test_s4_starts_as_hippo():
    """Its impulse response is that of the real HiPPO-LegS matrix, for 300 tokens."""
    size = 12
    mixer = make(S4, state=size)
    c = np.random.default_rng(1).normal(size=size)
    turned = c @ hippo_dplr(size)[3]
    mixer.read_real[...] = jnp.broadcast_to(turned.real, (WIDTH, size // 2))
    mixer.read_imag[...] = jnp.broadcast_to(turned.imag, (WIDTH, size // 2))
    taps = kernel(mixer.discrete(jnp.float32), 300)
    impulse = np.eye(300)[0]
    for d in range(WIDTH):
        step = float(np.exp(mixer.log_step[...][d]))
        expected = respond(*hippo(size), c, step, impulse, 'bilinear')[:, 0]
        np.testing.assert_allclose(taps[:, d], expected, atol=2e-5 * max(1, np.abs(expected).max()))


def test_s5_against_scipy():
    mixer = make(S5, state=8, blocks=2, chunk=5)
    x, p = inputs(), arrays(mixer)
    a = -np.exp(p['log_rate']) + 1j * p['angle']
    b = p['write_real'] + 1j * p['write_imag']
    c = p['read_real'] + 1j * p['read_imag']
    y = np.zeros(x.shape)
    for row in range(2):
        for n, step in enumerate(np.exp(p['log_step'])):  # each state has its own step
            one = respond(a[n : n + 1, None], b[:, n][None], c[n][:, None], step, x[row])
            y[row] += 2 * one.real
        y[row] += p['skip'] * x[row]
    for got in both_forms(mixer, jnp.asarray(x)):
        np.testing.assert_allclose(got, out(p, y), atol=1e-5)


def test_s5_both_ways():
    """Two causal scans with one system, each with its own C, the second from the end."""
    both, x = make(S5, causal=False, state=8, blocks=2, chunk=5), inputs()
    p = arrays(both)
    forward, backward = make(S5, state=8, blocks=2), make(S5, state=8, blocks=2)
    for mixer, way in ((forward, 'read'), (backward, 'back')):
        for part in ('real', 'imag'):
            getattr(mixer, f'read_{part}')[...] = jnp.asarray(p[f'{way}_{part}'], jnp.float32)
    backward.skip[...] = jnp.zeros(WIDTH)
    for mixer in (both, forward, backward):
        mixer.out = lambda y: y  # compare what enters the gate
    ids = np.array([[1] * 9 + [2] * 14, [0] * 2 + [3] * 20 + [0]], np.int32)
    place = np.arange(LENGTH, dtype=np.int32)[None].repeat(2, 0)
    y = both(jnp.asarray(x), info=SeqInfo(place, jnp.asarray(ids)))[0]
    there = forward(jnp.asarray(x), info=SeqInfo(place, jnp.asarray(ids)))[0]
    turned = SeqInfo(place, jnp.asarray(np.where(ids, 4 - ids, 0)[:, ::-1]))
    back = backward(jnp.asarray(x[:, ::-1]), info=turned)[0][:, ::-1]
    np.testing.assert_allclose(y, there + back, atol=1e-5)
    assert both.cost(2, LENGTH).scan == 2 * forward.cost(2, LENGTH).scan
    # A change within a document moves its outputs on both sides, and no other document's.
    moved = x.copy()
    moved[0, 4] += 1
    change = np.abs(both(jnp.asarray(moved), info=SeqInfo(place, jnp.asarray(ids)))[0] - y)
    assert np.all(change[0, :9].max(-1) > 0) and not change[0, 9:].any() and not change[1].any()


def test_hippo_is_a_diagonal_minus_a_product():
    """In its eigenvectors, whole again; and A is that of the Legendre polynomials."""
    size = 10
    a, b = hippo(size)
    eigenvalues, p, b_turned, v = hippo_dplr(size)
    whole = v @ (np.diag(eigenvalues)) @ v.conj().T
    # The pairs' other halves are the conjugates: their sum is twice the real part.
    product = np.outer(v @ p, (v @ p).conj())
    assert np.allclose(2 * (v @ p).real, np.sqrt(np.arange(size) + 0.5))
    np.testing.assert_allclose(
        2 * whole.real - 4 * np.outer((v @ p).real, (v @ p).real), a, atol=1e-9
    )
    np.testing.assert_allclose(2 * (v @ b_turned).real, b, atol=1e-9)
    assert product.shape == a.shape
    # LegS keeps the moments: of a constant input, the first coefficient alone stays.
    steady = np.linalg.solve(a, -b)
    np.testing.assert_allclose(steady, np.eye(size)[0], atol=1e-9)


def test_a_long_kernel_is_right_to_rounding():
    """4000 taps from two tables of 64 rows, against the exponential in complex128."""
    mixer = make(S4D, state=64, start='legs')
    log_decay, read = mixer.discrete(jnp.float32)
    taps = power_sums(log_decay, read, 4000)
    p = arrays(mixer)
    a = (-np.exp(p['log_rate']) + 1j * p['angle']) * np.exp(p['log_step'])[:, None]
    exact = np.exp(np.arange(4000)[:, None, None] * a)
    expected = np.sum(exact * np.asarray(read, np.complex128), -1).real
    assert taps.shape == (4000, WIDTH)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(taps, expected, atol=2e-4 * scale)


def test_learns_slowly_what_must_stay_stable():
    for kind in (S4, S4D, S5):
        meta = metadata(nnx.state(make(kind, state=8), nnx.Param))
        for name in ('log_step', 'log_rate', 'angle'):
            assert meta[name].no_decay and meta[name].keep_fp32
            assert meta[name].lr_scale == pytest.approx(0.1)
    assert metadata(nnx.state(make(S5, state=8), nnx.Param))['write_real'].lr_scale < 1
    steps = np.exp(arrays(make(S4D, width=500, state=2))['log_step'])
    assert steps.min() > 9.9e-4 and steps.max() < 0.101 and np.ptp(np.log(steps)) > 4


def test_what_they_refuse():
    for kind, name in ((S4, 's4'), (S4D, 's4d')):
        with pytest.raises(ConfigError, match=f'{name} is causal.*use attention'):
            make(kind, causal=False)
    with pytest.raises(ConfigError, match='s4d: state must be even'):
        make(S4D, state=5)
    with pytest.raises(ConfigError, match='s4: state must be even and chunk at least 1'):
        make(S4, chunk=0)
    with pytest.raises(ConfigError, match="s4d: start is 'lin' or 'legs', not 'inv'"):
        make(S4D, start='inv')
    with pytest.raises(ConfigError, match='s5: blocks 3 must divide the state of 8'):
        make(S5, state=8, blocks=3)
