"""Decoding with a cache equals the full forward pass, logits and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import trees
from effjax.core.info import SeqInfo
from effjax.models import build
from effjax.models.decode import Sampling, make_generate, prefill

ATTENTION = {'kind': 'attention', 'heads': 4}
KINDS = {
    'mha': {'mixer': ATTENTION, 'positions': {'kind': 'learned'}},
    'gqa': {'mixer': {**ATTENTION, 'kv_heads': 2}},
    'mqa_parallel': {'mixer': {**ATTENTION, 'kv_heads': 1}, 'block': 'parallel'},
    'window': {'mixer': {**ATTENTION, 'window': 5}},
    'sinusoidal': {'mixer': ATTENTION, 'positions': {'kind': 'sinusoidal'}},
    'mixed_segments': {
        'layers': 0,
        'segments': (
            {'pattern': ({}, {'mixer': {**ATTENTION, 'window': 4}}), 'repeat': 2, 'share': 2},
            {'pattern': ({},)},
        ),
        'mixer': ATTENTION,
    },
    'simplified': {'mixer': {'kind': 'shaped', 'heads': 4}, 'block': 'simplified'},
}
LENGTH = 40


def full_logits(model, tokens):
    return model.logits(model(tokens, SeqInfo.of(*tokens.shape))[0])


def randomised(model, key=11):
    """Moves every parameter off its initial value, so that zero-initialised ones matter too."""
    graphdef, state = build.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    moved = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return build.merge(graphdef, jax.tree.unflatten(tree, moved))


def stepped(model, tokens, start, max_len):
    """Logits [B, T, V] by a prefill of `start` tokens and then single steps, in one program."""
    graphdef, state = build.split(model)

    @jax.jit
    def run(state, tokens):
        model = build.merge(graphdef, state)
        cache = model.init_state(tokens.shape[0], max_len, jnp.float32)
        hidden, cache = model.prefill(tokens[:, :start], cache)

        def step(cache, token):
            out, cache = model.step(token, cache)
            return cache, model.logits(out)

        _, rest = jax.lax.scan(step, cache, tokens[:, start:].T)
        return jnp.concatenate([model.logits(hidden), rest.swapaxes(0, 1)], 1)

    return run(state, tokens)


@pytest.mark.parametrize('kind', KINDS)
def test_prefill_then_steps_equal_one_full_forward(make_decoder, kind):
    model = randomised(make_decoder(seq_len=LENGTH, **KINDS[kind]))
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, 31)
    # 1e-4: the catalogue's bound on cached against uncached logits.
    np.testing.assert_allclose(
        stepped(model, tokens, 7, LENGTH), full_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize('kind', ['gqa', 'window'])
def test_cached_logits_over_256_steps(make_decoder, kind):
    model = randomised(make_decoder(seq_len=257, **KINDS[kind]))
    tokens = jax.random.randint(jax.random.key(2), (1, 257), 0, 31)
    np.testing.assert_allclose(
        stepped(model, tokens, 1, 257), full_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


def test_a_prefill_may_come_in_pieces(make_decoder):
    model = randomised(make_decoder(seq_len=LENGTH, **KINDS['mha']))
    tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, 31)
    state = model.init_state(2, LENGTH, jnp.float32)
    first, state = model.prefill(tokens[:, :15], state)
    second, state = model.prefill(tokens[:, 15:], state)
    whole = full_logits(model, tokens)
    pieces = model.logits(jnp.concatenate([first, second], 1))
    np.testing.assert_allclose(pieces, whole, atol=1e-4, rtol=1e-4)
    assert state['position'].tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize('kind', ['mha', 'window', 'simplified'])
def test_prompts_of_different_lengths_share_a_batch(make_decoder, kind):
    model = randomised(make_decoder(seq_len=LENGTH, **KINDS[kind]))
    tokens = jax.random.randint(jax.random.key(2), (3, 12), 0, 31)
    lengths = jnp.array([12, 3, 7])
    logits, state = prefill(model, tokens, lengths, 20, jnp.float32)
    after, _ = model.step(jnp.array([1, 2, 3]), state)
    for row, length in enumerate([12, 3, 7]):
        alone = jnp.append(tokens[row, :length], row + 1)[None]
        expected = full_logits(model, alone)[0]
        np.testing.assert_allclose(logits[row], expected[-2], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(model.logits(after)[row], expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kind', ['gqa', 'window'])
def test_greedy_decoding_equals_full_recomputation(make_decoder, kind):
    model = randomised(make_decoder(seq_len=LENGTH, **KINDS[kind]))
    graphdef, state = build.split(model)
    prompt = jax.random.randint(jax.random.key(3), (2, 6), 0, 31)
    generate = make_generate(graphdef, tokens=24)
    lengths = jnp.full(2, 6)
    out, counts = generate(state['params'], state['buffers'], prompt, lengths, jax.random.key(0))
    whole = jnp.pad(prompt, ((0, 0), (0, 24)))
    forward = jax.jit(lambda t: jnp.argmax(full_logits(build.merge(graphdef, state), t), -1))
    for i in range(24):  # causality: what stands behind position 5 + i is not read
        whole = whole.at[:, 6 + i].set(forward(whole)[:, 5 + i])
    np.testing.assert_array_equal(out, whole[:, 6:])
    assert counts.tolist() == [24, 24]


def test_generation_stops_at_the_stop_token(make_decoder):
    graphdef, state = build.split(randomised(make_decoder(seq_len=LENGTH)))
    prompt = jax.random.randint(jax.random.key(3), (2, 4), 0, 31)
    args = (state['params'], state['buffers'], prompt, jnp.full(2, 4), jax.random.key(0))
    free, _ = make_generate(graphdef, tokens=8)(*args)
    stop = int(free[0, 2])
    out, counts = make_generate(graphdef, tokens=8, stop=stop)(*args)
    first = free[0].tolist().index(stop) + 1
    assert counts[0] == first
    assert out[0].tolist() == free[0, :first].tolist() + [stop] * (8 - first)


def test_sampling_is_a_function_of_the_key(make_decoder):
    graphdef, state = build.split(randomised(make_decoder(seq_len=LENGTH)))
    prompt = jnp.zeros((2, 4), jnp.int32)
    generate = make_generate(graphdef, tokens=16, sampling=Sampling(temperature=1.0, top_k=20))
    args = (state['params'], state['buffers'], prompt, jnp.full(2, 4))
    a, b, c = (generate(*args, jax.random.key(k))[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c) and not np.array_equal(a[0], a[1])


def test_a_reset_starts_a_new_document(make_decoder):
    model = randomised(make_decoder(seq_len=LENGTH, positions={'kind': 'learned'}))
    tokens = jax.random.randint(jax.random.key(2), (2, 10), 0, 31)
    state = model.init_state(2, LENGTH, jnp.float32)
    _, state = model.prefill(tokens, state)
    reset = jnp.array([True, False])
    hidden, state = model.step(jnp.array([3, 3]), state, reset=reset)
    fresh = full_logits(model, jnp.array([[3]]))[0, -1]
    np.testing.assert_allclose(model.logits(hidden)[0], fresh, atol=1e-4, rtol=1e-4)
    assert state['position'].tolist() == [1, 11]
    assert not np.allclose(model.logits(hidden)[1], fresh, atol=1e-2)


@pytest.mark.parametrize('kind', KINDS)
def test_state_bytes_equal_the_real_state(make_decoder, kind):
    from effjax.core.cost import total

    model = make_decoder(seq_len=LENGTH, **KINDS[kind])
    state = jax.eval_shape(lambda: model.init_state(2, LENGTH))
    assert total(model.cost(2, LENGTH).values()).state_bytes == trees.nbytes(state)
