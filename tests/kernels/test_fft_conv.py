"""The long convolution: against the direct sum, with documents, nothing wraps or looks ahead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import fft_conv, last_choice
from effjax.kernels.choice import target
from effjax.kernels.fft_conv import cost

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(length, taps, batch=2, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, length, channels)).astype(np.float32)
    return x, rng.normal(size=(taps, channels)).astype(np.float32)


def packed(length, batch=2, seed=0):
    """Documents of random lengths, one token long and very long too, padding between some."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    for b in range(batch):
        at, document = rng.integers(0, 3), 1
        while at < length:
            end = at + int(rng.choice([1, 2, 5, 17, 40, 100]))
            ids[b, at:end] = document
            at, document = end + int(rng.choice([0, 0, 3])), document + 1
    return ids


def direct(x, h, ids=None):
    """np.convolve of each document by itself, in float64."""
    y = np.zeros(x.shape)
    ids = np.ones(x.shape[:2], np.int32) if ids is None else ids
    for b, d in np.ndindex(x.shape[0], x.shape[2]):
        for document in set(ids[b]) - {0}:
            (at,) = np.nonzero(ids[b] == document)
            y[b, at, d] = np.convolve(x[b, at, d].astype(np.float64), h[:, d])[: len(at)]
    return y


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize(
    ('length', 'taps'), [(1, 1), (2, 9), (16, 16), (17, 17), (37, 5), (97, 97), (128, 200)]
)
def test_equals_the_direct_sum(length, taps, implementation):
    x, h = inputs(length, taps)
    run = jit(functools.partial(fft_conv, implementation=implementation))
    # Sums of up to 128 products of order 1 in float32.
    np.testing.assert_allclose(run(x, h), direct(x, h), atol=3e-5)
    for ids in (packed(length), np.ones((2, length), np.int32)):
        got = run(x, h, segment_ids=ids)
        np.testing.assert_allclose(got, direct(x, h, ids), atol=3e-5)
    assert last_choice('fft_conv')['implementation'] == implementation


def test_long_rows_are_right_to_rounding():
    x, h = inputs(3000, 3000, batch=1, channels=2)
    whole = jit(fft_conv)(x, h)
    assert last_choice('fft_conv')['form'] == 'whole'
    ids = packed(3000, batch=1)
    halves = jit(fft_conv)(x, h, segment_ids=ids)
    assert last_choice('fft_conv')['form'] == 'halves'
    # Values are of order sqrt(3000) = 55: a relative 1e-5.
    np.testing.assert_allclose(whole, direct(x, h), atol=5e-4)
    np.testing.assert_allclose(halves, direct(x, h, ids), atol=5e-4)


def test_an_impulse_at_the_end_does_not_wrap_around():
    for length in (31, 64):
        x = np.zeros((1, length, 1), np.float32)
        x[0, -1] = 1e3
        h = np.ones((length, 1), np.float32)
        y = np.asarray(jit(fft_conv)(x, h))
        np.testing.assert_allclose(y[0, :-1], 0, atol=1e-3)  # rounding of 1000 in float32
        np.testing.assert_allclose(y[0, -1], 1e3, rtol=1e-6)


def test_with_documents_nothing_looks_ahead_even_by_rounding():
    length = 67
    x, h = inputs(length, length, batch=1)
    ids = np.ones((1, length), np.int32)
    run = jit(lambda x: fft_conv(x, h, segment_ids=jnp.asarray(ids)))
    before = run(x)
    for t in (1, 30, 33, 34, length - 1):
        moved = x.copy()
        moved[0, t] += 1e3
        after = run(moved)
        np.testing.assert_array_equal(after[0, :t], before[0, :t])
        assert np.any(after[0, t] != before[0, t])


@pytest.mark.parametrize('documents', [False, True])
def test_gradients(documents):
    length = 53
    x, h = inputs(length, length, seed=1)
    ids = packed(length, seed=4) if documents else None
    assert ids is None or np.any(ids == 0)

    def loss(x, h, implementation):
        return jnp.sum(jnp.sin(fft_conv(x, h, segment_ids=ids, implementation=implementation)))

    got = jit(jax.grad(lambda x, h: loss(x, h, 'xla'), argnums=(0, 1)))(x, h)
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64), jnp.asarray(h, jnp.float64)
        expected = jit(jax.grad(lambda x, h: loss(x, h, 'reference'), argnums=(0, 1)))(*wide)
        exact = jit(jax.grad(lambda x, h: loss(x, h, 'xla'), argnums=(0, 1)))(*wide)
        assert expected[0].dtype == jnp.float64
        for a, b in zip(exact, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)
        expected = [np.asarray(g) for g in expected]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # sums of 100 terms of order 1
    if ids is not None:
        assert not np.any(np.asarray(got[0])[ids == 0])


