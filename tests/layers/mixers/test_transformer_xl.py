"""Transformer-XL against its paper in numpy, segment by segment, and where its gradients stop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers.mixers.transformer_xl import TransformerXL, _shift

WIDTH, LENGTH = 6, 17
# Tiny programs run once: compiling them well takes longer than running them badly.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def make(causal=True, width=WIDTH, **kw):
    ctx = Context(width=width, policy=Policy(), causal=causal, bias=True, init='lecun', max_len=20)
    mixer = TransformerXL(ctx, **{'heads': 2, 'segment': 4, **kw}, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.5 * rng.normal(size=p.shape).astype(np.float32), params)
    return nnx.merge(graphdef, params)


def inputs(batch=2):
    return jax.random.normal(jax.random.key(1), (batch, LENGTH, WIDTH))


def paper(p, x, segment, memory):
    """Equations 3 to 5 of the paper, one segment h with its memory m after another, float64."""
    half = x.shape[1] // 2
    wave = lambda d: d / 10000.0 ** (np.arange(half) / half)  # noqa: E731
    heads = lambda name, h: np.einsum('td,dhk->thk', h, p[name]['kernel'])  # noqa: E731
    m, outputs = np.zeros((0, x.shape[1])), []
    for begin in range(0, len(x), segment):
        h = x[begin : begin + segment]
        both = np.concatenate([m, h])
        q = heads('query', h) + p['query']['bias']
        k, v = heads('key', both), heads('value', both) + p['value']['bias']
        o = np.zeros_like(q)
        for i in range(len(h)):
            keys = np.arange(len(m) + i + 1)
            far = (len(m) + i - keys)[:, None]
            r = heads('distance', np.concatenate([np.sin(wave(far)), np.cos(wave(far))], 1))
            for n in range(q.shape[1]):
                score = q[i, n] @ k[keys, n].T + q[i, n] @ r[:, n].T
                score += p['content_bias'][n] @ k[keys, n].T + p['position_bias'][n] @ r[:, n].T
                weight = np.exp(score / np.sqrt(q.shape[2]))
                o[i, n] = weight / weight.sum() @ v[keys, n]
        outputs.append(np.einsum('thk,hkd->td', o, p['out']['kernel']))
        m = both[max(0, len(both) - memory) :]
    return np.concatenate(outputs)


@pytest.mark.parametrize(('segment', 'memory'), [(4, None), (3, 7), (64, None)])
def test_against_the_paper(segment, memory):
    """The whole row, nine tokens and the rest from their state, and that rest token by token."""
    mixer = make(segment=segment, memory=memory)
    params = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = inputs()
    reach = segment if memory is None else memory
    expected = [paper(params, row, segment, reach) for row in np.asarray(x, np.float64)]
    place = SeqInfo.of(2, LENGTH).positions
    close = {'atol': 2e-5, 'rtol': 1e-4}  # float32 against float64

    @jit
    def everything(x):
        whole = mixer(x, info=SeqInfo(place))[0]
        first, state, _ = mixer(x[:, :9], info=SeqInfo(place[:, :9]), return_state=True)
        second = mixer(x[:, 9:], info=SeqInfo(place[:, 9:]), state=state)[0]
        step = lambda state, x: mixer.step(x, state)[::-1]  # noqa: E731
        steps = jax.lax.scan(step, state, x[:, 9:].swapaxes(0, 1))[1].swapaxes(0, 1)
        return whole, jnp.concatenate([first, second], 1), jnp.concatenate([first, steps], 1)

    for y in everything(x):
        np.testing.assert_allclose(y, expected, **close)


def test_segments_that_remember_all_equal_one_window():
    """One layer in segments of 4 with a memory of the whole row, and one segment of the row."""
    x, info = inputs(), SeqInfo.of(2, LENGTH)
    whole = make(segment=64)(x, info=info)[0]
    np.testing.assert_allclose(make(memory=20)(x, info=info)[0], whole, atol=2e-5, rtol=1e-4)


def test_gradients_stay_in_their_segment():
    """A token moves the next segment's outputs, whose gradient does not reach it."""
    mixer, x = make(memory=3), inputs(1)
    info = SeqInfo.of(1, LENGTH)
    plain = lambda x: mixer(x, info=info)[0]  # noqa: E731
    f = jit(plain)
    moved = np.abs(np.asarray(f(x.at[:, 3].add(1.0)) - f(x)))[0].max(-1) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved), range(3, 8))
    moved = np.abs(np.asarray(f(x.at[:, 0].add(1.0)) - f(x)))[0].max(-1) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved), range(4))  # the memory holds 1, 2, 3
    slopes = np.asarray(jit(jax.jacobian(lambda x: plain(x)[0].sum(-1)))(x))[:, 0]  # [out, in, D]
    reached = np.abs(slopes).max(-1) > 1e-7
    same = np.arange(LENGTH)[:, None] // 4 == np.arange(LENGTH) // 4
    np.testing.assert_array_equal(reached, same & np.tri(LENGTH, dtype=bool))


