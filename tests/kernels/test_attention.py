"""Softmax attention against numpy in float64, against jax.nn, and by the catalogue's checks."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.kernels import MaskSpec, attention, last_choice, save_attention, target
from effjax.kernels.attention import cost, xla
from effjax.kernels.attention.problem import Extras, Problem

# Tiny programs that run once: compiling them well takes longer than running them badly.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(batch=2, length=24, heads=4, kv_heads=2, head_dim=8, dtype=jnp.float32, keys=None):
    rng = np.random.default_rng(0)
    keys = length if keys is None else keys
    shapes = ((length, heads), (keys, kv_heads), (keys, kv_heads))
    return tuple(jnp.asarray(rng.normal(size=(batch, n, h, head_dim)), dtype) for n, h in shapes)


def segments(batch, length, seed=0):
    """Documents of random lengths, and padding at the end of each row."""
    rng = np.random.default_rng(seed)
    out = np.zeros((batch, length), np.int32)
    for row in out:
        cuts = np.sort(rng.choice(np.arange(1, length - 3), 3, replace=False))
        row[:] = 1 + np.searchsorted(cuts, np.arange(length), side='right')
        row[length - 3 :] = 0
    return out


def oracle(q, k, v, allowed, soft_cap=None):
    """A loop over rows, heads and queries in float64; `allowed` is bool [B, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, weights = np.zeros(q.shape), np.zeros((*q.shape[:3], k.shape[1]))
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        see = np.nonzero(allowed[b, t])[0]
        if not len(see):
            continue
        s = k[b, see, h // group] @ q[b, t, h] / np.sqrt(q.shape[-1])
        s = soft_cap * np.tanh(s / soft_cap) if soft_cap else s
        p = np.exp(s - s.max())
        weights[b, t, h, see] = p / p.sum()
        out[b, t, h] = weights[b, t, h] @ v[b, :, h // group]
    return out, weights


def mask_of(length, kind='causal', window=None, ids=None, batch=2):
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    allowed = np.broadcast_to((j <= i) if kind == 'causal' else True, (batch, length, length))
    if window is not None:
        allowed = allowed & (j > i - window)
    if ids is not None:
        allowed = allowed & (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None]
    return allowed


CALLS = {
    'causal': {},
    'full': {'mask': 'full'},
    'window': {'window': 5},
    'segments': {'segment_ids': True},
    'segments_full_cap': {'mask': 'full', 'segment_ids': True, 'soft_cap': 2.0},
    'window_segments_cap': {'window': 3, 'segment_ids': True, 'soft_cap': 2.0},
}


@pytest.mark.parametrize('name', CALLS)
def test_against_float64_numpy(name):
    """'reference' and 'xla', documents and padding included, to 1e-5."""
    call = dict(CALLS[name])
    ids = segments(2, 24) if call.pop('segment_ids', False) else None
    q, k, v = inputs()
    allowed = mask_of(24, call.get('mask', 'causal'), call.get('window'), ids)
    expected, _ = oracle(q, k, v, allowed, call.get('soft_cap'))
    for implementation in ('reference', 'xla'):
        out = attention(q, k, v, segment_ids=ids, implementation=implementation, **call)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        assert last_choice('attention')['implementation'] == implementation
        if ids is not None:
            assert not np.any(np.asarray(out)[ids == 0])


@pytest.mark.ci
@pytest.mark.parametrize(
    ('form', 'name'),
    [*[('blocks', name) for name in CALLS], ('band', 'window'), ('band', 'window_segments_cap')],
)
def test_forms_of_xla_and_their_gradients_against_the_reference(form, name, monkeypatch):
    """Lengths that blocks do not divide; gradients finite, and 0 for padding."""
    call = dict(CALLS[name])
    monkeypatch.setattr(cost, 'BLOCK', 8)
    monkeypatch.setattr(cost, 'BAND_MIN', 4)
    monkeypatch.setattr(cost, 'DENSE_MAX', 8)
    if form == 'blocks' and 'window' in call:
        monkeypatch.setattr(cost, 'band_block', lambda window: 1000)  # too wide to be worth it
    ids = segments(2, 21) if call.pop('segment_ids', False) else None
    arrays = inputs(length=21)

    def run(implementation):
        def f(arrays):
            o = attention(*arrays, segment_ids=ids, implementation=implementation, **call)
            return jnp.sum(jnp.sin(o) * jnp.arange(1, 9)), o

        return jit(jax.value_and_grad(f, has_aux=True))(arrays)

    (_, expected), expected_grads = run('reference')
    (_, out), grads = run('xla')
    assert last_choice('attention')['form'] == form
    np.testing.assert_allclose(out, expected, atol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, atol=5e-5)
    if ids is not None:
        assert all(not np.any(np.asarray(g)[ids == 0]) for g in grads)


def test_against_jax_nn():
    q, k, v = inputs()
    for window in (None, 6):
        expected = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=None if window is None else (window - 1, 0)
        )
        np.testing.assert_allclose(attention(q, k, v, window=window), expected, atol=1e-5)
        spec = MaskSpec(causal=True, window=window)
        np.testing.assert_allclose(attention(q, k, v, mask=spec), expected, atol=1e-5)
    halves = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    expected = jax.nn.dot_product_attention(*halves, is_causal=True)
    out = attention(*halves)
    assert out.dtype == jnp.bfloat16
    # One rounding of the probabilities and one of the output, to 8 bits each.
    np.testing.assert_allclose(
        out.astype(np.float32), expected.astype(np.float32), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize('blocks', [False, True])
def test_positions_arrays_and_rows_without_any_key(blocks, monkeypatch):
    """Order by position, a boolean mask, and queries that see nothing: 0, with finite gradients."""
    if blocks:
        monkeypatch.setattr(cost, 'DENSE_MAX', 4)
        monkeypatch.setattr(cost, 'BLOCK', 8)
    rng = np.random.default_rng(1)
    q, k, v = inputs(length=10, keys=13)
    q_at, k_at = (np.stack([rng.permutation(20)[:n] for _ in range(2)]) for n in (10, 13))
    q_ids, k_ids = (rng.integers(0, 3, (2, n)).astype(np.int32) for n in (10, 13))
    place = k_at[:, None] <= q_at[:, :, None]
    place &= k_at[:, None] > q_at[:, :, None] - 6
    place &= (q_ids[:, :, None] == k_ids[:, None]) & (q_ids != 0)[:, :, None]
    table = rng.random((10, 13)) < 0.2
    table[4] = False
    calls = (
        (place, {
            'window': 6, 'segment_ids': q_ids, 'kv_segment_ids': k_ids, 'q_positions': q_at,
            'kv_positions': k_at,
        }),
        (np.broadcast_to(table, (2, 10, 13)), {'mask': table}),
    )  # fmt: skip
    for allowed, call in calls:
        expected, _ = oracle(q, k, v, allowed)
        assert not expected[~allowed.any(-1)].any() and (~allowed.any(-1)).any()
        f = jit(
            jax.value_and_grad(
                lambda q, k, v, call=call: jnp.sum(attention(q, k, v, **call)),
                argnums=(0, 1, 2),
            )
        )
        np.testing.assert_allclose(attention(q, k, v, **call), expected, atol=1e-5)
        chex.assert_tree_all_finite(f(q, k, v))


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_a_single_query_reads_a_cache(kv_heads):
    """As decoding does: values and gradients, places in any order."""
    q, k, v = inputs(length=1, keys=37, kv_heads=kv_heads)
    rng = np.random.default_rng(3)
    call = {
        'segment_ids': np.array([[1], [2]], np.int32), 'soft_cap': 5.0, 'window': 30,
        'kv_segment_ids': np.sort(rng.integers(0, 3, (2, 37)).astype(np.int32), 1),
        'q_positions': np.array([[25], [40]]),
        'kv_positions': np.stack([rng.permutation(50)[:37] for _ in range(2)]),
    }  # fmt: skip
    weights = rng.normal(size=q.shape)

    def run(implementation):
        def f(q, k, v):
            o = attention(q, k, v, **call, implementation=implementation)
            return jnp.sum(o * weights), o

        return jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    # float32 sums in another order
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-6), run('xla'), run('reference')
    )


def test_rows_sum_to_one():
    """Weights, read off by values that are unit vectors, are not negative and sum to 1."""
    ids = segments(2, 16)
    q, k, _ = inputs(length=16, kv_heads=4, head_dim=16)
    v = jnp.broadcast_to(jnp.eye(16)[None, :, None], (2, 16, 4, 16))
    weights = attention(q, k, v, segment_ids=ids)
    _, expected = oracle(q, k, v, mask_of(16, ids=ids))
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert np.all(np.asarray(weights) >= 0)
    sums = np.asarray(weights).sum(-1)
    np.testing.assert_allclose(sums[ids != 0], 1, atol=1e-5)


@pytest.mark.parametrize('kv_heads', [1, 2])
def test_shared_keys_equal_repeated_ones_and_are_never_repeated(kv_heads):
    q, k, v = inputs(batch=3, length=40, heads=6, kv_heads=kv_heads, head_dim=16)
    repeated = tuple(jnp.repeat(x, 6 // kv_heads, axis=2) for x in (k, v))
    np.testing.assert_allclose(attention(q, k, v), attention(q, *repeated), atol=1e-5)
    # No array of the size of repeated keys is made from keys: [B, S, H, D] in any order.
    text = jit(lambda k, v: attention(q[:, :20], k, v, mask='full')).lower(k, v).compile().as_text()
    sizes = [
        np.prod([int(n) for n in dims.split(',')])
        for dims in re.findall(r'= f32\[([\d,]+)\]', text)
    ]
    assert sizes and repeated[0].size not in sizes


def test_vmap_equals_a_loop_and_remat_saves_the_output():
    arrays = inputs(length=9)
    stacked = tuple(jnp.stack([x, 2 * x]) for x in arrays)
    mapped = jax.vmap(attention)(*stacked)
    np.testing.assert_allclose(mapped[1], attention(*(2 * x for x in arrays)), atol=1e-5)

    def products(policy):
        body = jax.checkpoint(lambda *a: jnp.sin(attention(*a)), policy=policy)
        grad = jax.grad(lambda *a: jnp.sum(jnp.sin(body(*a))))
        return str(jax.make_jaxpr(grad)(*arrays)).count('dot_general')

    assert products(save_attention) < products(jax.checkpoint_policies.nothing_saveable)


def test_blocks_save_their_residuals_under_remat(monkeypatch):
    """With output and log-sum-exp saved, the forward scan is not run again."""
    monkeypatch.setattr(cost, 'DENSE_MAX', 8)
    monkeypatch.setattr(cost, 'BLOCK', 8)
    arrays = inputs(length=20)

    def scans(policy):
        body = jax.checkpoint(lambda *a: jnp.sin(attention(*a)), policy=policy)
        grad = jax.grad(lambda *a: jnp.sum(jnp.sin(body(*a))))
        return jit(grad).lower(*arrays).as_text().count('stablehlo.while')

    assert (scans(save_attention), scans(None)) == (2, 3)


def test_dropout_keeps_the_mean_and_needs_a_key():
    q, k, v = inputs(batch=64, length=8)
    plain = attention(q, k, jnp.ones_like(v))
    dropped = attention(q, k, jnp.ones_like(v), dropout=0.3, rng=jax.random.key(0))
    assert np.std(dropped) > 0.1
    # 4096 averages of weights with standard deviation below 0.66 each.
    np.testing.assert_allclose(np.mean(dropped), np.mean(plain), atol=0.05)
    with pytest.raises(ValueError, match='needs a PRNG key'):
        attention(q, k, v, dropout=0.1)


def test_lowers_for_tpu_through_splash():
    def arrays(heads, length=256):
        return jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16)

    def f(q, k, v, ids):
        o = attention(q, k, v, segment_ids=ids, window=128, soft_cap=30.0)
        return jnp.sum(o.astype(jnp.float32))

    with target('tpu'):
        ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
        traced = jax.jit(jax.grad(f, argnums=(0, 1, 2))).trace(arrays(4), arrays(2), arrays(2), ids)
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
        assert last_choice('attention')['implementation'] == 'splash'
        assert text.count('tpu_custom_call') >= 2  # forward and backward
        jax.eval_shape(attention, arrays(4, 100), arrays(4, 100), arrays(4, 100))
        chosen = last_choice('attention')
    assert chosen['implementation'] == 'xla'
    assert chosen['refused']['splash'] == 'lengths must be multiples of 128, not 100 and 100'


def problem(**kw):
    base = Problem(
        shape=(2, 64, 64, 4, 2, 64), dtype='bfloat16', mask='causal', window=None, segments=False,
        shared_segments=False, positions=False, scale=1.0, soft_cap=None, dropout=0.0,
    )  # fmt: skip
    return Problem(**{**base.__dict__, **kw})


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        ({}, None),
        ({'window': 8}, None),
        ({'dtype': 'float32'}, 'bfloat16 or float16, not float32'),
        ({'soft_cap': 1.0}, 'no soft cap'),
        ({'dropout': 0.1}, 'not exposed'),
        ({'positions': True}, 'positions'),
        ({'shape': (2, 64, 64, 4, 2, 20)}, 'head_dim 20'),
        ({'shape': (2, 63, 63, 4, 2, 64), 'segments': True}, 'even lengths'),
    ],
)
def test_what_cudnn_refuses(change, why):
    from effjax.kernels.attention import cudnn

    with target('gpu'):
        refusal = cudnn.refuse(problem(**change))
    assert (refusal is None) if why is None else (why in refusal)
    assert 'NVIDIA GPU, not cpu' in cudnn.refuse(problem())


