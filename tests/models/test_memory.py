"""Recurrent memory: its scan over segments, what passes through memory, gradients, decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import models
from effjax.core import trees
from effjax.core.cost import total
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.models.decode import make_generate
from effjax.models.memory import RecurrentMemory

M, SEGMENT, LENGTH = 2, 5, 17
MEMORY = {'tokens': M, 'segment': SEGMENT}
KINDS = {
    'rope': {'layers': 2, 'mixer': {'kind': 'attention', 'heads': 2}},
    'learned': {
        'layers': 2,
        'mixer': {'kind': 'retnet', 'heads': 2},
        'positions': {'kind': 'learned'},
        'embed_width': 8,
    },
}
# Tiny programs run once: compiling them well takes longer than running them badly.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(scope='module')
def make(make_decoder):
    """`make(kind, **memory)`: a decoder of random parameters with a memory."""
    return lambda kind='rope', **memory: make_decoder(
        seq_len=LENGTH, **KINDS[kind], memory={**MEMORY, **memory}
    )


def some_tokens(batch=2):
    return jax.random.randint(jax.random.key(2), (batch, LENGTH), 0, 31)


def hidden_of(model, tokens):
    graphdef, arrays = models.split(model)
    run = lambda arrays, t: models.merge(graphdef, arrays)(t, SeqInfo.of(*t.shape))[0]  # noqa: E731
    return np.asarray(jit(run)(arrays, tokens))


def plain_loop(model, tokens):
    """The paper's recurrence, written as a loop over segments."""
    memory = jnp.broadcast_to(model.memory.first[...], (len(tokens), M, model.width))
    out = []
    for begin in range(0, tokens.shape[1], SEGMENT):
        x = model.embedding(tokens[:, begin : begin + SEGMENT])
        x = x if model.embed_in is None else model.embed_in(x)
        x = jnp.concatenate([memory, x, memory], axis=1)
        info = SeqInfo.of(*x.shape[:2])
        x = x if model.positions is None else x + model.positions(info.positions)
        h = model.norm(model.body(x, info)[0])
        memory, h = h[:, -M:], h[:, M:-M]
        out.append(h if model.embed_out is None else model.embed_out(h))
    return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize('kind', KINDS)
def test_the_scan_equals_a_plain_loop(make, kind):
    model, tokens = make(kind), some_tokens()
    graphdef, arrays = models.split(model)
    expected = jit(lambda arrays, t: plain_loop(models.merge(graphdef, arrays), t))(arrays, tokens)
    np.testing.assert_allclose(hidden_of(model, tokens), expected, atol=1e-5, rtol=1e-5)


def test_the_past_is_known_through_memory_alone(make, monkeypatch):
    """A token of the first segment moves the fourth, and nothing where memory is emptied."""
    model, tokens = make(), some_tokens(1)
    changed = tokens.at[0, 1].set((tokens[0, 1] + 1) % 31)
    moved = np.abs(hidden_of(model, changed) - hidden_of(model, tokens))[0].max(-1)
    assert moved[0] == 0 and np.all(moved[1:] > 1e-6)
    monkeypatch.setattr(RecurrentMemory, 'cut', lambda self, memory, index: 0 * memory)
    moved = np.abs(hidden_of(model, changed) - hidden_of(model, tokens))[0].max(-1)
    assert np.all(moved[1:SEGMENT] > 0) and np.all(moved[SEGMENT:] == 0)


