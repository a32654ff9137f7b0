"""Head product and cross-entropy in one: against the reference, float64 and optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.kernels import Head, last_choice, linear_cross_entropy, linear_divergence
from effjax.kernels.cross_entropy import cost

# Tiny programs that run once: compiling them well takes longer than running them badly.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(rows=13, width=6, vocab=11, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, w, b = (
        jnp.asarray(rng.normal(size=s), dtype) for s in ((rows, width), (width, vocab), vocab)
    )
    targets = jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, rows) / 2, jnp.float32)
    return x, w, b, targets, weights


@pytest.mark.parametrize('chunks', [1, 4, 50])
@pytest.mark.parametrize('call', [{}, {'soft_cap': 2.0, 'z_loss': 0.1, 'bias': True}])
def test_against_the_reference(call, chunks):
    """Values, and the gradients of x, w, bias and weights; also where chunks do not divide rows."""
    x, w, b, targets, weights = inputs()
    call = dict(call)
    with_bias = call.pop('bias', False)

    def run(implementation):
        def f(x, w, b, weights):
            loss, sums = linear_cross_entropy(
                x, w, targets, weights, bias=b if with_bias else None, chunks=chunks,
                implementation=implementation, **call,
            )  # fmt: skip
            return 0.3 * loss, sums

        return jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True))(x, w, b, weights)

    (loss, sums), grads = run('chunked')
    (expected, expected_sums), expected_grads = run('reference')
    chex.assert_trees_all_close((loss, sums), (expected, expected_sums), rtol=1e-5)
    # Products of order 1 in float32, summed in another order.
    chex.assert_trees_all_close(grads, expected_grads, atol=1e-5)
    assert last_choice('linear_cross_entropy')['implementation'] == 'reference'
    plain, _ = linear_cross_entropy(
        x, w, targets, weights, bias=b if with_bias else None, chunks=chunks, **call
    )
    np.testing.assert_allclose(0.3 * plain, expected, rtol=1e-5)  # without gradients


def test_against_float64_and_optax():
    with jax.enable_x64(True):
        x, w, _, targets, weights = inputs(dtype=jnp.float64)
        weights = weights.astype(jnp.float64)

        def ours(x, w):
            return linear_cross_entropy(x, w, targets, weights, chunks=3)[0]

        def theirs(x, w):
            losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, targets)
            return jnp.sum(weights * losses)

        (a, grads), (b, expected) = (jax.value_and_grad(f, (0, 1))(x, w) for f in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=1e-12)
        chex.assert_trees_all_close(grads, expected, atol=1e-12)


def test_sums_by_name():
    x, w, _, targets, weights = inputs()
    loss, sums = linear_cross_entropy(x, w, targets, weights, z_loss=0.1, chunks=2)
    logits = np.asarray(x @ w)
    right = logits.argmax(-1) == np.asarray(targets)
    np.testing.assert_allclose(sums['correct'], np.sum(np.asarray(weights) * right))
    np.testing.assert_allclose(loss, sums['nll'] + sums['z_loss'], rtol=1e-6)
    lse = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(sums['z_loss'], 0.1 * np.sum(weights * lse**2), rtol=1e-5)
    assert all(s.dtype == jnp.float32 and s.shape == () for s in (loss, *sums.values()))


def test_mixed_precision():
    """bfloat16 vectors on a float32 weight: near the float32 loss, gradients in their dtypes."""
    x, w, _, targets, weights = inputs(rows=64, width=32, vocab=50)
    f = jax.value_and_grad(
        lambda x, w: linear_cross_entropy(x, w, targets, weights, chunks=4)[0], (0, 1)
    )
    expected, wide = f(x, w)
    loss, grads = f(x.astype(jnp.bfloat16), w)
    assert loss.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    # Logits have 8 bits: 0.4 % of values up to about 15, averaged over 64 rows.
    np.testing.assert_allclose(loss, expected, rtol=1e-2)
    error = jnp.linalg.norm(grads[1] - wide[1]) / jnp.linalg.norm(wide[1])
    assert error < 0.03


def test_extreme_logits_and_weights_of_zero_stay_finite():
    x, w, _, targets, weights = inputs()
    f = jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, targets, 0 * weights)[0], (0, 1))
    loss, grads = f(x, w)
    assert loss == 0 and all(not g.any() for g in grads)
    g = jax.value_and_grad(lambda x: linear_cross_entropy(x, w, targets, weights, chunks=2)[0])
    chex.assert_tree_all_finite(g(1e4 * x))


def test_vmap_remat_and_accumulation_agree():
    x, w, _, targets, weights = inputs(rows=12)

    def f(x, w, rows=slice(None)):
        return linear_cross_entropy(x, w, targets[rows], weights[rows], chunks=2)[0]

    @jit
    def run(x, w):
        whole = jax.value_and_grad(f, (0, 1))(x, w)
        remat = jax.value_and_grad(jax.checkpoint(f), (0, 1))(x, w)
        mapped = jax.vmap(jax.value_and_grad(f), (0, None))(jnp.stack([x, x]), w)
        parts = [jax.grad(f, 1)(x[r], w, r) for r in (slice(0, 5), slice(5, None))]
        return whole, remat, mapped, sum(parts)

    whole, remat, mapped, parts = run(x, w)
    chex.assert_trees_all_close(whole, remat, rtol=1e-5)
    np.testing.assert_allclose(mapped[1][1], whole[1][0], atol=1e-6)
    np.testing.assert_allclose(parts, whole[1][1], atol=1e-5)


def test_chunks_bound_the_memory_and_nothing_is_computed_twice():
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 16), (16, 4096))]
    targets, weights = jnp.zeros(512, jnp.int32), jnp.ones(512)

    def compiled(chunks, **kw):
        f = lambda x, w: linear_cross_entropy(x, w, targets, weights, chunks=chunks, **kw)[0]  # noqa: E731
        return jax.jit(jax.grad(f, (0, 1))).lower(*shapes)

    def temporary(chunks, **kw):
        return compiled(chunks, **kw).compile().memory_analysis().temp_size_in_bytes

    full = 512 * 4096 * 4
    assert temporary(8) < full / 2 < full < temporary(1, implementation='reference')
    # Logits, dx and dw: three products, no fourth for logits computed again.
    assert compiled(1).as_text().count('stablehlo.dot_general') == 3
    assert cost.head_flops(2, 3, 5) == 60
    assert cost.logits_bytes(512, 4096, 2, 8) == 2 * 64 * 4096 * 2


def test_bad_calls_say_what_is_wrong():
    x, w, b, targets, weights = inputs()
    cases = (
        ((x, w.T, targets, weights), {}, 'takes x'),
        ((x, w, targets[:3], weights), {}, r'takes targets and weights \(13,\)'),
        ((x, w, weights, weights), {}, 'targets must be integers'),
        ((x, w, targets, weights), {'bias': b[:2]}, r'bias must be \[11\]'),
        ((x, w, targets, weights), {'chunks': 0}, 'chunks must be at least 1'),
        ((x, w, targets, weights), {'implementation': 'triton'}, "no implementation 'triton'"),
    )
    for arrays, call, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arrays, **call)


# ---- the divergence of a student from a teacher ------------------------------------------------


def heads(dtype=jnp.float32):
    """A student, a wider teacher with the same vocabulary, and weights."""
    x, w, b, _, weights = inputs(dtype=dtype)
    rng = np.random.default_rng(1)
    tx, tw = (jnp.asarray(rng.normal(size=s), dtype) for s in ((13, 9), (9, 11)))
    return (x, w, b), Head(tx, tw, soft_cap=3.0), weights.astype(dtype)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_divergence_in_float64(temperature):
    """The value by its formula in NumPy; the gradient by differences."""
    with jax.enable_x64(True):
        (x, w, b), teacher, weights = heads(jnp.float64)

        def kl(x, w, b, chunks=3):
            return linear_divergence(
                Head(x, w, b, 2.0), teacher, weights, temperature=temperature, chunks=chunks
            )

        def softmax(z):
            e = np.exp(z / temperature)
            return e / e.sum(-1, keepdims=True)

        def formula(x, w, b):
            p = softmax(2.0 * np.tanh((x @ w + b) / 2.0))
            q = softmax(3.0 * np.tanh(teacher.x_ND @ teacher.w_DV / 3.0))
            return np.sum(np.asarray(weights)[:, None] * q * (np.log(q) - np.log(p)))

        args = tuple(map(np.asarray, (x, w, b)))
        np.testing.assert_allclose(kl(x, w, b), formula(*args), rtol=1e-12)
        for chunks in (1, 3):
            grads = jax.grad(functools.partial(kl, chunks=chunks), (0, 1, 2))(x, w, b)
            direction = [np.random.default_rng(2).normal(size=a.shape) for a in args]
            h = 1e-5
            ends = [
                formula(*(a + s * h * d for a, d in zip(args, direction, strict=True)))
                for s in (1, -1)
            ]
            slope = sum(np.sum(g * d) for g, d in zip(grads, direction, strict=True))
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-8)


@pytest.mark.parametrize('chunks', [1, 4, 50])
def test_divergence_against_the_reference(chunks):
    (x, w, b), teacher, weights = heads()

    def run(implementation):
        def f(x, w, b, weights, teacher):
            return 0.3 * linear_divergence(
                Head(x, w, b, 2.0), Head(*teacher, soft_cap=3.0), weights, temperature=2.0,
                chunks=chunks, implementation=implementation,
            )  # fmt: skip

        return jit(jax.value_and_grad(f, (0, 1, 2, 3, 4)))(x, w, b, weights, teacher[:2])

    ours, expected = run('chunked'), run('reference')
    chex.assert_trees_all_close(ours, expected, atol=1e-5)
    for gradient in ours[1][4]:
        assert not gradient.any()  # nothing flows into the teacher


def test_divergence_refuses():
    (x, w, _), teacher, weights = heads()
    for call, message in (
        ((Head(x, w[:, :5]), teacher, weights), 'one vocabulary, got 5 and 11'),
        ((Head(x, w), teacher, weights[:4]), 'a weight for each of 13 rows'),
        ((Head(x, w[:3]), teacher, weights), r'takes x \[N,D\] and w \[D,V\]'),
    ):
        with pytest.raises(ValueError, match=message):
            linear_divergence(*call)
    with pytest.raises(ValueError, match='temperature must be above 0'):
        linear_divergence(Head(x, w), teacher, weights, temperature=0.0)
