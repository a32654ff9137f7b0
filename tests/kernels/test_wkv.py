"""RWKV-4's weighted average: against its sums in numpy, for keys of any size."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import last_choice, wkv
from effjax.kernels.wkv import cost

B, T, D = 2, 13, 5
SEGMENTS = np.array(
    [[1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4], [0, 0, 5, 5, 5, 0, 5, 6, 6, 6, 6, 0, 0]], np.int32
)
WHOLE = np.ones((B, T), np.int32)
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(seed=0, length=T, size=1.0):
    rng = np.random.default_rng(seed)
    out = {
        'k': size * rng.normal(size=(B, length, D)),
        'v': rng.normal(size=(B, length, D)),
        'log_decay': -rng.exponential(0.3, size=D),
        'bonus': rng.normal(size=D),
        'initial_state': (
            rng.normal(size=(B, D)),
            rng.uniform(1, 2, size=(B, D)),
            size * rng.normal(size=(B, D)),
        ),
    }
    return jax.tree.map(np.float32, out)


def call(arrays, **kw):
    return wkv(**arrays, return_state=True, **kw)


def equation(arrays, segments):
    """The sums as they stand in the paper, in float64; the state's as logarithm and average."""
    a = jax.tree.map(np.float64, arrays)
    k, v, w, u = a['k'], a['v'], a['log_decay'], a['bonus']
    o, ends = np.zeros_like(v), np.zeros((2, B, D))
    for b in range(B):
        # (exponent, weight, value) of everything that can be read
        past = [(a['initial_state'][2][b], *(x[b] for x in a['initial_state'][1::-1]))]
        past = [(past[0][0], past[0][1], past[0][2] / past[0][1])]
        current = None
        for t in range(k.shape[1]):
            if segments[b, t] == 0:
                continue
            if current is not None and segments[b, t] != current:
                past = []
            current = segments[b, t]
            o[b, t] = average([*past, (u + k[b, t], 1.0, v[b, t])])[1]
            past = [(e + w, n, x) for e, n, x in past] + [(k[b, t], 1.0, v[b, t])]
        ends[:, b] = average(past)
    return o, ends


def average(terms):
    """(log of the sum of weights, weighted average)."""
    most = np.max([e for e, _, _ in terms], axis=0)
    weights = [n * np.exp(e - most) for e, n, _ in terms]
    total = np.sum(weights, axis=0)
    values = np.sum([n * x for n, (_, _, x) in zip(weights, terms, strict=True)], axis=0)
    return most + np.log(total), values / total


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('size', [1.0, 100.0])
def test_equals_the_equation(implementation, size):
    arrays = inputs(size=size)
    run = jit(lambda a, s: call(a, segment_ids=s, implementation=implementation))
    for segments in (WHOLE, SEGMENTS):
        (o, (numerator, denominator, m)), (expected, ends) = (
            run(arrays, segments),
            equation(arrays, segments),
        )
        # float32: exponents of order 100 round by 1e-5
        close = 1e-5 if size == 1.0 else 1e-4
        np.testing.assert_allclose(o, expected, atol=close, rtol=close)
        np.testing.assert_allclose(m + np.log(denominator), ends[0], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(numerator / denominator, ends[1], atol=1e-4, rtol=1e-4)
    assert last_choice('wkv')['implementation'] == implementation


@pytest.mark.ci
def test_gradients_of_inputs_and_states():
    """As one scan and in float32 against the token loop in float64."""
    arrays = inputs(seed=1)

    def loss(arrays, implementation):
        o, (numerator, denominator, _) = call(
            arrays, segment_ids=SEGMENTS, implementation=implementation
        )
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(numerator) * denominator)

    grads = jit(jax.grad(lambda a: loss(a, 'xla')))(arrays)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        expected = jit(jax.grad(lambda a: loss(a, 'reference')))(wide)
        scanned = jit(jax.grad(lambda a: loss(a, 'xla')))(wide)
        chex.assert_trees_all_close(scanned, expected, atol=1e-12)
        # By differences, through the outputs alone, which no exponent is left in.
        only = lambda a: jnp.sum(jnp.sin(wkv(**a, segment_ids=SEGMENTS)))  # noqa: E731
        slopes = jit(jax.grad(only))(wide)
        for name in ('k', 'v', 'log_decay', 'bonus'):
            direction = np.random.default_rng(7).normal(size=wide[name].shape)
            up, down = ({**wide, name: wide[name] + s * 1e-6 * direction} for s in (1.0, -1.0))
            measured = (only(up) - only(down)) / 2e-6
            np.testing.assert_allclose(np.sum(slopes[name] * direction), measured, rtol=1e-6)
        expected = jax.tree.map(np.float32, expected)
    chex.assert_trees_all_close(grads, expected, atol=5e-5, rtol=1e-4)
    assert not any(np.any(np.asarray(grads[n])[SEGMENTS == 0]) for n in 'kv')


