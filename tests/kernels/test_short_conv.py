"""The short convolution: against np.convolve, with documents and states, cut anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import last_choice, short_conv
from effjax.kernels.short_conv import cost

B, T, C = 3, 11, 2
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4],
        [0, 0, 5, 5, 5, 5, 0, 6, 6, 0, 0],
        [0] * 11,
    ],
    np.int32,
)
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(taps, length=T, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, length, C)).astype(np.float32)
    w = rng.normal(size=(taps, C)).astype(np.float32)
    return x, w, rng.normal(size=(B, taps - 1, C)).astype(np.float32)


def by_document(x, w, state, ids):
    """np.convolve of each document by itself in float64, the first one behind the state."""
    y, last = np.zeros(x.shape), state.astype(np.float64)
    taps = len(w)
    for b in range(len(x)):
        for n, document in enumerate(dict.fromkeys(ids[b][ids[b] != 0].tolist())):
            (at,) = np.nonzero(ids[b] == document)
            before = state[b] if n == 0 else np.zeros_like(state[b])
            whole = np.concatenate([before, x[b, at]]).astype(np.float64)
            for c in range(x.shape[2]):
                full = np.convolve(whole[:, c], w[::-1, c])
                y[b, at, c] = full[taps - 1 : taps - 1 + len(at)]
            last[b] = whole[len(whole) - (taps - 1) :]
    return y, last


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize('taps', [1, 2, 4, 14])
def test_equals_convolve(taps, implementation):
    x, w, state = inputs(taps)
    run = jit(functools.partial(short_conv, return_state=True, implementation=implementation))
    short = jit(functools.partial(short_conv))
    for ids, given in ((None, False), (None, True), (SEGMENTS, False), (SEGMENTS, True)):
        held = state if given else np.zeros_like(state)
        every = np.ones((B, T), np.int32) if ids is None else ids
        expected = by_document(x, w, held, every)
        got = run(x, w, state=state if given else None, segment_ids=ids)
        # float32 sums of up to 14 products of order 1
        np.testing.assert_allclose(got[0], expected[0], atol=3e-6)
        np.testing.assert_allclose(got[1], expected[1], atol=3e-6)
        alone = short(x, w, state=state if given else None, segment_ids=ids)
        np.testing.assert_allclose(alone, expected[0], atol=3e-6)
    assert last_choice('short_conv')['implementation'] == 'xla'


def test_more_channel_dimensions_and_16_bits():
    x, w, state = inputs(3)
    wide = short_conv(x[..., None], w[..., None], state=state[..., None])
    np.testing.assert_array_equal(wide[..., 0], short_conv(x, w, state=state))
    x16 = jnp.asarray(x, jnp.bfloat16)
    y, last = short_conv(x16, w, state=state, return_state=True)
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    _, last = short_conv(x16, w, return_state=True)
    assert last.dtype == jnp.bfloat16
    exact = short_conv(np.float32(x16), w)  # one rounding, at the end
    np.testing.assert_array_equal(short_conv(x16, w), exact.astype(jnp.bfloat16))


def test_gradients_of_everything():
    """In shifted products against the token loop in float64, through output and last state."""
    x, w, state = inputs(4, seed=1)

    def loss(arrays, implementation):
        x, w, state = arrays
        y, last = short_conv(
            x, w, state=state, segment_ids=SEGMENTS, return_state=True,
            implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last))

    grads = jit(jax.grad(lambda a: loss(a, 'xla')))((x, w, state))
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(a, jnp.float64) for a in (x, w, state))
        expected = jit(jax.grad(lambda a: loss(a, 'reference')))(wide)
        assert all(g.dtype == jnp.float64 for g in expected)
        expected = [np.asarray(g) for g in expected]
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert not np.any(np.asarray(grads[0])[SEGMENTS == 0])


@pytest.mark.parametrize('taps', [2, 4])
def test_a_row_may_be_cut_anywhere(taps):
    """The pieces padded as a batch pads them: the rest of a document may follow padding."""
    x, w, state = inputs(taps, seed=2)
    ids = np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]] * B, np.int32)
    run = functools.partial(short_conv, return_state=True)
    whole, last = run(x, w, state=state, segment_ids=ids)
    for cut in range(T + 1):
        head = np.where(np.arange(T) < cut, ids, 0)
        first, middle = run(x, w, state=state, segment_ids=head)
        if cut == 7:  # the next piece begins a document
            middle = jnp.zeros_like(middle)
        tail = np.where(np.arange(T) >= cut, ids, 0)
        second, end = run(x, w, state=middle, segment_ids=tail)
        np.testing.assert_allclose(first + second, whole, atol=2e-6)
        if cut < T:
            np.testing.assert_array_equal(end, last)


def test_padding_is_never_read():
    x, w, state = inputs(4)
    noisy = np.where(SEGMENTS[..., None] == 0, np.nan, x)
    for given in (None, state):
        clean = short_conv(x, w, state=given, segment_ids=SEGMENTS, return_state=True)
        again = short_conv(noisy, w, state=given, segment_ids=SEGMENTS, return_state=True)
        np.testing.assert_array_equal(clean[0], again[0])
        np.testing.assert_array_equal(clean[1], again[1])
        assert not np.any(np.asarray(again[0])[SEGMENTS == 0])


def test_keeps_no_shifted_copies_for_the_backward_pass():
    x, w, _ = inputs(8, length=64)
    _, back = jax.vjp(lambda x, w: short_conv(x, w, segment_ids=jnp.ones((B, 64), jnp.int32)), x, w)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(back) if leaf.dtype == jnp.float32)
    assert kept < 2.5 * x.nbytes


def test_costs_equal_the_walk():
    """Elementwise work is not counted, by either."""
    x, w, state = inputs(4)
    for implementation in ('xla', 'reference'):
        run = functools.partial(short_conv, segment_ids=SEGMENTS, implementation=implementation)
        assert walk(run, x, w, state=state, strict=True).total == 0.0
        assert cost.executed_flops(implementation, B, T, C, 4) == 0.0
    assert cost.elementwise_flops(B, T, C, 4) == 2 * 4 * x.size


def test_says_what_it_cannot_do():
    x, w, state = inputs(4)
    cases = [
        ((x[0], w), {}, r'x \[B, T, ...\] and w \[K, ...\]'),
        ((x, w[:, :1]), {}, 'of the same channels'),
        ((x, w[:0]), {}, 'of the same channels'),
        ((x, w), {'state': state[:, 1:]}, 'the state is'),
        ((x, w), {'segment_ids': SEGMENTS[:, 1:]}, 'segment_ids are integers'),
        ((x, w), {'implementation': 'pallas'}, "no implementation 'pallas'"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            short_conv(*args, **options)
