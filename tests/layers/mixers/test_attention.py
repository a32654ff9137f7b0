"""The attention mixer: the catalogue's checks, costs, caches, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.axes import metadata
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo, Source
from effjax.core.policy import Policy
from effjax.core.trees import nbytes
from effjax.costs import walk
from effjax.kernels import MaskSpec, attention, last_choice
from effjax.kernels.attention.cost import executed_flops
from effjax.layers.mixers.attention import Attention

WIDTH, LENGTH = 16, 10


def context(width=WIDTH, positions='none', **kw):
    kw = {'max_len': 32, 'policy': Policy(), 'init': 'lecun', **kw}
    return Context(width=width, positions={'kind': positions}, **kw)


def make(ctx=None, seed=0, **kw):
    return Attention(ctx or context(), rngs=nnx.Rngs(seed), **kw)


def inputs(width=WIDTH, length=LENGTH):
    return jax.random.normal(jax.random.key(9), (2, length, width)), SeqInfo.of(2, length)


def self_attention(x, q, k, v, out):
    """One head, written out in float64; matrices are [D, K] and out [K, D]."""
    x, q, k, v, out = (np.asarray(a, np.float64) for a in (x, q, k, v, out))
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        s = (x[b, : t + 1] @ k) @ (x[b, t] @ q) / np.sqrt(q.shape[-1])
        p = np.exp(s - s.max())
        y[b, t] = (p / p.sum()) @ (x[b, : t + 1] @ v) @ out
    return y


def matrices(mixer, head):
    group = head // (mixer.heads // mixer.kv_heads)
    return (
        mixer.query.kernel[:, head], mixer.key.kernel[:, group], mixer.value.kernel[:, group],
        mixer.out.kernel[head],
    )  # fmt: skip


@pytest.mark.parametrize(('heads', 'kv_heads'), [(1, 1), (4, 4), (4, 2), (4, 1)])
def test_multi_head_is_a_sum_of_self_attentions(heads, kv_heads):
    """One head is self-attention; several are the sum of each head through its part of `out`."""
    mixer = make(heads=heads, kv_heads=kv_heads)
    x, info = inputs()
    expected = sum(self_attention(x, *matrices(mixer, h)) for h in range(heads))
    np.testing.assert_allclose(mixer(x, info=info)[0], expected, atol=1e-5)


def test_multi_query_equals_tied_heads_with_a_cache_of_one():
    mqa, mha = make(heads=4, kv_heads=1), make(heads=4, seed=1)
    for name in ('query', 'out'):
        getattr(mha, name).kernel[...] = getattr(mqa, name).kernel[...]
    for name in ('key', 'value'):
        kernel = getattr(mqa, name).kernel[...]
        getattr(mha, name).kernel[...] = jnp.repeat(kernel, 4, axis=1)
    x, info = inputs()
    np.testing.assert_allclose(mqa(x, info=info)[0], mha(x, info=info)[0], atol=1e-5)

    def cached(mixer):
        state = jax.eval_shape(functools.partial(mixer.init_state, 3, 32, jnp.bfloat16))
        real = nbytes([state['key'], state['value']])
        assert mixer.kv_bytes(3, 32, jnp.bfloat16) == real
        assert mixer.state_bytes(3, 32, jnp.bfloat16) == nbytes(state)
        return real

    assert cached(mha) == 4 * cached(mqa) == 2 * 3 * 32 * WIDTH * 2


def test_gpt2_cache_is_576_mib():
    mixer = nnx.eval_shape(lambda: make(context(768), heads=12))
    assert 12 * mixer.kv_bytes(8, 1024, jnp.float32) == 576 * 2**20
    state = jax.eval_shape(functools.partial(mixer.init_state, 8, 1024, jnp.float32))
    assert 12 * nbytes([state['key'], state['value']]) == 576 * 2**20


@pytest.mark.parametrize('window', [None, 4, 100])
def test_cost_counts_pairs_and_the_walk_what_runs(window):
    """Model FLOPs count the mask's pairs; the walk of the program counts what 'xla' executes."""
    length = 200
    mixer = make(heads=4, kv_heads=2, window=window)
    x, info = inputs(length=length)
    cost = mixer.cost(2, length)
    pairs = sum(min(t + 1, window or length) for t in range(length))
    projections = 2 * 2 * length * WIDTH * (2 * WIDTH + 2 * (WIDTH // 2))
    assert cost.matmul == projections + 4 * 2 * WIDTH * pairs
    walked = walk(lambda x: mixer(x, info=info)[0], x)
    assert last_choice('attention')['form'] == ('band' if window == 4 else 'dense')
    executed = projections + executed_flops('xla', 2, length, 4, 4, window=window)
    assert walked.total == executed
    full = make(context(causal=False), heads=4).cost(1, 8)
    assert full.matmul == 2 * 8 * WIDTH * 4 * WIDTH + 4 * WIDTH * 64
    assert full.state_bytes == 0


def test_parameters_are_named():
    mixer = make(heads=4, kv_heads=2, bias=True, qk_norm=True)
    meta = metadata(nnx.state(mixer, nnx.Param))
    assert meta['query']['kernel'].axes == ('embed', 'heads', 'head_dim')
    assert meta['key']['kernel'].axes == ('embed', 'kv_heads', 'head_dim')
    assert meta['value']['bias'].axes == ('kv_heads', 'head_dim')
    assert meta['out']['kernel'].axes == ('heads', 'head_dim', 'embed')
    assert meta['out']['bias'].axes == ('embed',)
    assert meta['query_norm']['scale'].axes == ('head_dim',)
    assert meta['query_norm']['scale'].no_decay and not meta['query']['kernel'].no_decay


def test_a_ring_of_the_windows_size_is_enough():
    """300 steps through a ring of 5 slots equal the parallel form with rotary positions."""
    mixer = make(context(positions='rope'), heads=2, window=5)
    x, info = inputs(length=60)
    state = mixer.init_state(2, 60, jnp.float32)
    assert state['key'].shape == (2, 2, 5, 8)
    _, ys = jax.lax.scan(lambda s, x: mixer.step(x, s)[::-1], state, x.swapaxes(0, 1))
    np.testing.assert_allclose(ys.swapaxes(0, 1), mixer(x, info=info)[0], atol=1e-5)


@pytest.mark.parametrize(
    'window',
    [5, 400, pytest.param(1, marks=pytest.mark.ci), pytest.param(40, marks=pytest.mark.ci)],
)
def test_a_window_to_both_sides_is_the_dense_mask(window):
    """|i - j| < window in each document, with grouped heads; long rows gather blocks of keys."""
    mixer = make(context(positions='rope', causal=False), heads=4, kv_heads=2, window=window)
    x, info = inputs(length=300)
    ids = np.where(np.arange(300) < 170, 1, np.where(np.arange(300) < 290, 2, 0))
    packed = SeqInfo(jnp.where(ids == 2, info.positions - 170, info.positions),
                     jnp.broadcast_to(jnp.asarray(ids), (2, 300)))  # fmt: skip
    i, j = np.arange(300)[:, None], np.arange(300)

    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    def both(told, same, real):
        q, k, v = mixer._project(x, told)
        mask = jnp.asarray(np.abs(i - j) < window) & same
        o = attention(q, k, v, mask=mask, implementation='reference')
        expected = mixer.out(jnp.where(real[:, None, None], o, 0))
        return mixer(x, info=told)[0], expected

    for told, same, real in (
        (info, jnp.ones((300, 300), bool), jnp.ones(300, bool)),
        (packed, jnp.asarray(ids[:, None] == ids), jnp.asarray(ids != 0)),
    ):
        np.testing.assert_allclose(*both(told, same, real), atol=1e-5)
        assert last_choice('attention')['form'] == ('gather' if window <= 40 else 'dense')
    found = mixer.cost(2, 300)
    pairs = np.sum(np.abs(i - j) < window)
    assert found.matmul == 2 * 600 * WIDTH * 3 * WIDTH + 4 * 2 * WIDTH * pairs
    assert found.state_bytes == 0
    spec = MaskSpec(False, window)
    executed = executed_flops('xla', 2, 300, 4, 4, mask='sparse', spec=spec)
    walked = walk(lambda x: mixer(x, info=info)[0], x)
    assert walked.total == 2 * 600 * WIDTH * 3 * WIDTH + executed


def test_prompts_of_unequal_length_decode_together():
    """Right padding takes no slot: each row goes on right after its own last token."""
    mixer = make(context(positions='rope'), heads=2)
    x, info = inputs()
    lengths = np.array([3, 7])
    ids = (np.arange(7) < lengths[:, None]).astype(np.int32)
    prompt = SeqInfo(info.positions[:, :7], jnp.asarray(ids))
    _, state, _ = mixer(x[:, :7], info=prompt, state=mixer.init_state(2, LENGTH, jnp.float32))
    np.testing.assert_array_equal(state['count'], lengths)
    for t in range(3):
        y, state = mixer.step(x[np.arange(2), lengths + t], state)
        whole = mixer(x, info=info)[0]
        np.testing.assert_allclose(y, whole[np.arange(2), lengths + t], atol=1e-5)


def test_dropout_of_attention_weights_only_while_training():
    mixer = make(heads=2, attention_dropout=0.5)
    x, info = inputs()
    plain = mixer(x, info=info)[0]
    np.testing.assert_array_equal(plain, make(heads=2)(x, info=info)[0])
    train = SeqInfo(info.positions, rng=jax.random.key(0), train=True)
    assert jnp.abs(mixer(x, info=train)[0] - plain).max() > 1e-3


def test_what_it_refuses():
    cases = (
        ({'heads': 3}, 'heads 3 do not divide width 16'),
        ({'heads': 4, 'kv_heads': 3}, 'kv_heads 3 do not divide heads 4'),
        ({'heads': 4, 'window': 0}, 'window must be at least 1'),
        ({'heads': 4, 'head_dim': 0}, 'head_dim must be at least 1'),
        ({'heads': 4, 'attention_dropout': 1.0}, r'must be in \[0, 1\)'),
    )
    for kw, message in cases:
        with pytest.raises(ConfigError, match=message):
            make(**kw)
    x, info = inputs()
    with pytest.raises(ValueError, match="cannot run as 'cudnn': it needs an NVIDIA GPU"):
        make(heads=4, implementation='cudnn')(x, info=info)


def test_shared_keys_and_values_change_no_other_initial_value():
    """Arms of a study that differ in `kv_heads` alone start equal in queries and output."""
    full, grouped = make(heads=4, qk_norm=True), make(heads=4, kv_heads=2)
    for name in ('query', 'out'):
        a, b = (getattr(mixer, name).kernel[...] for mixer in (full, grouped))
        np.testing.assert_array_equal(a, b)


def across(mixer, x, source, ids=None, kv_ids=None):
    """Cross-attention in numpy, float64: a matrix for each row and head."""
    p = jax.tree.map(
        lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    )
    x, source = np.asarray(x, np.float64), np.asarray(source, np.float64)
    q = np.einsum('btd,dhk->bthk', x, p['query']['kernel'])
    k, v = (np.einsum('bsd,dhk->bshk', source, p[name]['kernel']) for name in ('key', 'value'))
    k, v = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    scores = np.einsum('bthk,bshk->bhts', q, k) / q.shape[-1] ** 0.5
    if ids is not None:
        same = (ids[:, :, None] == kv_ids[:, None, :]) & (ids != 0)[:, :, None]
        scores = np.where(same[:, None], scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = np.einsum('bhts,bshk->bthk', weights, v)
    return np.einsum('bthk,hkd->btd', o, p['out']['kernel'])


def test_attends_to_a_context():
    """In any order, whatever the positions; documents read their own part, and padding nothing."""
    mixer = make(heads=4, kv_heads=2)
    x, info = inputs()
    length = x.shape[1]
    source = jax.random.normal(jax.random.key(9), (2, 6, x.shape[2]))
    y = mixer(x, info=info, context=source)[0]
    np.testing.assert_allclose(y, across(mixer, x, source), atol=2e-6)

    ids = np.array([[1] * 4 + [2] * (length - 4), [1] * (length - 2) + [0] * 2], np.int32)
    kv_ids = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2]], np.int32)
    packed = SeqInfo(info.positions, jnp.asarray(ids))
    expected = across(mixer, x, source, ids, kv_ids)
    order = np.array([4, 0, 5, 2, 1, 3])
    for at in (np.arange(6), order):
        context = Source(source[:, at], jnp.asarray(kv_ids[:, at]))
        y, state, _ = mixer(x, info=packed, context=context)
        assert state is None
        np.testing.assert_allclose(np.where(ids[..., None], y, 0), np.where(
            ids[..., None], expected, 0), atol=2e-6)  # fmt: skip
        # A context with padding for rows of one document.
        y = mixer(x, info=info, context=context)[0]
        whole = across(mixer, x, source, np.ones_like(ids), (kv_ids != 0).astype(int))
        np.testing.assert_allclose(y, whole, atol=2e-6)
    slope = jax.grad(lambda s: mixer(x, info=packed, context=Source(s, kv_ids))[0].sum())(source)
    assert not np.any(slope[0, 5]) and not np.any(slope[1, 4:]) and np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match='a context keeps no decoding state'):
        mixer(x, info=info, context=source, return_state=True)
