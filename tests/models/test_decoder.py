"""The decoder: its outputs, its causality, what it refuses, and what it says it costs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.core.cost import total
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo

INFO = SeqInfo.of(2, 16)
POSITIONS = ('rope', 'learned', 'sinusoidal', 'none')


@pytest.mark.parametrize('kind', POSITIONS)
def test_nothing_looks_ahead(make_decoder, forward, tokens, kind):
    model = make_decoder(layers=1, positions={'kind': kind})
    cut = 9
    changed = tokens.at[:, cut:].set((tokens[:, cut:] + 1) % 31)
    (a, _), (b, _) = (forward(model, t, INFO) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :cut], b[:, :cut])
    assert not np.allclose(a[:, cut:], b[:, cut:])


def test_the_gradient_with_respect_to_a_later_input_is_zero(make_decoder, tokens):
    graphdef, state = models.split(make_decoder(layers=2, positions={'kind': 'learned'}))
    cut = 9

    def f(table):
        params = {**state['params'], 'positions': {'table': table}}
        model = models.merge(graphdef, {**state, 'params': params})
        return jnp.sum(model.logits(model(tokens, INFO)[0][:, cut]))

    grad = jax.jit(jax.grad(f))(state['params']['positions']['table'])
    assert np.all(np.asarray(grad[cut + 1 :]) == 0)
    assert np.all(np.any(np.asarray(grad[: cut + 1]) != 0, axis=1))


def test_order_matters_exactly_with_positions(make_decoder, forward, tokens):
    swapped = tokens.at[:, 0].set(tokens[:, 1]).at[:, 1].set(tokens[:, 0])
    for kind in POSITIONS:
        model = make_decoder(layers=1, positions={'kind': kind})
        last = [forward(model, t, INFO)[0][:, -1] for t in (tokens, swapped)]
        assert np.allclose(*last, atol=1e-6) == (kind == 'none'), kind


def test_tied_head_is_the_embedding_and_untied_is_not(make_decoder):
    tied, untied = make_decoder(layers=1), make_decoder(layers=1, tied=False)
    np.testing.assert_array_equal(tied.head_weight(), tied.embedding.table[...].T)
    assert untied.param_count() == tied.param_count() + 31 * 16
    names = models.split(tied)[1]['params']
    assert 'head' not in names


def test_soft_cap_bounds_the_logits(make_decoder, forward, tokens):
    model, capped = make_decoder(layers=1), make_decoder(layers=1, soft_cap=2.0)
    (_, plain), (_, bounded) = (forward(m, tokens, INFO) for m in (model, capped))
    assert plain.dtype == jnp.float32 and jnp.max(jnp.abs(plain)) > 2
    np.testing.assert_allclose(bounded, 2 * jnp.tanh(plain / 2), rtol=1e-5, atol=1e-5)


def test_compute_dtype_is_that_of_the_activations(make_decoder, forward, tokens):
    model = make_decoder(layers=1, compute='bfloat16')
    hidden, logits = forward(model, tokens, INFO)
    assert hidden.dtype == jnp.bfloat16 and model.head_weight().dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(models.split(model)[1]))


def test_a_step_compiles_once(make_decoder, tokens):
    graphdef, state = models.split(make_decoder(layers=2))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(state, tokens):
        return models.merge(graphdef, state)(tokens, INFO)[0]

    for shift in range(3):
        run(jax.tree.map(lambda a: a * 0.5, state), (tokens + shift) % 31)


@pytest.mark.parametrize(
    'config',
    [
        {},
        {'tied': False, 'bias': True, 'positions': {'kind': 'learned'}},
        {'norm': {'kind': 'layernorm'}, 'block': 'parallel', 'ffn': {'kind': 'swiglu'}},
        {'mixer': {'kind': 'attention', 'heads': 4, 'kv_heads': 1, 'qk_norm': True}},
        {'block': 'postnorm', 'final_norm': False, 'share': 2},
        {'block': 'simplified', 'mixer': {'kind': 'shaped_attention', 'heads': 2}},
        {'ffn': None},
        {'embed_width': 8, 'share': 4},
        {'embed_width': 8, 'tied': False},
    ],
)
def test_cost_counts_every_parameter(make_decoder, config):
    model = make_decoder(**config)
    real = sum(x.size for x in jax.tree.leaves(models.split(model)[1]['params']))
    assert model.param_count() == real


def test_cost_is_a_static_sum_of_parts(make_decoder):
    model = make_decoder(tied=False)
    cost = model.cost(3, 8)
    assert set(cost) == {'embedding', 'attention', 'ffn', 'norm', 'head'}
    assert cost['head'].matmul == 2 * 3 * 8 * 16 * 31
    assert cost['embedding'].model_flops == 0
    once, twice = total(cost.values()), total(model.cost(6, 8).values())
    assert twice.model_flops == 2 * once.model_flops and twice.params == once.params


REFUSED = [
    ({'width': 15}, r'config\.model\.mixer'),
    ({'vocab_size': 0}, r'config\.model\.vocab_size must be at least 1'),
    ({'layers': 0}, r'config\.model\.layers must be at least 1'),
    ({'dropout': 1.5}, r'config\.model\.dropout'),
    ({'embed_dropout': -0.1}, r'config\.model\.embed_dropout must be at least 0'),
    ({'soft_cap': -1.0}, r'config\.model\.soft_cap'),
    (
        {'max_len': 8},
        r'config\.seq_len 16 is longer than the 8 positions of config\.model\.max_len',
    ),
    ({'block': 'paralel'}, r"unknown block 'paralel'.*Did you mean 'parallel'"),
    (
        {'mixer': {'kind': 'atention'}},
        r"unknown mixer 'atention' at config\.model\.mixer.*attention",
    ),
    ({'mixer': {'kind': 'attention', 'head': 2}}, r"config\.model\.mixer\.head: .*'heads'"),
    ({'ffn': {'kind': 'gelu', 'hidden': 'x'}}, r'config\.model\.ffn\.hidden: expected int'),
    ({'norm': {'kind': 'batchnorm'}}, r"unknown norm 'batchnorm' at config\.model\.norm"),
    ({'positions': {'kind': 'ropes'}}, r"config\.model\.positions.*'rope'"),
    ({'share': 3}, r'config\.model\.share 3 does not divide the 4'),
    ({'segments': ({'pattern': ()},), 'layers': 0}, r'segments\.0\.pattern must list at least one'),
    ({'segments': ({'patern': ({},)},), 'layers': 0}, r'segments\.0\.patern.*Did you mean'),
    ({'segments': ({'pattern': ({},), 'repeat': 2},)}, r'layers is 4, but .* have 2 blocks'),
    ({'block': 'simplified'}, r"a 'simplified' block has no skip connection"),
]


@pytest.mark.parametrize(('config', 'message'), REFUSED)
def test_impossible_configs_are_refused_with_the_key(make_decoder, config, message):
    with pytest.raises(ConfigError, match=message):
        make_decoder(**config)


def test_dropout_of_the_embedding_alone(make_decoder, tokens):
    """Of a model without layers' dropout, and the other way round."""

    def spread(**config):
        model = make_decoder(layers=1, ffn=None, final_norm=False, **config)
        info = SeqInfo.of(*tokens.shape, rng=jax.random.key(0), train=True)
        return model.embedding(tokens), model(tokens, info)[0]

    for config in ({'embed_dropout': 0.5}, {'dropout': 0.5}):
        assert not np.allclose(spread(**config)[1], spread()[1])
    body, plain = (spread(dropout=d, embed_dropout=0.0)[1] for d in (0.5, 0.0))
    embedded = spread()[0]
    # The residual stream keeps every embedding; what is dropped is the block's own output.
    dropped = np.isclose(body, embedded) & ~np.isclose(plain, embedded)
    assert 0.4 < dropped.mean() < 0.6