@pytest.mark.ci
@pytest.mark.parametrize('implementation', ['pallas_tpu', 'pallas_gpu'])
def test_kernels_in_the_interpreter(implementation, interpreted):
    """Values, the state and all gradients against the token loop in float64."""
    arrays, segments = inputs(seed=4, length=3 * T), np.concatenate([SEGMENTS] * 3, axis=1)

    def loss(arrays, implementation):
        o, (numerator, denominator, m) = call(
            arrays, segment_ids=segments, implementation=implementation
        )
        # Not of the sums alone: which m they go with is free, up to rounding.
        rest = jnp.sin(numerator / denominator) * jnp.cos(m + jnp.log(denominator))
        return jnp.sum(jnp.sin(o)) + jnp.sum(rest), o

    both = jax.value_and_grad(loss, has_aux=True)
    with interpreted(implementation):
        (_, o), grads = jax.block_until_ready(jax.jit(lambda a: both(a, implementation))(arrays))
    assert last_choice('wkv')['implementation'] == implementation
    assert last_choice('diagonal_scan')['implementation'] == implementation
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        (_, expected), slopes = jit(lambda a: both(a, 'reference'))(wide)
        expected, slopes = jax.tree.map(np.float32, (expected, slopes))
    # float32 sums of a few terms of order 1, and gradients of some such sums
    chex.assert_trees_all_close((o, grads), (expected, slopes), atol=5e-5, rtol=1e-4)


def test_a_fast_decay_far_along_a_row():
    """There the exponents of the sums are found a few hundredths wrong, and the sums are not."""
    arrays = inputs(seed=5, length=20_000)
    arrays['log_decay'] = np.float32([-30, -3, -0.1, -1e-4, 0])
    o = jit(lambda a: call(a)[0])(arrays)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        expected = jit(lambda a: call(a, implementation='reference')[0])(wide)
    # The sums of the last channel have 20,000 terms, each rounded by 6e-8 of them.
    np.testing.assert_allclose(o, expected, atol=2e-4, rtol=2e-4)


def test_a_row_may_be_cut_anywhere_and_padding_is_never_read():
    arrays = inputs(seed=2)
    run = jit(call)
    whole, last = run(arrays)
    for cut in (1, 6, T - 1):
        head = {n: x[:, :cut] if n in 'kv' else x for n, x in arrays.items()}
        tail = {n: x[:, cut:] if n in 'kv' else x for n, x in arrays.items()}
        first, tail['initial_state'] = run(head)
        second, end = run(tail)
        np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-5)
        chex.assert_trees_all_close(end, last, atol=1e-5)
    noisy = dict(arrays)
    for name in 'kv':
        noisy[name] = np.where((SEGMENTS == 0)[..., None], np.nan, arrays[name])
    for implementation in ('xla', 'reference'):
        run = jit(lambda a, i=implementation: call(a, segment_ids=SEGMENTS, implementation=i))
        chex.assert_trees_all_equal(run(arrays), run(noisy))
        assert not np.any(np.asarray(run(arrays)[0])[SEGMENTS == 0])


@pytest.mark.parametrize('size', [1e-3, 1e4])
def test_keys_of_any_size_and_an_empty_state(size):
    arrays = inputs(seed=3, length=40, size=size)
    del arrays['initial_state']

    def both(arrays):
        o, (numerator, denominator, _) = call(arrays)
        return jnp.sum(o) + jnp.sum(numerator / denominator), o

    (_, o), grads = jit(jax.value_and_grad(both, has_aux=True))(arrays)
    np.testing.assert_allclose(o[:, 0], arrays['v'][:, 0], rtol=1e-6)
    assert np.abs(o).max() <= np.abs(arrays['v']).max() * (1 + 1e-6)  # an average
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_costs():
    arrays = inputs(length=100)
    walked = walk(call, arrays)
    assert walked.kind('matmul') == 0 == cost.executed_flops('xla', B, 100, D)
    assert cost.model_flops(B, 100, D) == 8 * B * 100 * D


def test_what_does_not_fit_is_said():
    arrays = inputs()
    bad = (
        ({'k': arrays['k'][:, 1:]}, r'k and v are both \[B, T, D\]'),
        ({'bonus': arrays['bonus'][1:]}, r'bonus is \[D\] = \[5\]'),
        ({'initial_state': (arrays['k'],) * 3}, r'the state is three arrays \[B, D\]'),
        ({'segment_ids': SEGMENTS[:1]}, 'segment_ids'),
        ({'implementation': 'hopper'}, 'no implementation'),
    )
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            wkv(**{**arrays, **change})
