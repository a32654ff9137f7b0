"""The diagonal recurrence: against its equation in numpy, both ways, real and complex."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import diagonal_scan, last_choice, target
from effjax.kernels.diagonal_scan import cost

B, T, D = 3, 13, 4
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4],
        [0, 0, 5, 5, 5, 5, 0, 6, 6, 6, 6, 0, 0],
        [0] * 13,
    ],
    np.int32,
)
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(seed=0, length=T, is_complex=False):
    """x, log_decay [B, T, D] and a state."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, length, D)).astype(np.float32)
    log_decay = -rng.exponential(0.3, size=(B, length, D)).astype(np.float32)
    state = rng.normal(size=(B, D)).astype(np.float32)
    if is_complex:
        x = x + 1j * rng.normal(size=x.shape).astype(np.float32)
        log_decay = log_decay + 1j * rng.normal(size=x.shape).astype(np.float32)
        state = state + 1j * rng.normal(size=state.shape).astype(np.float32)
    return x, log_decay, state


def equation(x, log_decay, state, segments, reverse=False):
    """h_t = a_t h_{t-1} + x_t in complex128, a document at a time."""
    if reverse:
        h, last = equation(x[:, ::-1], log_decay[:, ::-1], state, segments[:, ::-1])
        return h[:, ::-1], last
    h, now = np.zeros(x.shape, np.complex128), state.astype(np.complex128)
    for b in range(len(x)):
        current = None
        for t in np.nonzero(segments[b])[0]:
            if current not in (None, segments[b, t]):
                now[b] = 0
            current = segments[b, t]
            now[b] = np.exp(log_decay[b, t].astype(np.complex128)) * now[b] + x[b, t]
            h[b, t] = now[b]
    return h, now


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('is_complex', [False, True], ids=['real', 'complex'])
@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_equals_the_equation(implementation, is_complex, reverse):
    x, log_decay, state = inputs(is_complex=is_complex)
    for segments in (None, SEGMENTS):
        ids = np.ones((B, T), np.int32) if segments is None else segments
        expected = equation(x, log_decay, state, ids, reverse)
        for chunk in (1, 4, 64) if implementation == 'xla' else (64,):
            got = diagonal_scan(
                x, log_decay, initial_state=state, segment_ids=segments, return_state=True,
                reverse=reverse, chunk=chunk, implementation=implementation,
            )  # fmt: skip
            # float32 sums of about ten terms of order 1
            np.testing.assert_allclose(got[0], expected[0], atol=5e-6)
            np.testing.assert_allclose(got[1], expected[1], atol=5e-6)
    assert last_choice('diagonal_scan')['implementation'] == implementation


@pytest.mark.ci
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('is_complex', [False, True], ids=['real', 'complex'])
def test_on_gpus_a_parallel_prefix_with_the_same_gradients(is_complex, reverse):
    arrays = inputs(1, is_complex=is_complex)

    def loss(x, log_decay, state, ids):
        h, last = diagonal_scan(
            x, log_decay, initial_state=state, segment_ids=ids, return_state=True,
            reverse=reverse, implementation='xla',
        )  # fmt: skip
        return sum(jnp.sum(jnp.sin(a.real) + jnp.cos(2 * a.imag)) for a in (h, last)), (h, last)

    def traced_anew(*args):
        return jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1, 2), has_aux=True))(*args)

    with jax.enable_x64(True):
        dtype = jnp.complex128 if is_complex else jnp.float64
        wide = [jnp.asarray(a, dtype) for a in arrays]
        for ids in (SEGMENTS, None):
            expected = traced_anew(*wide, ids)
            assert last_choice('diagonal_scan')['form'] == 'chunks'
            with target('gpu'):
                got = traced_anew(*wide, ids)
            assert last_choice('diagonal_scan')['form'] == 'prefix'
            chex.assert_trees_all_close(got, expected, atol=1e-12)


def test_constant_decays_more_channels_and_dtypes():
    x, log_decay, state = inputs(is_complex=True)
    constant = log_decay[0, 0]
    whole = np.broadcast_to(constant, x.shape)
    expected, _ = equation(x.real, whole, np.zeros_like(state), np.ones((B, T), np.int32))
    h = diagonal_scan(jnp.asarray(x.real), constant, chunk=4)  # real in, complex out
    assert h.dtype == jnp.complex64
    np.testing.assert_allclose(h, expected, atol=5e-6)
    deep = diagonal_scan(jnp.asarray(x.real)[..., None], constant[:, None], chunk=4)
    np.testing.assert_array_equal(deep[..., 0], h)
    half = jnp.asarray(x.real, jnp.bfloat16)
    h, last = diagonal_scan(half, jnp.asarray(log_decay.real), return_state=True)
    assert h.dtype == jnp.bfloat16 and last.dtype == jnp.float32


@pytest.mark.ci
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('is_complex', [False, True], ids=['real', 'complex'])
def test_gradients_of_inputs_and_states(is_complex, reverse):
    """In chunks and float32 against jax's own gradient of the token loop in float64."""
    arrays = inputs(1, is_complex=is_complex)
    weight = np.random.default_rng(2).normal(size=(B, D)).astype(np.float32)

    def loss(arrays, implementation, ids):
        x, log_decay, state = arrays
        h, last = diagonal_scan(
            x, log_decay, initial_state=state, segment_ids=ids, return_state=True,
            reverse=reverse, chunk=4, implementation=implementation,
        )  # fmt: skip
        h, last = (jnp.sin(a.real) + jnp.cos(2 * a.imag) for a in (h, last))
        return jnp.sum(h * weight[:, None]) + jnp.sum(last)

    for ids in (SEGMENTS, None):
        grads = jit(jax.grad(lambda a, ids=ids: loss(a, 'xla', ids)))(arrays)
        with jax.enable_x64(True):
            dtype = jnp.complex128 if is_complex else jnp.float64
            wide = tuple(jnp.asarray(x, dtype) for x in arrays)
            expected = jit(jax.grad(lambda a, ids=ids: loss(a, 'reference', ids)))(wide)
            chunked = jit(jax.grad(lambda a, ids=ids: loss(a, 'xla', ids)))(wide)
            for got, want in zip(chunked, expected, strict=True):
                assert want.dtype == dtype
                np.testing.assert_allclose(got, want, atol=1e-12)
            expected = [np.asarray(g) for g in expected]
        for got, want in zip(grads, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)
    grads = jit(jax.grad(lambda a: loss(a, 'xla', SEGMENTS)))(arrays)
    assert not np.any(np.asarray(grads[0])[SEGMENTS == 0])


