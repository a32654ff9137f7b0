"""Decoding with a cache equals the full forward pass, logits and tokens."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.core import trees
from effjax.core.cost import total
from effjax.core.info import SeqInfo
from effjax.models.decode import Sampling, make_generate, prefill

ATTENTION = {'kind': 'attention', 'heads': 4}
KINDS = {
    'mha': {'mixer': ATTENTION, 'positions': {'kind': 'learned'}},
    'mqa_parallel': {'mixer': {**ATTENTION, 'kv_heads': 1}, 'block': 'parallel', 'embed_width': 8},
    'window': {'mixer': {**ATTENTION, 'kv_heads': 2, 'window': 5}},
    'segments': {
        'layers': 0,
        'segments': (
            {'pattern': ({}, {'mixer': {**ATTENTION, 'window': 4}}), 'repeat': 2, 'share': 2},
            {'pattern': ({},)},
        ),
        'mixer': ATTENTION,
        'positions': {'kind': 'sinusoidal'},
        'ffn': None,
    },
    'simplified': {'mixer': {'kind': 'shaped_attention', 'heads': 4}, 'block': 'simplified'},
}
LENGTH = 40
SMALL = {'layers': 1, 'ffn': None, 'positions': {'kind': 'none'}}


def stepped(model, tokens, start, max_len, apart=True):
    """Logits [B, T, V] by a prefill of `start` tokens and then single steps, in one program.

    With the layers' states apart, as generation has them, or stacked.
    """
    graphdef, state = models.split(model)

    @jax.jit
    def run(state, tokens):
        model = models.merge(graphdef, state)
        cache = model.init_state(tokens.shape[0], max_len, jnp.float32)
        hidden, cache = model.prefill(tokens[:, :start], cache)

        cache = model.by_layer(cache) if apart else cache

        def step(cache, token):
            out, cache = model.step(token, cache)
            return cache, model.logits(out)

        _, rest = jax.lax.scan(step, cache, tokens[:, start:].T)
        return jnp.concatenate([model.logits(hidden), rest.swapaxes(0, 1)], 1)

    return run(state, tokens)


@pytest.fixture(scope='module')
def full_logits(forward):
    """`full_logits(model, tokens)`: one forward pass over everything."""
    return lambda model, tokens: forward(model, tokens, SeqInfo.of(*tokens.shape))[1]


# The others decode by themselves below, at fewer steps; here in the tier `ci`.
LONG = [
    pytest.param(kind, marks=() if kind in ('mha', 'segments') else pytest.mark.ci)
    for kind in KINDS
]


@pytest.mark.ci
@pytest.mark.parametrize('kind', LONG)
def test_prefill_then_256_steps_equal_one_full_forward(make_decoder, full_logits, kind):
    length = 7 + 256
    model = make_decoder(seq_len=length, **KINDS[kind])
    tokens = jax.random.randint(jax.random.key(2), (2, length), 0, 31)
    # 1e-4: the catalogue's bound on cached against uncached logits.
    np.testing.assert_allclose(
        stepped(model, tokens, 7, length), full_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.ci
@pytest.mark.parametrize('kind', ['segments', 'reversible'])
def test_states_apart_step_as_stacked_ones_do(make_decoder, kind):
    kinds = {**KINDS, 'reversible': {'mixer': ATTENTION, 'block': 'reversible'}}
    model = make_decoder(seq_len=12, **kinds[kind])
    tokens = jax.random.randint(jax.random.key(3), (2, 12), 0, 31)
    apart, stacked = (stepped(model, tokens, 4, 12, apart) for apart in (True, False))
    np.testing.assert_allclose(apart, stacked, atol=1e-5)  # float32 roundings: other fusions


def test_a_step_copies_no_cache(make_decoder):
    """Nothing in the compiled loop makes an array of a cache's size but its own writes."""
    model = make_decoder(seq_len=511, mixer=ATTENTION)
    graphdef, arrays = models.split(model)

    def write(arrays, state, token):
        model = models.merge(graphdef, arrays)

        def one(carry, _):
            hidden, state = model.step(*carry)
            return (jnp.argmax(model.logits(hidden), -1), state), None

        return jax.lax.scan(one, (token, model.by_layer(state)), None, length=4)[0][0]

    state = model.init_state(2, 511)
    text = jax.jit(write).lower(arrays, state, jnp.zeros(2, jnp.int32)).compile().as_text()
    arrays_made = re.findall(r'= \w+\[([\d,]+)\]\S* ([\w-]+)\(', text)
    cache = math.prod(state['body']['segment_0']['slot_0']['key'].shape[1:])  # of one layer
    made = {op for shape, op in arrays_made if math.prod(map(int, shape.split(','))) >= cache}
    assert 'scatter' in made and not made & {'copy', 'transpose', 'concatenate', 'dot'}, made


@functools.partial(jax.jit, static_argnums=0)
def prefill_in_pieces(graphdef, arrays, tokens):
    model = models.merge(graphdef, arrays)
    state = model.init_state(2, LENGTH, jnp.float32)
    first, state = model.prefill(tokens[:, :15], state)
    second, state = model.prefill(tokens[:, 15:], state)
    return model.logits(jnp.concatenate([first, second], 1)), state['position']