def test_documents_of_the_ragged_layout():
    from effjax.kernels.attention import cudnn

    ids = jnp.asarray([[1, 1, 1, 2, 0, 0], [7, 7, 7, 7, 7, 7]])
    offsets, lengths = cudnn._documents(ids)
    none = [-1] * (cudnn.PACKED_DOCUMENTS - 3)
    assert offsets.tolist() == [[0, 3, 4, *none, -1], [0, -1, -1, *none, -1]]
    assert lengths.tolist() == [[3, 1, 2, *none], [6, -1, -1, *none]]
    assert cudnn.form(problem(segments=True, shared_segments=True)) == 'packed'
    assert cudnn.form(problem(segments=True)) == 'mask'
    assert cudnn.form(problem()) == 'plain'


def test_bad_calls_say_what_is_wrong():
    q, k, v = inputs()
    other = jnp.zeros((2, 24, 3, 8))
    cases = (
        ((q, other, other), {}, '4 heads are no multiple of 3'),
        ((q, k, v), {'mask': 'causla'}, "not 'causla'"),
        ((q, k, v), {'mask': 'full', 'window': 3}, 'window of 3 needs a causal mask'),
        ((q, k[:, :5], v[:, :5]), {}, '24 queries and 5 keys needs positions'),
        ((q, k, v), {'mask': np.ones((3, 3), bool)}, r'bool \[24, 24\]'),
        ((q, k, v), {'segment_ids': jnp.ones((2, 3), jnp.int32)}, 'segment_ids is integer'),
        ((q, k, v), {'q_positions': jnp.ones((2, 24), jnp.int32)}, 'given together'),
        ((q, k, v), {'kv_segment_ids': jnp.ones((2, 24), jnp.int32)}, 'needs segment_ids too'),
        ((q, k, v.astype(jnp.bfloat16)), {}, 'dtypes differ'),
        ((q[0], k, v), {}, 'takes q'),
        ((q, k, v), {'implementation': 'cudnn'}, 'needs an NVIDIA GPU, not cpu'),
        ((q, k, v), {'implementation': 'splash'}, 'needs a TPU, not cpu'),
    )
    for arrays, call, message in cases:
        with pytest.raises(ValueError, match=message):
            attention(*arrays, **call)