@pytest.mark.ci
@pytest.mark.usefixtures('full_compile')
def test_it_learns_to_remember(make_decoder, monkeypatch):
    """A fact of the first of three segments is told in the last, by chance without a memory."""
    length, facts = 12, 8
    memory, model = {'tokens': 2, 'segment': 4}, {**KINDS['rope'], 'width': 32}
    graphdef, arrays = models.split(
        make_decoder(seq_len=length, init='lecun', memory=memory, **model)
    )
    optimizer = optax.adam(3e-3)

    def batch(key, rows):
        keys = jax.random.split(key)
        x = jax.random.randint(keys[0], (rows, length), facts, 30)
        fact = jax.random.randint(keys[1], (rows,), 0, facts)
        return x.at[:, 1].set(fact).at[:, -1].set(30), fact

    def answers(arrays, x):
        model = models.merge(graphdef, arrays)
        return model.logits(model(x, SeqInfo.of(*x.shape))[0][:, -1])

    @jax.jit
    def train(arrays):
        def loss(arrays, key):
            x, fact = batch(key, 64)
            wrong = optax.softmax_cross_entropy_with_integer_labels(answers(arrays, x), fact)
            return jnp.mean(wrong)

        def step(carry, key):
            arrays, moments = carry
            slopes = jax.grad(loss)(arrays, key)
            updates, moments = optimizer.update(slopes, moments)
            return (optax.apply_updates(arrays, updates), moments), None

        keys = jax.random.split(jax.random.key(1), 200)
        return jax.lax.scan(step, (arrays, optimizer.init(arrays)), keys)[0][0]

    arrays = train(arrays)
    x, fact = batch(jax.random.key(9), 512)
    right = lambda: float(jnp.mean(jnp.argmax(answers(arrays, x), -1) == fact))  # noqa: E731
    assert right() > 0.95
    monkeypatch.setattr(RecurrentMemory, 'cut', lambda self, memory, index: 0 * memory)
    assert right() < 0.25  # 1/8 is chance


@pytest.mark.ci
@pytest.mark.parametrize(('truncate', 'reached'), [(None, 0), (3, 3), (2, 2), (1, 3)])
def test_gradients_stop_where_they_are_cut(make, truncate, reached):
    """The loss of the fourth segment has a gradient in the inputs of segments `reached` to 3."""
    graphdef, arrays = models.split(make(truncate=truncate))
    tokens = (jnp.arange(LENGTH) // SEGMENT)[None]  # each segment has a token of its own

    def loss(table):
        params = {**arrays['params'], 'embedding': {'table': table}}
        model = models.merge(graphdef, {**arrays, 'params': params})
        return jnp.sum(jnp.sin(model(tokens, SeqInfo.of(1, LENGTH))[0][:, 3 * SEGMENT :]))

    slope = jit(jax.grad(loss))(arrays['params']['embedding']['table'])
    there = np.abs(np.asarray(slope))[:4].max(-1) > 0
    np.testing.assert_array_equal(there, np.arange(4) >= reached)


@pytest.mark.ci
def test_the_gradient_equals_that_of_the_loop(make):
    graphdef, arrays = models.split(make())
    tokens = some_tokens(1)

    def loss(run):
        return lambda arrays: jnp.sum(jnp.sin(run(models.merge(graphdef, arrays))))

    def scan(model):
        return model(tokens, SeqInfo.of(1, LENGTH))[0]

    ours = jit(jax.grad(loss(scan)))(arrays)
    theirs = jit(jax.grad(loss(lambda model: plain_loop(model, tokens))))(arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3), ours, theirs)


@pytest.mark.parametrize('kind', KINDS)
def test_decoding_equals_the_whole(make, kind):
    """Prompts of 11 and 5 tokens, padded, then single steps to the end of the longer row."""
    model, tokens = make(kind), some_tokens()
    graphdef, arrays = models.split(model)
    lengths = np.array([11, 5])

    @jit
    def run(arrays, tokens):
        model = models.merge(graphdef, arrays)
        state = model.init_state(2, LENGTH, jnp.float32)
        ids = (jnp.arange(11) < lengths[:, None]).astype(jnp.int32)
        first, state = model.prefill(tokens[:, :11], state, SeqInfo.of(2, 11, segment_ids=ids))
        rest = jnp.take_along_axis(tokens, lengths[:, None] + np.arange(6), axis=1)

        def step(state, token):
            return model.step(token, state)[::-1]

        state, steps = jax.lax.scan(step, state, rest.T)
        return first, steps.swapaxes(0, 1), state['position']

    whole = hidden_of(model, tokens)
    first, steps, position = run(arrays, tokens)
    for row, length in enumerate(lengths):
        close = {'atol': 2e-5, 'rtol': 1e-4}
        np.testing.assert_allclose(first[row, :length], whole[row, :length], **close)
        np.testing.assert_allclose(steps[row], whole[row, length : length + 6], **close)
    assert position.tolist() == [17, 11]


