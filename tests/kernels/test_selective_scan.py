"""The selective scan: against its equation in numpy, in chunks of any size, with documents."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import last_choice, selective_scan, target
from effjax.kernels.selective_scan import cost

B, T, D, N = 2, 13, 3, 4
SEGMENTS = np.array(
    [[1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4], [0, 0, 5, 5, 5, 5, 0, 6, 6, 6, 6, 0, 0]], np.int32
)
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(seed=0, length=T, batch=B):
    """u, dt, A, B, C, D and a state."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(batch, length, D))
    dt = rng.exponential(0.3, size=u.shape)
    A = -np.exp(rng.normal(size=(D, N)))
    b, c = rng.normal(size=(2, batch, length, N))
    arrays = (u, dt, A, b, c, rng.normal(size=D), rng.normal(size=(batch, D, N)))
    return tuple(x.astype(np.float32) for x in arrays)


def equation(u, dt, A, b, c, d, state, segments):
    """h_t = exp(dt A) h_{t-1} + dt B u, y = C h + D u, as the paper prints it."""
    u, dt, A, b, c, d, state = (x.astype(np.float64) for x in (u, dt, A, b, c, d, state))
    y, h = np.zeros_like(u), state.copy()
    for row in range(len(u)):
        current = None
        for t in np.nonzero(segments[row])[0]:
            if current not in (None, segments[row, t]):
                h[row] = 0
            current = segments[row, t]
            for i in range(D):
                write = dt[row, t, i] * u[row, t, i] * b[row, t]
                h[row, i] = np.exp(dt[row, t, i] * A[i]) * h[row, i] + write
                y[row, t, i] = c[row, t] @ h[row, i] + d[i] * u[row, t, i]
    return y, h


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_equals_the_equation(implementation):
    *arrays, state = inputs()
    for segments in (None, SEGMENTS):
        ids = np.ones((B, T), np.int32) if segments is None else segments
        expected = equation(*arrays, state, ids)
        for chunk in (1, 4, 7, 64) if implementation == 'xla' else (64,):
            got = selective_scan(
                *arrays, initial_state=state, segment_ids=segments, return_state=True,
                chunk=chunk, implementation=implementation,
            )  # fmt: skip
            # float32 sums of about forty terms of order 1
            np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
            np.testing.assert_allclose(got[1], expected[1], atol=1e-5)
    assert last_choice('selective_scan')['implementation'] == implementation


def test_dtypes_and_no_skip():
    u, dt, A, b, c, d, _ = inputs()
    y = selective_scan(u, dt, A, b, c)
    np.testing.assert_allclose(y + d * u, selective_scan(u, dt, A, b, c, d), atol=1e-6)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (u, dt, b, c)]
    y, state = selective_scan(half[0], half[1], A, half[2], half[3], d, return_state=True)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    wide = [x.astype(jnp.float32) for x in half]
    exact = selective_scan(wide[0], wide[1], A, wide[2], wide[3], d)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_gradients_of_everything():
    """In chunks and float32 against the token loop in float64, through outputs and last state."""
    arrays = inputs(1)
    weight = np.random.default_rng(2).normal(size=(B, D, N)).astype(np.float32)

    def loss(arrays, implementation):
        *rest, state = arrays
        y, last = selective_scan(
            *rest, initial_state=state, segment_ids=SEGMENTS, return_state=True, chunk=5,
            implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last) * weight)

    grads = jit(jax.grad(lambda a: loss(a, 'xla')))(arrays)
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(x, jnp.float64) for x in arrays)
        expected = jit(jax.grad(lambda a: loss(a, 'reference')))(wide)
        chunked = jit(jax.grad(lambda a: loss(a, 'xla')))(wide)
        for got, want in zip(chunked, expected, strict=True):
            assert want.dtype == jnp.float64
            np.testing.assert_allclose(got, want, atol=1e-12)
        expected = [np.asarray(g) for g in expected]
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)
    for i in (0, 1, 3, 4):
        assert not np.any(np.asarray(grads[i])[SEGMENTS == 0])


def test_on_gpus_a_parallel_prefix_in_chunks_with_the_same_gradients():
    def traced_anew(*arrays):
        def loss(*arrays):
            y, last = selective_scan(
                *arrays[:6], initial_state=arrays[6], segment_ids=SEGMENTS, return_state=True,
                chunk=5, implementation='xla',
            )  # fmt: skip
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last)), (y, last)

        return jax.jit(jax.value_and_grad(loss, range(7), has_aux=True))(*arrays)

    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in inputs(1)]
        expected = traced_anew(*wide)
        with target('gpu'):
            got = traced_anew(*wide)
        assert last_choice('selective_scan')['form'] == 'prefix'
        chex.assert_trees_all_close(got, expected, atol=1e-12)