def test_a_sequence_longer_than_the_positions_is_refused(make_decoder):
    model = make_decoder(layers=1)
    with pytest.raises(ConfigError, match=r'17 tokens is longer than the 16 positions.*max_len'):
        model(jnp.zeros((1, 17), jnp.int32), SeqInfo.of(1, 17))
    with pytest.raises(ConfigError, match='17 tokens is longer'):
        model.init_state(1, 17)


def test_palm_block_reads_one_norm_and_multi_query_shares_a_head(make_decoder, tokens):
    """PaLM, arXiv 2204.02311: y = x + mixer(norm(x)) + ffn(norm(x)), one key-value head."""
    mixer = {'kind': 'attention', 'heads': 4, 'kv_heads': 1}
    model = make_decoder(layers=1, block='parallel', mixer=mixer, ffn={'kind': 'swiglu'})
    slot = model.body.segment_0.slot_0
    graphdef, state = models.split(slot)
    block = models.merge(graphdef, jax.tree.map(lambda a: a[0], state))
    x = jax.random.normal(jax.random.key(5), (2, 16, 16))
    h = block.norm_both(x)
    expected = x + block.mixer(h, info=INFO)[0] + block.ffn(h, info=INFO)[0]
    np.testing.assert_allclose(block(x, info=INFO)[0], expected, rtol=1e-6)
    norms = [name for name in state['params'] if name.startswith('norm')]
    assert norms == ['norm_both']
    assert model.init_state(2, 16)['body']['segment_0']['slot_0']['key'].shape[-3] == 1