@pytest.mark.parametrize('window', [None, 1, 3, 7, 40])
def test_pairs_count_the_mask(window):
    for length in (1, 7, 20):
        expected = mask_of(length, window=window, batch=1).sum()
        assert cost.pairs(length, mask='causal', window=window) == expected
    assert cost.pairs(7, 9, mask='full') == 63


def test_executed_pairs_are_those_of_the_forms():
    """2048 causal tokens take 10 of 16 blocks of 512; a window's bands twice its width."""
    assert cost.executed_pairs('xla', 2048) == 10 * 512**2
    assert cost.executed_pairs('xla', 2048, window=256) == 2048 * 512
    assert cost.executed_pairs('xla', 2048, window=1500) == 10 * 512**2
    assert cost.executed_pairs('xla', 1024) == 1024**2
    assert cost.executed_pairs('cudnn', 1024) == 1024 * 1025 / 2
    assert cost.executed_flops('reference', 2, 8, 4, 16) == 4 * 2 * 8 * 8 * 4 * 16


def test_long_windows_never_form_the_score_matrix():
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)

    def temporary(**kw):
        f = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, **kw)), argnums=(0, 1, 2))
        return jax.jit(f).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    whole = 4 * 4096**2
    assert temporary(window=64) < whole / 8
    assert temporary() < whole / 8


def test_blockwise_takes_any_block():
    q, k, v = inputs(length=20)
    call = problem(shape=(2, 20, 20, 4, 2, 8), dtype='float32', scale=8**-0.5)
    out = xla.blockwise(call, 7, q.reshape(2, 20, 2, 2, 8), k, v, Extras())
    np.testing.assert_allclose(out.reshape(q.shape), attention(q, k, v), atol=1e-5)
