"""Global tokens beside a row: groups, what passes through them, documents, costs, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import models
from effjax.core import trees
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.costs import walk
from effjax.kernels.labelled_attention import cost as kernel_cost
from effjax.models.decoder import Decoder
from effjax.models.encoder import Encoder
from effjax.models.setup import Execution, Setup
from effjax.tasks.masked_lm import MaskedLM

LENGTH, VOCAB = 22, 31
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
CONFIG = {
    'vocab_size': VOCAB,
    'width': 12,
    'layers': 2,
    'mixer': {'kind': 'etc', 'heads': 2, 'radius': 2, 'clip': 2},
    'ffn': {'kind': 'gelu', 'hidden': 20},
    'positions': {'kind': 'none'},
    'globals': {'tokens': 8, 'every': 4},
}
# Documents of 9, 1 and 8 tokens with padding between and behind; and one of 22.
SEGMENTS = np.array([[1] * 9 + [2] + [0] * 2 + [3] * 8 + [0] * 2, [1] * 22], np.int32)
POSITIONS = np.array([[*range(9), 0, 0, 1, *range(8), 0, 1], [*range(22)]], np.int32)


def build(fill, kind=Encoder, run='scan', remat='none', compute='float32', **changes):
    setup = Setup(Policy(compute=compute), Execution(run, remat), LENGTH)
    return fill(lambda: kind(setup, **{**CONFIG, **changes}, rngs=nnx.Rngs(0)))


@functools.partial(jit, static_argnums=0)
def _forward(graphdef, arrays, tokens, info):
    return models.merge(graphdef, arrays)(tokens, info)


def forward(model, tokens, info=None):
    info = SeqInfo.of(*tokens.shape) if info is None else info
    return _forward(*models.split(model), jnp.asarray(tokens), info)


def some_tokens(batch=2):
    return np.random.default_rng(0).integers(0, VOCAB, (batch, LENGTH)).astype(np.int32)


def packed(**kw):
    return SeqInfo(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS), **kw)


def test_each_stretch_of_a_document_is_a_group(fill):
    beside = build(fill).globals
    groups = np.asarray(beside.groups(packed()))
    first = [0, 0, 0, 0, 1, 1, 1, 1, 2, 3, -1, -1, 4, 4, 4, 4, 5, 5, 5, 5, -1, -1]
    np.testing.assert_array_equal(groups[0], first)
    np.testing.assert_array_equal(groups[1], np.arange(22) // 4)
    x, info = beside.join(jnp.zeros(12), jnp.ones((2, LENGTH, 12)), packed())
    assert x.shape == (2, 8 + LENGTH, 12) and not np.any(x[:, :8]) and np.all(x[:, 8:] == 1)
    np.testing.assert_array_equal(info.segment_ids[0, :8], [1, 1, 1, 2, 3, 3, 0, 0])
    np.testing.assert_array_equal(info.segment_ids[1, :8], [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(info.groups[:, :8], np.arange(8)[None].repeat(2, 0))
    np.testing.assert_array_equal(info.segment_ids[:, 8:], SEGMENTS)
    # A row that begins inside a document, as a window of a stream does, begins a group.
    late = SeqInfo.of(1, LENGTH)
    late = SeqInfo(late.positions + 2)
    np.testing.assert_array_equal(beside.groups(late)[0, :7], [0, 0, 1, 1, 1, 1, 2])


def test_groups_of_the_batch_come_before_every(fill):
    groups = np.full((2, LENGTH), -1, np.int32)
    groups[:, 3:9], groups[:, 14:] = 0, 1
    info = packed(groups=jnp.asarray(groups))
    beside = build(fill, globals={'tokens': 1}).globals
    np.testing.assert_array_equal(beside.groups(info), np.where(groups == 0, 0, -1))
    (alone, count) = beside.metrics(info)['globals/uncovered']
    assert count == np.sum(SEGMENTS != 0) and alone == count - np.sum(groups == 0)
    with pytest.raises(ConfigError, match=r'globals.every is None, and the batch has no groups'):
        beside.groups(packed())
    batch = {'tokens': some_tokens(), 'positions': POSITIONS, 'groups': groups}
    assert MaskedLM({}).info(batch, None, False).groups is groups


def test_what_is_far_is_known_through_global_tokens_alone(fill):
    """Two layers with a radius of 2 reach 4 tokens; a global token has read the others."""
    tokens = some_tokens(1)
    other = tokens.copy()
    other[0, 1] = (tokens[0, 1] + 1) % VOCAB

    def moved(**changes):
        model = build(fill, **changes)
        return np.abs(forward(model, other)[0] - forward(model, tokens)[0])[0].max(-1)

    with_globals = moved()
    assert np.all(with_globals > 1e-5)
    without = moved(globals=None)
    assert np.all(without[:6] > 1e-5) and not np.any(without[6:])
    # Where a global token reads its group alone, all long tokens still read the global token.
    hard = {'mixer': {**CONFIG['mixer'], 'g2l': 'group'}}
    assert np.all(moved(**hard) > 1e-6)


@pytest.mark.ci
@pytest.mark.parametrize('remat', ['none', pytest.param('dots', marks=pytest.mark.slow)])
def test_packed_equals_separate_documents(fill, remat):
    """Hidden states and gradients: global tokens pass nothing on between documents."""
    model = build(fill, remat=remat)
    graphdef, arrays = models.split(model)
    tokens = some_tokens()
    places = [np.flatnonzero(SEGMENTS[0] == n) for n in (1, 2, 3)] + [np.arange(22)]
    rows = [0, 0, 0, 1]
    alone, segments = np.zeros((4, LENGTH), np.int32), np.zeros((4, LENGTH), np.int32)
    for n, (row, at) in enumerate(zip(rows, places, strict=True)):
        alone[n, : len(at)], segments[n, : len(at)] = tokens[row, at], 1
    positions = np.arange(LENGTH, dtype=np.int32)[None].repeat(4, 0)

    @jit
    def both(arrays, tokens, info):
        def loss(arrays):
            hidden, aux = models.merge(graphdef, arrays)(tokens, info)
            weight = jnp.where(info.segment_ids[..., None] != 0, jnp.sin(jnp.arange(12.0)), 0)
            return jnp.sum(jnp.sin(hidden) * weight), (hidden, aux)

        return jax.grad(loss, has_aux=True)(arrays)

    grad, (hidden, aux) = both(arrays, tokens, packed())
    expected, (separate, _) = both(arrays, alone, SeqInfo(positions, jnp.asarray(segments)))
    for n, (row, at) in enumerate(zip(rows, places, strict=True)):
        np.testing.assert_allclose(hidden[row, at], separate[n, : len(at)], atol=1e-5, rtol=1e-4)
    named = zip(trees.flatten(grad).items(), jax.tree.leaves(expected), strict=True)
    for (name, a), b in named:
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-3, err_msg=name)
        assert np.any(a) or 'head_bias' in name or 'transform' in name or 'mask_token' in name, name
    assert aux['globals/uncovered'][0] == 0 and aux['globals/uncovered'][1] == 40
    noisy = np.where(SEGMENTS == 0, (tokens + 3) % VOCAB, tokens)
    again = forward(model, noisy, packed())[0]
    np.testing.assert_array_equal(
        np.asarray(again)[SEGMENTS != 0],
        np.asarray(forward(model, tokens, packed())[0])[SEGMENTS != 0],
    )


@pytest.mark.ci
def test_scanned_unrolled_and_rematerialised_agree(fill):
    tokens = some_tokens()
    hidden = forward(build(fill), tokens, packed())[0]
    for run, remat in (('unroll', 'none'), ('scan', 'full'), ('unroll', 'dots')):
        other = forward(build(fill, run=run, remat=remat), tokens, packed())[0]
        np.testing.assert_allclose(other, hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.ci
def test_the_loss_of_masked_tokens_reads_global_tokens(fill):
    """A training loss in bfloat16, with hidden tokens; its gradient reaches the trained vector."""
    model = build(fill, compute='bfloat16', mixer={**CONFIG['mixer'], 'shared': True})
    graphdef, arrays = models.split(model)
    task, tokens = MaskedLM({}), some_tokens()
    weights = np.pad(
        (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] != 0), ((0, 0), (0, 1))
    )
    batch = jax.tree.map(
        jnp.asarray,
        {
            'tokens': tokens,
            'positions': POSITIONS,
            'segment_ids': SEGMENTS,
            'weights': weights.astype(np.float32),
        },
    )

    @jit
    def run(arrays, key):
        def loss(arrays):
            info = task.info(batch, key, True)
            total, weight, aux = task.loss(models.merge(graphdef, arrays), batch, info)
            return total / weight, aux

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    (value, aux), grads = run(arrays, jax.random.key(0))
    assert np.isfinite(value) and 'globals/uncovered' in aux
    grads = trees.flatten(grads)
    assert np.any(grads['params/globals/first']) and all(
        np.all(np.isfinite(g)) for g in grads.values()
    )


@pytest.mark.parametrize('shared', [False, True])
def test_costs_equal_the_walk_and_the_parameters(fill, shared):
    mixer = {**CONFIG['mixer'], 'shared': shared}
    model = build(fill, mixer=mixer, embed_width=5, positions={'kind': 'learned'})
    graphdef, arrays = models.split(model)
    costs = model.cost(2, LENGTH)
    assert model.param_count() == trees.count(arrays)

    def run(arrays, tokens, info):
        model = models.merge(graphdef, arrays)
        return model.logits(model(tokens, info)[0])

    walked = walk(run, arrays, some_tokens(), packed())
    long = (2, LENGTH, 2, 6)
    facts = dict(radius=2, clip=2, others=8, labels=2)
    more = kernel_cost.executed_flops('xla', *long, **facts) - kernel_cost.model_flops(
        *long, **facts
    )
    assert walked.total == sum(c.model_flops for c in costs.values()) + 2 * more
    in_ffn = sum(flops for scope, flops in walked.by_scope.items() if 'ffn' in scope)
    assert in_ffn == costs['ffn'].model_flops == 2 * 2 * 2 * (LENGTH + 8) * 2 * 12 * 20
    without = build(fill, globals=None).cost(2, LENGTH)
    assert costs['norm'].activation_bytes > without['norm'].activation_bytes


def test_refuses_what_cannot_be(fill):
    attention = {'kind': 'attention', 'heads': 2}
    for message, changes in (
        ('globals.tokens must be at least 1, got 0', {'globals': {'tokens': 0}}),
        ('globals.every must be at least 1, got 0', {'globals': {'tokens': 2, 'every': 0}}),
        (
            '5 tokens for 4 each do not reach.*22.*at least 6',
            {'globals': {'tokens': 5, 'every': 4}},
        ),
        ("takes no 'token'.*Did you mean 'tokens'", {'globals': {'token': 5}}),
        ("mixer 'attention' does not know global tokens", {'mixer': attention}),
    ):
        with pytest.raises(ConfigError, match=rf'config.model.globals.*{message}|{message}'):
            build(fill, **changes)
    with pytest.raises(ConfigError, match=r"globals: global tokens see all.*model.kind='encoder'"):
        build(fill, kind=Decoder, mixer=attention)


@pytest.mark.mesh
def test_sharded_equals_unsharded(fill):
    """Rows over 'data', heads over 'tensor'."""
    from effjax.core.axes import metadata

    model = build(fill)
    graphdef, arrays = models.split(model)
    mesh = jax.make_mesh(
        (2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:4],
    )  # fmt: skip
    spec = jax.sharding.PartitionSpec

    def put(x, *names):
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec(*names)))

    def shard(p, m):
        return put(p, *('tensor' if a in ('heads', 'kv_heads') else None for a in m.axes))

    def loss(arrays, tokens, info):
        return jnp.sum(jnp.sin(models.merge(graphdef, arrays)(tokens, info)[0]))

    run = jit(jax.value_and_grad(loss))
    expected = run(arrays, jnp.asarray(some_tokens()), packed())
    rows = jax.tree.map(lambda a: put(a, 'data'), (jnp.asarray(some_tokens()), packed()))
    meta = metadata(nnx.state(model, nnx.Param))
    arrays = {**arrays, 'params': jax.tree.map(shard, arrays['params'], meta)}
    sharded = run(arrays, *rows)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3)