def test_second_derivatives():
    x, log_decay, state = inputs(3, length=5)

    def slope(implementation):
        def f(x):
            h = diagonal_scan(
                x, log_decay, initial_state=state, chunk=2, implementation=implementation
            )
            return jnp.sum(jnp.sin(h))

        return jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(x)

    np.testing.assert_allclose(slope('xla'), slope('reference'), atol=1e-5)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_a_row_may_be_cut_anywhere(reverse):
    x, log_decay, state = inputs(4)
    run = functools.partial(diagonal_scan, return_state=True, chunk=4, reverse=reverse)
    whole, last = run(x, log_decay, initial_state=state)
    for cut in (1, 6):
        pieces = [(x[:, :cut], log_decay[:, :cut]), (x[:, cut:], log_decay[:, cut:])]
        pieces = pieces[::-1] if reverse else pieces
        first, middle = run(*pieces[0], initial_state=state)
        second, end = run(*pieces[1], initial_state=middle)
        joined = [second, first] if reverse else [first, second]
        np.testing.assert_allclose(np.concatenate(joined, 1), whole, atol=5e-6)
        np.testing.assert_allclose(end, last, atol=5e-6)


@pytest.mark.parametrize('strength', [0.0, -1e-4, -50.0, -1e30, -np.inf])
def test_extreme_decays_stay_finite(strength):
    x, log_decay, state = inputs(5, length=200)
    log_decay = np.full_like(log_decay, strength)

    def run(x, log_decay, state):
        h, last = diagonal_scan(x, log_decay, initial_state=state, return_state=True, chunk=8)
        return jnp.sum(jnp.sin(h)) + jnp.sum(last), h

    (_, h), grads = jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(
        x, log_decay, state
    )
    expected, _ = equation(x, log_decay, state, np.ones((B, 200), np.int32))
    np.testing.assert_allclose(h, expected, atol=1e-4)  # up to 200 terms of order 1
    assert all(np.isfinite(g).all() for g in grads)


def test_padding_is_never_read():
    x, log_decay, state = inputs(6)
    at = (SEGMENTS == 0)[..., None]
    for implementation in ('xla', 'reference'):
        run = functools.partial(
            diagonal_scan, segment_ids=SEGMENTS, initial_state=state, return_state=True,
            implementation=implementation,
        )  # fmt: skip
        clean = run(x, log_decay)
        noisy = run(np.where(at, np.nan, x), np.where(at, np.nan, log_decay))
        np.testing.assert_array_equal(clean[0], noisy[0])
        np.testing.assert_array_equal(clean[1], noisy[1])
        assert not np.any(np.asarray(noisy[0])[SEGMENTS == 0])


@pytest.mark.parametrize(('length', 'chunk'), [(12, 4), (13, 4), (100, 4), (3, 64), (5, 1), (1, 9)])
@pytest.mark.parametrize('is_complex', [False, True], ids=['real', 'complex'])
def test_costs_equal_the_walk(length, chunk, is_complex):
    x, log_decay, _ = inputs(length=length, is_complex=is_complex)
    for implementation in ('xla', 'reference'):
        run = functools.partial(diagonal_scan, chunk=chunk, implementation=implementation)
        executed = cost.executed_flops(
            implementation, B, length, D, is_complex=is_complex, chunk=chunk
        )
        assert walk(run, x, log_decay, strict=True).total == executed
    prefix = cost.executed_flops(
        'xla', B, length, D, is_complex=is_complex, chunk=chunk, form='prefix'
    )
    with target('gpu'):
        run = functools.partial(diagonal_scan, implementation='xla')
        assert walk(run, x, log_decay, strict=True).total == prefix
    # The token loop is the canonical algorithm.
    assert cost.model_flops(B, length, D, is_complex=is_complex) == executed
    assert executed == B * length * D * (8 if is_complex else 2)


def test_keeps_decays_and_results_for_the_backward_pass():
    x, log_decay, _ = inputs(length=512)
    _, back = jax.vjp(functools.partial(diagonal_scan, chunk=16), x, log_decay)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(back))
    assert kept < 3.5 * x.nbytes  # h, the decays, and the slope of the exponential


def test_says_what_it_cannot_do():
    x, log_decay, _ = inputs()
    cases = [
        ((x[0], log_decay), {}, r'x \[B, T, ...\] and log_decay'),
        ((x, log_decay[:, 1:]), {}, r'x \[B, T, ...\] and log_decay'),
        ((x, log_decay), {'initial_state': x}, 'initial_state is'),
        ((x, log_decay), {'segment_ids': SEGMENTS[:, 1:]}, 'segment_ids are integers'),
        ((x, log_decay), {'chunk': 0}, 'chunk must be at least 1'),
        ((x, log_decay), {'implementation': 'pallas'}, "no implementation 'pallas'"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            diagonal_scan(*args, **options)