def test_padding_is_never_read_and_16_bits_do_not_overflow():
    x, h = inputs(40, 40)
    ids = packed(40, seed=4)
    noisy = np.where((ids == 0)[..., None], np.nan, x)
    run = jit(fft_conv)
    clean = run(x, h, segment_ids=ids)
    np.testing.assert_array_equal(run(noisy, h, segment_ids=ids), clean)
    half = run((x * 300).astype(jnp.bfloat16), h.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and np.isfinite(np.asarray(half, np.float32)).all()


@pytest.mark.parametrize(('length', 'taps'), [(1, 1), (2, 1), (17, 17), (37, 5), (64, 200)])
def test_short_rows_are_a_product_on_gpus(length, taps):
    x, h = inputs(length, taps)

    def both(x, h):
        y, pull = jax.vjp(fft_conv, x, h)
        return y, pull(jnp.sin(y))

    whole = jit(both)(x, h)
    with target('gpu'):
        short = jit(lambda x, h: both(x, h))(x, h)
        assert last_choice('fft_conv')['form'] == 'toeplitz'
        walked = walk(lambda x, h: fft_conv(x, h), x, h, strict=True)
        jax.eval_shape(lambda x: fft_conv(x, x[0]), jnp.zeros((1, cost.SHORT + 1, 1)))
        assert last_choice('fft_conv')['form'] == 'whole'
    assert walked.total == cost.executed_flops('xla', 2, length, 3, form='toeplitz')
    np.testing.assert_allclose(short[0], direct(x, h), atol=3e-5)
    # Both are sums of float32 products of order 1, up to 64 of them and up to 2 x 64 for taps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), short, whole)
    # No rounding of a later token reaches an earlier one.
    np.testing.assert_array_equal(short[0][:, :1], x[:, :1] * h[:1])


def test_any_dimensions_of_channels():
    x, h = inputs(20, 20, channels=6)
    flat = fft_conv(x, h)
    split = fft_conv(x.reshape(2, 20, 2, 3), h.reshape(20, 2, 3))
    np.testing.assert_array_equal(split.reshape(2, 20, 6), flat)


@pytest.mark.parametrize(('length', 'taps'), [(64, 64), (97, 97), (200, 7), (11, 11)])
def test_costs_equal_the_walk(length, taps):
    x, h = inputs(length, taps)
    walked = walk(fft_conv, x, h, strict=True)
    assert walked.total == pytest.approx(cost.executed_flops('xla', 2, length, 3, taps=taps))
    ids = np.ones((2, length), np.int32)
    walked = walk(lambda x, h: fft_conv(x, h, segment_ids=ids), x, h, strict=True)
    assert walked.total == pytest.approx(cost.executed_flops('xla', 2, length, 3, documents=True))
    assert cost.model_flops(2, 64, 3) == 2 * 3 * 5 * 128 * 7
    # Joining halves costs about log2(T) / 4 times one transform of twice the length.
    assert cost.executed_flops('xla', 1, 8192, 1, documents=True) < 4 * cost.executed_flops(
        'xla', 1, 8192, 1
    )


def test_memory_grows_with_the_length_and_not_its_square():
    x, h = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs(1024, 1024))
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda x, h, ids: fft_conv(x, h, segment_ids=ids))(x, h, ids)
    assert max(v.aval.size for e in jaxpr.eqns for v in e.outvars) <= 2 * 2 * 1024 * 3


def test_says_what_it_cannot_do():
    x, h = inputs(8, 8)
    cases = [
        ((x[0], h), {}, r'x \[B, T, ...\] and h \[L, ...\]'),
        ((x, h[:, :2]), {}, 'of the same channels'),
        ((x, h[:0]), {}, 'of the same channels'),
        ((x, h), {'segment_ids': np.ones((2, 7), np.int32)}, 'segment_ids are integers'),
        ((x, h), {'implementation': 'direct'}, "no implementation 'direct'"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            fft_conv(*args, **options)
