"""Attention by hashing: sorted chunks against the definition, its cost, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import lsh_attention, lsh_buckets
from effjax.kernels.lsh_attention import cost

BATCH, LENGTH, HEADS, DIM, ROUNDS, BUCKETS = 2, 23, 2, 4, 3, 4
SEGMENTS = np.array([[1] * 9 + [2] + [3] * 10 + [0] * 3, [0, 1, 1, 0] + [2] * 19], np.int32)
MODES = [(by_bucket, causal) for by_bucket in (False, True) for causal in (False, True)]
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(length=LENGTH, rounds=ROUNDS):
    keys = jax.random.split(jax.random.key(0), 3)
    q, v = (jax.random.normal(k, (BATCH, length, HEADS, DIM)) for k in keys[:2])
    return q, v, jax.random.randint(keys[2], (BATCH, rounds, HEADS, length), 0, BUCKETS)


# Every mode in chunks that do not divide the row; every chunk with documents, in two modes.
SORTED = [
    pytest.param(by_bucket, causal, documents, chunk, marks=() if ci else pytest.mark.slow)
    for by_bucket, causal in MODES
    for documents in (False, True)
    for chunk in (5, 1, 4, 40)
    for ci in [chunk == 5 or (documents and by_bucket == causal)]
]


@pytest.mark.ci
@pytest.mark.parametrize(('by_bucket', 'causal', 'documents', 'chunk'), SORTED)
def test_sorted_chunks_are_what_the_definition_says(by_bucket, causal, documents, chunk):
    """Values and gradients, at chunks from one token to more than the row."""
    q, v, buckets = inputs()
    segments = jnp.asarray(SEGMENTS) if documents else None
    weight = jnp.sin(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape)

    def loss(q, v, chunk, implementation):
        o = lsh_attention(
            q, v, buckets, chunk=chunk, by_bucket=by_bucket, causal=causal,
            segment_ids=segments, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(o * weight), o

    def both(q, v, chunk):
        f = jax.grad(loss, argnums=(0, 1), has_aux=True)
        return f(q, v, chunk, 'xla'), f(q, v, chunk, 'reference')

    ours, expected = jit(both, static_argnums=2)(q, v, chunk)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)
    if documents:
        assert not np.any(np.asarray(ours[1])[SEGMENTS == 0])


def test_one_chunk_is_attention_with_shared_keys_whatever_the_hash():
    q, v, buckets = inputs()
    o = lsh_attention(q, v, buckets, chunk=LENGTH)
    k = np.asarray(q, np.float64)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    s = np.einsum('bihd,bjhd->bhij', np.asarray(q, np.float64), k)
    s[..., np.arange(LENGTH), np.arange(LENGTH)] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(o, np.einsum('bhij,bjhd->bihd', p, v), atol=1e-5, rtol=1e-4)


def test_a_token_without_others_keeps_its_value():
    q, v, buckets = inputs()
    alone = jnp.broadcast_to(jnp.arange(LENGTH), buckets.shape)
    o = lsh_attention(q, v, alone, chunk=4, by_bucket=True)
    np.testing.assert_allclose(o, v, atol=1e-6)


def test_similar_vectors_meet_more_often():
    """The nearer two vectors, the likelier one bucket; opposite ones never meet."""
    x = jax.random.normal(jax.random.key(1), (1, 1, 1, 16))
    other = jax.random.normal(jax.random.key(2), (1, 1, 1, 16))
    mixed = jnp.concatenate([x, *(x + t * other for t in (0.1, 0.4, 1.0, 4.0)), -x], axis=1)
    rotations = jax.random.normal(jax.random.key(3), (1, 16, 4000, 4))
    buckets = np.asarray(lsh_buckets(mixed, rotations))[0, :, 0]
    assert buckets.min() == 0 and buckets.max() == 7
    rates = (buckets[:, :1] == buckets[:, 1:]).mean(0)
    assert np.all(np.diff(rates) < -0.05) and rates[0] > 0.8 and rates[-1] == 0
    counts = np.bincount(buckets[:, 0], minlength=8) / 4000
    assert np.all(np.abs(counts - 1 / 8) < 0.03)


@pytest.mark.parametrize('documents', [False, True], ids=['', 'documents'])
@pytest.mark.parametrize(('by_bucket', 'causal'), MODES)
def test_costs_equal_the_walk_and_memory_is_linear(by_bucket, causal, documents):
    length, chunk = 520, 16
    q, v, buckets = jax.eval_shape(lambda: inputs(length))
    segments = jnp.ones((BATCH, length), jnp.int32) if documents else None
    facts = dict(by_bucket=by_bucket, causal=causal)

    def run(q, v, buckets, implementation='xla'):
        return lsh_attention(
            q, v, buckets, chunk=chunk, segment_ids=segments, implementation=implementation, **facts
        ).sum()

    shape = (BATCH, length, HEADS, DIM)
    for name in ('xla', 'reference'):
        executed = cost.executed_flops(
            name, *shape, rounds=ROUNDS, chunk=chunk, documents=documents, **facts
        )
        assert walk(functools.partial(run, implementation=name), q, v, buckets).total == executed
    sizes = list(_sizes(jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(q, v, buckets).jaxpr))
    assert max(sizes) <= BATCH * ROUNDS * HEADS * 528 * 4 * chunk < BATCH * HEADS * length**2
    rotations = jax.ShapeDtypeStruct((HEADS, DIM, ROUNDS, BUCKETS // 2), jnp.float32)
    hashed = walk(lsh_buckets, q, rotations).total
    assert hashed == cost.hash_flops(*shape, ROUNDS, BUCKETS)


def _sizes(jaxpr):
    """Number of elements of every array that a program makes."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, 'size'))
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')
        ):
            inner = getattr(value, 'jaxpr', value)
            yield from _sizes(inner) if hasattr(inner, 'eqns') else ()


def test_pairs_of_the_model_cost():
    def count(length, chunk, causal):
        at = np.arange(length)
        behind = at[:, None] // chunk - at // chunk
        seen = (behind == 0) | (behind == 1)
        return int((seen & (at[:, None] >= at) if causal else seen).sum())

    for length, chunk in ((23, 4), (24, 4), (5, 8), (7, 1)):
        for causal in (False, True):
            assert cost.pairs(length, chunk, causal=causal) == count(length, chunk, causal)


def test_what_it_refuses():
    q, v, buckets = inputs()
    with pytest.raises(ValueError, match=r'q and v \[B, T, H, D\] and buckets \[B, R, H, T\]'):
        lsh_attention(q, v, buckets[:, :, :, 1:], chunk=4)
    with pytest.raises(ValueError, match='chunk must be at least 1, got 0'):
        lsh_attention(q, v, buckets, chunk=0)
    with pytest.raises(ValueError, match="no implementation 'tpu'"):
        lsh_attention(q, v, buckets, chunk=4, implementation='tpu')