def test_packed_documents_equal_separate_ones(make_decoder, forward, tokens):
    model = make_decoder(layers=1, positions={'kind': 'learned'})
    half = jnp.tile(jnp.arange(8), 2)[None]
    packed = SeqInfo(positions=half, segment_ids=jnp.repeat(jnp.array([[1, 2]]), 8, axis=1))
    together = forward(model, tokens[:1], packed)[0]
    apart = forward(model, tokens[:1].reshape(2, 8), SeqInfo.of(2, 8))[0]
    np.testing.assert_allclose(together.reshape(2, 8, 16), apart, atol=1e-5)


def plain_gpt2(params, tokens, heads):
    """GPT-2 written down a second time, in float64 numpy: logits [T, V] of one row."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, w):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w['scale'] + w['bias']
        )

    def dense(x, w):
        inner = w['kernel'].reshape(x.shape[-1], -1)
        return x @ inner + w['bias'].reshape(-1)

    x = p['embedding']['table'][tokens] + p['positions']['table'][: len(tokens)]
    length, width = x.shape
    stacked = p['body']['segment_0']['slot_0']
    for layer in range(stacked['norm_ffn']['scale'].shape[0]):
        w = jax.tree.map(lambda a, i=layer: a[i], stacked)
        h, mixer = norm(x, w['norm_mixer']), w['mixer']
        q, k, v = (
            dense(h, mixer[name]).reshape(length, heads, -1) for name in ('query', 'key', 'value')
        )
        scores = np.einsum('thd,shd->hts', q, k) / np.sqrt(width / heads)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        read = np.einsum('hts,shd->thd', weights, v).reshape(length, width)
        x = x + dense(read, mixer['out'])
        up = dense(norm(x, w['norm_ffn']), w['ffn']['up'])
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + dense(gelu, w['ffn']['down'])
    return norm(x, p['norm']) @ p['embedding']['table'].T


def test_equals_gpt2_written_down_a_second_time(make_decoder, forward, tokens):
    model = make_decoder(
        layers=3, bias=True, norm={'kind': 'layernorm'}, positions={'kind': 'learned'}
    )
    params = models.split(model)[1]['params']
    found = forward(model, tokens, INFO)[1]
    expected = [plain_gpt2(params, np.asarray(row), heads=2) for row in tokens]
    # float32 against float64 on logits of order 10.
    np.testing.assert_allclose(found, expected, atol=1e-4)
