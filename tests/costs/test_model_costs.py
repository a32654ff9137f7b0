"""A decoder's own `Cost`s against the walk of its program, part by part."""

import jax
import jax.numpy as jnp
import pytest

from effjax import models
from effjax.core.config import defaults, finish
from effjax.core.info import SeqInfo
from effjax.costs import StepCost, walk
from effjax.kernels.attention.cost import executed_flops

BATCH, WIDTH, HEADS, LAYERS, VOCAB = 2, 64, 4, 3, 512


def build(length, *, remat='none', layers='scan', ffn='swiglu', **mixer):
    config = defaults()
    config.steps = 1
    config.batch_size, config.seq_len = BATCH, length
    config.model = dict(
        kind='decoder', vocab_size=VOCAB, width=WIDTH, layers=LAYERS, tied=True,
        mixer=dict(kind='attention', heads=HEADS, **mixer), ffn=dict(kind=ffn),
    )  # fmt: skip
    config.precision = dict(kind='fp32')
    config.execution.remat, config.execution.layers = remat, layers
    config.execution.attention = 'xla'
    return models.build(finish(config))


def walked(built, length, train=False):
    def loss(state, tokens):
        model = models.merge(built.graphdef, state)
        return model.logits(model(tokens, SeqInfo.of(BATCH, length))[0]).sum()

    tokens = jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
    fn = jax.value_and_grad(loss) if train else loss
    return walk(fn, built.abstract_state, tokens, strict=True)


def in_scope(result, word):
    return sum(flops for scope, flops in result.by_scope.items() if word in scope)


@pytest.mark.parametrize(
    ('length', 'options'),
    [
        (128, {}),
        (128, dict(layers='unroll', ffn='gelu')),
        (96, dict(kv_heads=2, ffn='relu2')),
        (256, dict(window=32)),  # blocks of a band, not T x T
    ],
    ids=['mha', 'unrolled', 'gqa', 'window'],
)
def test_parts_equal_the_walk(length, options):
    built = build(length, **options)
    costs, result = built.model.cost(BATCH, length), walked(built, length)
    assert in_scope(result, 'ffn') == costs['ffn'].model_flops
    assert in_scope(result, 'head') == costs['head'].model_flops
    assert costs['embedding'].model_flops == costs['norm'].model_flops == 0
    # The program scores more pairs than the mask allows: whole blocks.
    window = options.get('window')
    shape = (BATCH, length, HEADS, WIDTH // HEADS)
    allowed = executed_flops('splash', *shape, window=window)
    executed = executed_flops('xla', *shape, window=window)
    attention = costs['attention'].model_flops + LAYERS * (executed - allowed)
    assert in_scope(result, 'attention') == attention
    assert result.total == attention + costs['ffn'].model_flops + costs['head'].model_flops


def test_a_step_of_training_is_three_forward_passes_and_what_is_recomputed():
    plain, remat = build(128), build(128, remat='full')
    forward, train = walked(plain, 128), walked(plain, 128, train=True)
    assert train.total == 3 * forward.total
    again = walked(remat, 128, train=True)
    assert again.by_phase['forward'] == forward.total
    assert again.by_phase['backward'] == 2 * forward.total
    # All of a block but its last product, whose result the backward pass does not need.
    last = LAYERS * 2 * BATCH * 128 * WIDTH * _hidden(plain)
    body = forward.total - in_scope(forward, 'head')
    assert again.by_phase['recompute'] == body - last
    cost = StepCost.train(plain.model.cost(BATCH, 128))
    assert cost == StepCost.train(remat.model.cost(BATCH, 128))  # no model work
    assert cost.model_flops == 3 * sum(
        part.model_flops for part in plain.model.cost(BATCH, 128).values()
    )


def _hidden(built):
    """Hidden width of the feed-forward block, from its three products' cost."""
    return int(built.model.cost(1, 1)['ffn'].model_flops) // (LAYERS * 2 * 3 * WIDTH)
