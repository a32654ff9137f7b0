"""Attention by labels: each form against a loop in numpy, its cost and memory, what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import Others, attention, labelled_attention, last_choice
from effjax.kernels.labelled_attention import cost

BATCH, HEADS, DIM, CLIP, LABELS, OTHERS = 2, 2, 3, 4, 2, 5
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(length, clip=CLIP, count=OTHERS, dtype=np.float32):
    """Arrays of one call, with documents of odd lengths, padding, and pairs without a label."""
    rng = np.random.default_rng(length)
    own = [rng.normal(size=(BATCH, length, HEADS, DIM)).astype(dtype) for _ in range(3)]
    table = rng.normal(size=(2 * clip + 1, HEADS, DIM)).astype(dtype)
    far = [rng.normal(size=(BATCH, count, HEADS, DIM)).astype(dtype) for _ in range(2)]
    label_keys = rng.normal(size=(LABELS, HEADS, DIM)).astype(dtype)
    labels = rng.integers(-1, LABELS, (BATCH, length, count)).astype(np.int32)
    cut = np.sort(rng.integers(0, length, (BATCH, 3)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= cut[:, None, :]).sum(-1)
    segments = np.where(segments == 3, 0, segments).astype(np.int32)  # padding in the middle
    segments[1, -3:] = 0
    return (*own, table), (*far, label_keys, labels), segments


def loop(own, far, segments, radius):
    """The equation, a query at a time, in float64."""
    q, k, v, table = (np.asarray(x, np.float64) for x in own)
    clip, out = (len(table) - 1) // 2, np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        if segments is not None and segments[b, i] == 0:
            continue
        keys, values = [], []
        for j in range(q.shape[1]):
            if segments is not None and segments[b, j] != segments[b, i]:
                continue
            if radius is None or abs(i - j) <= radius:
                keys.append(k[b, j, h] + table[min(max(j - i, -clip), clip) + clip, h])
                values.append(v[b, j, h])
        for j in range(0 if far is None else far[0].shape[1]):
            if far[3][b, i, j] >= 0:
                keys.append(far[0][b, j, h] + np.asarray(far[2], np.float64)[far[3][b, i, j], h])
                values.append(far[1][b, j, h])
        s = np.array(keys) @ q[b, i, h] / np.sqrt(q.shape[-1])
        p = np.exp(s - s.max())
        out[b, i, h] = p @ np.array(values) / p.sum()
    return out


CASES = [
    (13, None, True, True),
    (13, 2, True, True),
    (13, 0, False, True),
    (13, 30, False, False),
    (150, 5, True, True),  # blocks of 16 beside each other
    (150, 20, True, False),  # blocks of 20, and a table shorter than the radius
    (151, 3, False, True),
]


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize(('length', 'radius', 'documents', 'second'), CASES)
def test_a_loop_over_queries(length, radius, documents, second, implementation):
    own, far, segments = inputs(length)
    far, segments = far if second else None, segments if documents else None
    expected = loop(own, far, segments, radius)
    o = labelled_attention(
        *own, radius=radius, others=None if far is None else Others(*far),
        segment_ids=segments, implementation=implementation,
    )  # fmt: skip
    np.testing.assert_allclose(o, expected, atol=1e-5, rtol=1e-4)
    if implementation == 'xla':
        assert last_choice('labelled_attention')['form'] == ('band' if length > 100 else 'dense')


@pytest.mark.ci
@pytest.mark.parametrize(('length', 'radius', 'documents', 'second'), CASES)
def test_gradients_equal_the_references_in_float64(length, radius, documents, second):
    """Of queries, keys, values, both tables and the second sequence."""
    with jax.enable_x64(True):
        own, far, segments = inputs(length, dtype=np.float64)
        labels, segments = far[3], segments if documents else None
        weight = np.sin(np.arange(own[0].size)).reshape(own[0].shape)

        def loss(arrays, implementation):
            own, far = arrays
            o = labelled_attention(
                *own, radius=radius, others=Others(*far, labels) if second else None,
                segment_ids=segments, implementation=implementation,
            )  # fmt: skip
            return jnp.sum(o * weight)

        def both(arrays):
            return tuple(jax.grad(loss)(arrays, name) for name in ('xla', 'reference'))

        ours, expected = jit(both)((own, far[:3]))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64 and np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, atol=1e-12, rtol=1e-9)
    q, k, v, table = ours[0]
    assert np.any(table)
    if documents:
        assert not any(np.any(np.asarray(g)[segments == 0]) for g in (q, k, v))


def test_distances_beyond_the_table_share_its_ends():
    """A larger table whose outer rows repeat its ends gives the same."""
    own, far, segments = inputs(40)
    longer = np.concatenate([own[3][:1].repeat(5, 0), own[3], own[3][-1:].repeat(5, 0)])
    call = functools.partial(
        labelled_attention, radius=9, others=Others(*far), segment_ids=segments
    )
    np.testing.assert_allclose(call(*own), call(*own[:3], longer), atol=1e-6)


def test_zero_vectors_are_attention_within_a_window():
    own, _, _ = inputs(23)
    o = labelled_attention(*own[:3], np.zeros_like(own[3]), radius=4)
    i = np.arange(23)
    window = abs(i[:, None] - i) <= 4
    np.testing.assert_allclose(o, attention(*own[:3], mask=window), atol=1e-5, rtol=1e-4)


def test_order_of_the_second_sequence_does_not_matter():
    own, far, segments = inputs(30)
    order = np.random.default_rng(0).permutation(OTHERS)
    moved = (far[0][:, order], far[1][:, order], far[2], far[3][..., order])
    call = functools.partial(labelled_attention, *own, radius=3, segment_ids=segments)
    np.testing.assert_allclose(call(others=Others(*far)), call(others=Others(*moved)), atol=1e-6)


def test_dropout_keeps_the_mean_and_needs_a_key():
    own, far, _ = inputs(30)
    call = functools.partial(labelled_attention, *own, radius=3, others=Others(*far), dropout=0.3)
    with pytest.raises(ValueError, match='dropout needs a PRNG key'):
        call()
    with pytest.raises(ValueError, match="cannot run as 'reference': it has no dropout"):
        call(rng=jax.random.key(0), implementation='reference')
    drawn = jit(jax.vmap(lambda key: call(rng=key)))(jax.random.split(jax.random.key(0), 600))
    exact = labelled_attention(*own, radius=3, others=Others(*far))
    assert np.std(drawn, axis=0).max() > 0.1
    np.testing.assert_allclose(np.mean(drawn, axis=0), exact, atol=0.2)


@pytest.mark.parametrize(('length', 'radius'), [(40, None), (40, 6), (300, 6), (300, 20), (301, 2)])
def test_costs_equal_the_walk(length, radius):
    own, far, segments = jax.eval_shape(lambda: inputs(length))
    shape = (BATCH, length, HEADS, DIM)
    facts = dict(radius=radius, clip=CLIP, others=OTHERS, labels=LABELS)

    def run(own, far, segments, implementation):
        return labelled_attention(
            *own, radius=radius, others=Others(*far), segment_ids=segments,
            implementation=implementation,
        )  # fmt: skip

    for name in ('xla', 'reference'):
        f = functools.partial(run, implementation=name)
        assert walk(f, own, far, segments).total == cost.executed_flops(name, *shape, **facts)
    i = np.arange(length)
    near = abs(i[:, None] - i) <= (length if radius is None else radius)
    kinds = len(np.unique(np.clip(i[:, None] - i, -CLIP, CLIP)[near])) + LABELS
    expected = 2 * BATCH * HEADS * DIM * (2 * (near.sum() + length * OTHERS) + length * kinds)
    assert cost.model_flops(*shape, **facts) == expected


def test_memory_is_linear_in_the_length():
    """Forward and backward make no array of T x T; twice the length, twice the largest."""

    def largest(length):
        own, far, segments = jax.eval_shape(lambda: inputs(length))

        def loss(own, far, segments, labels):
            return labelled_attention(
                *own, radius=6, others=Others(*far, labels), segment_ids=segments
            ).sum()

        grad = jax.grad(loss, argnums=(0, 1))
        return max(_sizes(jax.make_jaxpr(grad)(own, far[:3], segments, far[3]).jaxpr))

    assert largest(1024) < BATCH * HEADS * 1024 * (3 * 16 + OTHERS + 16)
    assert largest(2048) == 2 * largest(1024)


def _sizes(jaxpr):
    """Number of elements of every array that a program makes."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, 'size'))
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')
        ):
            inner = getattr(value, 'jaxpr', value)
            yield from _sizes(inner) if hasattr(inner, 'eqns') else ()


def test_refuses_what_does_not_fit():
    own, far, segments = inputs(7)
    for message, call in {
        r'takes q, k and v \[B, T, H, D\]': lambda: labelled_attention(own[0][:, 1:], *own[1:]),
        r'distance_keys are \[2 K \+ 1, H, D\]': lambda: labelled_attention(*own[:3], own[3][:2]),
        'radius must not be negative, got -1': lambda: labelled_attention(*own, radius=-1),
        r'integer labels \[B, T, S\]': lambda: labelled_attention(
            *own, others=Others(*far[:3], far[3][:, :-1])
        ),
        'segment_ids are integers': lambda: labelled_attention(*own, segment_ids=segments[:, 1:]),
        "no implementation 'cudnn'": lambda: labelled_attention(*own, implementation='cudnn'),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