def test_weights_learn_from_the_memory():
    """The gradient of keys equals that of a loop over segments with the memory stopped."""
    mixer, x = make(), inputs(1)[:, :10]
    graphdef, params = nnx.split(mixer)

    def parallel(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x, info=SeqInfo.of(1, 10))[0]))

    def loop(params):
        mixer, total, state = nnx.merge(graphdef, params), 0.0, None
        for begin in range(0, 10, 4):
            part = x[:, begin : begin + 4]
            place = begin + jnp.arange(part.shape[1])[None]
            y, state, _ = mixer(part, info=SeqInfo(place), state=state, return_state=True)
            state = jax.lax.stop_gradient(state)
            total += jnp.sum(jnp.sin(y))
        return total

    ours, theirs = jit(jax.grad(parallel))(params), jit(jax.grad(loop))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), ours, theirs)


def test_shift_gives_each_place_its_distance():
    """Equal to looking each distance up."""
    s = jax.random.normal(jax.random.key(0), (2, 3, 5))
    out = np.asarray(_shift(s))
    for a in range(3):
        for c in range(3 + a):  # query a stands at place 2 + a
            np.testing.assert_array_equal(out[:, a, c], s[:, a, c + 2 - a])


def test_no_array_has_the_square_of_the_length():
    def largest(segments):
        mixer = make(segment=8)
        x = jax.ShapeDtypeStruct((1, 1024, WIDTH), jnp.float32)
        place = SeqInfo.of(1, 1024).positions
        info = SeqInfo(place, jnp.ones_like(place)) if segments else SeqInfo(place)
        jaxpr = jax.make_jaxpr(lambda x: mixer(x, info=info)[0])(x)
        return max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)

    assert largest(False) <= 1024 * 32 * WIDTH
    assert largest(True) <= 1024 * 64 * WIDTH


def test_the_state_does_not_grow():
    mixer = make(segment=4, memory=6)
    assert mixer.state_bytes(1, 16, jnp.float32) == mixer.state_bytes(1, 4096, jnp.float32)
    assert mixer.state_bytes(1, 16, jnp.float32) == 4 * (9 * WIDTH + 3)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match='transformer_xl is causal.*use attention'):
        make(causal=False)
    with pytest.raises(ConfigError, match='segment must be at least 1 token, got 0'):
        make(segment=0)
    with pytest.raises(ConfigError, match='memory must not be negative, got -1'):
        make(memory=-1)
    with pytest.raises(ConfigError, match='heads 4 do not divide width 6'):
        make(heads=4)
    with pytest.raises(ConfigError, match='head_dim must be at least 1, got 0'):
        make(head_dim=0)
    with pytest.raises(ConfigError, match='must be even, not 7'):
        make(width=7, heads=7)
    state = make(memory=2).init_state(2, 9, jnp.float32)
    with pytest.raises(ValueError, match='transformer_xl got the state of another config'):
        make(memory=9, segment=9)(
            inputs(), info=SeqInfo.of(2, LENGTH), state={**state, 'stored': state['stored'][:1]}
        )