@pytest.mark.parametrize('kind', ['window'])
def test_a_prefill_may_come_in_pieces(make_decoder, full_logits, kind):
    model = make_decoder(seq_len=LENGTH, **KINDS[kind])
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, 31)
    pieces, position = prefill_in_pieces(*models.split(model), tokens)
    np.testing.assert_allclose(pieces, full_logits(model, tokens), atol=1e-4, rtol=1e-4)
    assert position.tolist() == [LENGTH, LENGTH]


@functools.partial(jax.jit, static_argnums=0)
def prefill_and_step(graphdef, arrays, tokens, lengths, token):
    model = models.merge(graphdef, arrays)
    logits, state = prefill(model, tokens, lengths, 20, jnp.float32)
    hidden, _ = model.step(token, state)
    return logits, model.logits(hidden)


@pytest.mark.ci
@pytest.mark.parametrize('kind', ['mha', 'simplified'])
def test_prompts_of_different_lengths_share_a_batch(make_decoder, full_logits, kind):
    model = make_decoder(seq_len=LENGTH, **KINDS[kind])
    tokens = jax.random.randint(jax.random.key(2), (3, 12), 0, 31)
    lengths, after = jnp.array([12, 3, 7]), jnp.array([1, 2, 3])
    logits, stepped_on = prefill_and_step(*models.split(model), tokens, lengths, after)
    # Causality: what stands behind the appended token does not matter to it.
    alone = jnp.pad(tokens, ((0, 0), (0, 1))).at[jnp.arange(3), lengths].set(after)
    expected = full_logits(model, alone)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(logits[row], expected[row, length - 1], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(stepped_on[row], expected[row, length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kind', ['mqa_parallel', 'window'])
def test_greedy_decoding_equals_full_recomputation(make_decoder, full_logits, kind):
    model = make_decoder(seq_len=LENGTH, **KINDS[kind])
    graphdef, state = models.split(model)
    prompt = jax.random.randint(jax.random.key(3), (2, 6), 0, 31)
    generate = make_generate(graphdef, tokens=24)
    lengths = jnp.full(2, 6)
    out, counts = generate(state['params'], state['buffers'], prompt, lengths, jax.random.key(0))
    whole = jnp.pad(prompt, ((0, 0), (0, 24)))
    for i in range(24):  # causality: what stands behind position 5 + i is not read
        best = jnp.argmax(full_logits(model, whole)[:, 5 + i], -1)
        whole = whole.at[:, 6 + i].set(best)
    np.testing.assert_array_equal(out, whole[:, 6:])
    assert counts.tolist() == [24, 24]
    assert len(set(np.asarray(out).ravel().tolist())) > 3  # not one token over and over


def test_generation_stops_at_the_stop_token(make_decoder):
    graphdef, state = models.split(make_decoder(seq_len=LENGTH, **SMALL))
    prompt = jax.random.randint(jax.random.key(3), (2, 4), 0, 31)
    args = (state['params'], state['buffers'], prompt, jnp.full(2, 4), jax.random.key(0))
    free, _ = make_generate(graphdef, tokens=8)(*args)
    stop = int(free[0, 2])
    out, counts = make_generate(graphdef, tokens=8, stop=stop)(*args)
    first = free[0].tolist().index(stop) + 1
    assert counts[0] == first
    assert out[0].tolist() == free[0, :first].tolist() + [stop] * (8 - first)


def test_sampling_is_a_function_of_the_key(make_decoder):
    graphdef, state = models.split(make_decoder(seq_len=LENGTH, **SMALL))
    prompt = jnp.zeros((2, 4), jnp.int32)
    generate = make_generate(graphdef, tokens=16, sampling=Sampling(temperature=1.0, top_k=20))
    args = (state['params'], state['buffers'], prompt, jnp.full(2, 4))
    a, b, c = (generate(*args, jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c) and not np.array_equal(a[0], a[1])


def test_a_reset_starts_a_new_document(make_decoder, full_logits):
    model = make_decoder(seq_len=LENGTH, layers=1, ffn=None, positions={'kind': 'learned'})
    tokens = jax.random.randint(jax.random.key(2), (2, 10), 0, 31)
    graphdef, arrays = models.split(model)

    @jax.jit
    def run(arrays):
        model = models.merge(graphdef, arrays)
        state = model.init_state(2, LENGTH, jnp.float32)
        _, state = model.prefill(tokens, state)
        token, reset = jnp.array([3, 3]), jnp.array([True, False])
        hidden, state = model.step(token, state, reset=reset)
        return model.logits(hidden), state['position']

    logits, position = run(arrays)
    fresh = full_logits(model, jnp.array([[3]]))[0, -1]
    np.testing.assert_allclose(logits[0], fresh, atol=1e-4, rtol=1e-4)
    assert position.tolist() == [1, 11]
    assert not np.allclose(logits[1], fresh, atol=1e-2)


@pytest.mark.parametrize('kind', KINDS)
def test_state_bytes_equal_the_real_state(make_decoder, kind):
    model = make_decoder(seq_len=LENGTH, **KINDS[kind])
    state = jax.eval_shape(lambda: model.init_state(2, LENGTH))
    assert total(model.cost(2, LENGTH).values()).state_bytes == trees.nbytes(state)