def test_a_row_may_be_cut_anywhere():
    u, dt, A, b, c, d, state = inputs(3)
    run = functools.partial(selective_scan, return_state=True, chunk=4)
    whole, last = run(u, dt, A, b, c, d, initial_state=state)
    for cut in (1, 6):
        head = [x[:, :cut] for x in (u, dt, b, c)]
        tail = [x[:, cut:] for x in (u, dt, b, c)]
        first, middle = run(*head[:2], A, *head[2:], d, initial_state=state)
        second, end = run(*tail[:2], A, *tail[2:], d, initial_state=middle)
        np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=5e-6)
        np.testing.assert_allclose(end, last, atol=5e-6)


@pytest.mark.parametrize('step', [0.0, 1e-6, 80.0, 1e30])
def test_extreme_steps_stay_finite(step):
    u, dt, A, b, c, d, state = inputs(4, length=70)
    dt = np.full_like(dt, step)
    u = u / max(step, 1.0)

    def run(*args):
        y, last = selective_scan(*args[:-1], initial_state=args[-1], return_state=True, chunk=16)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(last)), y

    args = (u, dt, A, b, c, d, state)
    (_, y), grads = jit(jax.value_and_grad(run, argnums=(0, 2, 3, 4, 5, 6), has_aux=True))(*args)
    expected, _ = equation(*args, np.ones((B, 70), np.int32))
    np.testing.assert_allclose(y, expected, atol=1e-4)
    if step < 1e30:
        assert all(np.isfinite(g).all() for g in grads)


def test_padding_is_never_read():
    u, dt, A, b, c, d, state = inputs(5)
    at = (SEGMENTS == 0)[..., None]
    for implementation in ('xla', 'reference'):
        run = functools.partial(
            selective_scan, segment_ids=SEGMENTS, initial_state=state, return_state=True,
            implementation=implementation,
        )  # fmt: skip
        clean = run(u, dt, A, b, c, d)
        noisy = [np.where(at, np.nan, x) for x in (u, dt, b, c)]
        again = run(*noisy[:2], A, *noisy[2:], d)
        np.testing.assert_array_equal(clean[0], again[0])
        np.testing.assert_array_equal(clean[1], again[1])
        assert not np.any(np.asarray(again[0])[SEGMENTS == 0])


def test_states_of_all_tokens_never_exist():
    """Forward and backward: no array as large as a chunk's states times two chunks."""
    length, chunk = 512, 16
    arrays = inputs(length=length)[:6]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]

    def loss(*args):
        return jnp.sum(jnp.sin(selective_scan(*args, chunk=chunk)))

    def largest(jaxpr):
        sizes = [0]
        for eqn in jaxpr.eqns:
            sizes += [v.aval.size for v in eqn.outvars]
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                sizes.append(largest(getattr(inner, 'jaxpr', inner)))
        return max(sizes)

    most = largest(jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(6))))(*shapes).jaxpr)
    states = B * D * N
    assert most <= max(chunk * states, B * length * max(D, N), length // chunk * states)
    assert most < length * states / 2


@pytest.mark.parametrize(
    ('length', 'chunk'), [(12, 4), (13, 4), (3, 64), (200, 64), (5, 1), (1, 9)]
)
def test_costs_equal_the_walk(length, chunk):
    arrays = inputs(length=length)[:6]
    for implementation in ('xla', 'reference'):
        run = functools.partial(selective_scan, chunk=chunk, implementation=implementation)
        executed = cost.executed_flops(implementation, B, length, D, N, chunk=chunk)
        assert walk(run, *arrays, strict=True).total == executed
    prefix = cost.executed_flops('xla', B, length, D, N, chunk=chunk, form='prefix')
    with target('gpu'):
        run = functools.partial(selective_scan, chunk=chunk, implementation='xla')
        assert walk(run, *arrays, strict=True).total == prefix
    assert cost.model_flops(B, length, D, N) == 5 * B * length * D * N


def test_says_what_it_cannot_do():
    u, dt, A, b, c, d, state = inputs()
    cases = [
        ((u, dt[:1], A, b, c), {}, r'u and dt are both \[B, T, D\]'),
        ((u, dt, A[:1], b, c), {}, r'A is \[D, N\]'),
        ((u, dt, A, b[:, 1:], c), {}, r'B and C are both \[B, T, N\]'),
        ((u, dt, A, b, c, d[1:]), {}, r'D is \[3\], not \[2\]'),
        ((u, dt, A, b, c), {'initial_state': state[:1]}, 'initial_state is'),
        ((u, dt, A, b, c), {'segment_ids': SEGMENTS[:, 1:]}, 'segment_ids are integers'),
        ((u, dt, A, b, c), {'chunk': 0}, 'chunk must be at least 1'),
        ((u, dt, A, b, c), {'implementation': 'pallas'}, "no implementation 'pallas'"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            selective_scan(*args, **options)