@pytest.mark.ci
def test_a_step_may_begin_a_document(make):
    model, tokens = make(), some_tokens()
    graphdef, arrays = models.split(model)

    @jit
    def run(arrays, tokens):
        model = models.merge(graphdef, arrays)
        state = model.prefill(tokens[:, :7], model.init_state(2, LENGTH, jnp.float32))[1]
        h, state = model.step(tokens[:, 0], state, reset=jnp.array([True, False]))
        return h, model.step(tokens[:, 1], state)[0]

    first, second = run(arrays, tokens)
    whole = hidden_of(model, tokens)
    np.testing.assert_allclose(first[0], whole[0, 0], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(second[0], whole[0, 1], atol=2e-5, rtol=1e-4)
    kept = hidden_of(model, jnp.concatenate([tokens[:, :7], tokens[:, :2]], axis=1))
    np.testing.assert_allclose(second[1], kept[1, 8], atol=2e-5, rtol=1e-4)


def test_it_generates_what_it_would_predict(make):
    model = make()
    graphdef, arrays = models.split(model)
    prompt = some_tokens()[:, :4]
    generate = make_generate(graphdef, tokens=9)
    out, _ = generate(
        arrays['params'], arrays['buffers'], prompt, jnp.full(2, 4), jax.random.key(0)
    )
    text = jnp.concatenate([prompt, out], axis=1)
    logits = model.logits(jnp.asarray(hidden_of(model, text)))
    np.testing.assert_array_equal(jnp.argmax(logits, -1)[:, 3:-1], out)


@pytest.mark.parametrize('kind', KINDS)
def test_costs_count_memory_and_the_state_is_bounded(make, make_decoder, kind):
    model, plain = make(kind), make_decoder(seq_len=LENGTH, **KINDS[kind])
    costs = model.cost(3, LENGTH)
    assert total(costs.values()).params == trees.count(models.split(model)[1]['params'])
    body = lambda length: total(plain.body.cost(3, length).values()).model_flops  # noqa: E731
    ours = sum(c.model_flops for name, c in costs.items() if name not in ('embedding', 'head'))
    assert ours == 3 * body(SEGMENT + 2 * M) + body(M + 2)  # 17 = 3 x 5 + 2
    assert costs['head'] == plain.cost(3, LENGTH)['head']
    state = jax.eval_shape(lambda: model.init_state(3, LENGTH))
    assert total(costs.values()).state_bytes == trees.nbytes(state)
    assert total(model.cost(3, 12).values()).state_bytes == trees.nbytes(state)


def test_what_it_refuses(make, make_decoder):
    def message(pattern, **memory):
        with pytest.raises(ConfigError, match=pattern):
            make(**memory)

    message(r'config.model.memory.segment 17 makes one segment of a row of 17', segment=17)
    message(r'config.model.memory.tokens must be at least 1, got 0', tokens=0)
    message(r'config.model.memory.truncate must be at least 1, got 0', truncate=0)
    message(r"memory takes no 'token'.*Did you mean 'tokens'", token=3)
    with pytest.raises(ConfigError, match="config.model.memory: a memory needs 'segment'"):
        make_decoder(seq_len=LENGTH, memory={'tokens': 2})
    ids = jnp.ones((2, LENGTH), jnp.int32)
    with pytest.raises(ConfigError, match="config.model.memory .*packing to 'stream'"):
        make()(some_tokens(), SeqInfo.of(2, LENGTH, segment_ids=ids))
    with pytest.raises(ConfigError, match='18 tokens is longer than the 17'):
        make()(jnp.zeros((2, 18), jnp.int32), SeqInfo.of(2, 18))
