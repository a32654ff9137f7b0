"""The body: one layout of parameters, and every way of running it computes the same."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.cost import total
from effjax.core.info import SeqInfo
from effjax import models

INFO = SeqInfo.of(2, 16)
# Sums in another order of fusion: a few float32 roundings on values of order 1.
CLOSE = {'rtol': 1e-5, 'atol': 1e-6}


def loss(graphdef, tokens, info=INFO):
    """Returns a scalar function of the state that depends on every output."""
    weights = jax.random.normal(jax.random.key(7), (*tokens.shape, 16))

    def f(state):
        hidden, _ = models.merge(graphdef, state)(tokens, info)
        return jnp.sum(hidden * weights)

    return f


def value_and_grad(model, tokens, info=INFO):
    graphdef, state = models.split(model)
    return jax.jit(jax.value_and_grad(loss(graphdef, tokens, info)))(state)


@pytest.fixture(scope='module')
def scanned(make_decoder, tokens):
    return value_and_grad(make_decoder('scan', 'none'), tokens)


@pytest.mark.parametrize(
    ('run', 'remat'),
    [('scan', 'dots'), ('scan', 'full'), ('unroll', 'none'), ('unroll', 'full')],
)
def test_every_execution_gives_the_same_values_and_gradients(
    make_decoder, tokens, scanned, run, remat
):
    value, grads = value_and_grad(make_decoder(run, remat), tokens)
    np.testing.assert_allclose(value, scanned[0], **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), grads, scanned[1])


def test_parameters_do_not_depend_on_execution(make_decoder):
    a = models.split(make_decoder('scan', 'none'))[1]
    b = models.split(make_decoder('unroll', 'full'))[1]
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_parameters_are_stacked_over_layers_by_segment_and_slot(make_decoder):
    pattern = ({}, {'ffn': {'kind': 'gelu', 'hidden': 8}})
    model = make_decoder(
        layers=0, segments=({'pattern': pattern, 'repeat': 3}, {'pattern': ({},)})
    )
    graphdef, state = models.split(model)
    body = state['params']['body']
    assert sorted(body) == ['segment_0', 'segment_1']
    assert sorted(body['segment_0']) == ['slot_0', 'slot_1']
    lengths = {x.shape[0] for x in jax.tree.leaves(body['segment_0'])}
    assert lengths == {3} and {x.shape[0] for x in jax.tree.leaves(body['segment_1'])} == {1}
    kernel = body['segment_0']['slot_0']['mixer']
    first = jax.tree.leaves(kernel)[0]
    assert not np.array_equal(first[0], first[1])  # each copy has a key of its own
    assert model.body.describe()[0]['repeat'] == 3


def test_auto_unrolls_up_to_the_stated_depth(make_decoder):
    assert make_decoder('auto').body.describe()[0]['layers'] == 'unroll'
    assert make_decoder('auto', layers=33).body.describe()[0]['layers'] == 'scan'


def test_shared_layers_get_the_sum_of_the_layers_gradients(make_decoder, tokens):
    shared = make_decoder(share=4)
    graphdef, state = models.split(shared)
    value, grads = jax.jit(jax.value_and_grad(loss(graphdef, tokens)))(state)
    own_graphdef, own = models.split(make_decoder())
    copies = jax.tree.map(
        lambda a, like: jnp.broadcast_to(a, like.shape), state['params']['body'],
        own['params']['body'],
    )  # fmt: skip
    own = {**own, 'params': {**state['params'], 'body': copies}}
    own_value, own_grads = jax.jit(jax.value_and_grad(loss(own_graphdef, tokens)))(own)
    np.testing.assert_allclose(value, own_value, **CLOSE)
    summed = jax.tree.map(lambda a: a.sum(0, keepdims=True), own_grads['params']['body'])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),  # sums of 4 layers
        grads['params']['body'], summed,
    )  # fmt: skip


@pytest.mark.parametrize('run', ['scan', 'unroll'])
def test_groups_of_layers_share(make_decoder, tokens, run):
    pairs = make_decoder(run, share=2)
    assert {x.shape[0] for x in jax.tree.leaves(models.split(pairs)[1]['params']['body'])} == {2}
    graphdef, state = models.split(pairs)
    own_graphdef, own = models.split(make_decoder())
    copies = jax.tree.map(lambda a: jnp.repeat(a, 2, 0), state['params']['body'])
    own = {**own, 'params': {**state['params'], 'body': copies}}
    a = loss(graphdef, tokens)(state)
    np.testing.assert_allclose(a, loss(own_graphdef, tokens)(own), **CLOSE)


def test_sharing_keeps_the_flops_and_cuts_the_parameters(make_decoder):
    """ALBERT, arXiv 1909.11942: one layer's parameters instead of twelve."""
    own, shared = make_decoder(layers=12), make_decoder(layers=12, share=12)
    a, b = total(own.body.cost(2, 16).values()), total(shared.body.cost(2, 16).values())
    assert a.model_flops == b.model_flops
    assert a.params == 12 * b.params
    real = sum(x.size for x in jax.tree.leaves(models.split(shared)[1]['params']['body']))
    assert b.params == real


def test_dropout_differs_by_layer_and_not_by_execution(make_decoder, tokens):
    info = dataclasses.replace(INFO, rng=jax.random.key(3), train=True)
    outs = [
        make_decoder(run, dropout=0.5, share=4)(tokens, info)[0] for run in ('scan', 'unroll')
    ]
    np.testing.assert_allclose(outs[0], outs[1], **CLOSE)
    still = make_decoder('scan', dropout=0.5, share=4)(tokens, INFO)[0]
    assert not np.allclose(outs[0], still)


def test_rematerialisation_saves_memory(make_decoder, tokens):
    wide = jnp.tile(tokens, (1, 8))
    info = SeqInfo.of(*wide.shape)

    def temporary(remat):
        graphdef, state = models.split(make_decoder('scan', remat, seq_len=128, layers=8))
        step = jax.jit(jax.grad(loss(graphdef, wide, info)))
        return step.lower(state).compile().memory_analysis().temp_size_in_bytes

    assert temporary('full') < 0.5 * temporary('none')


@pytest.mark.skipif(
    importlib.util.find_spec('effjax.costs.walk') is None, reason='needs the jaxpr walk'
)
def test_full_rematerialisation_costs_at_most_a_third_more(make_decoder, tokens):
    from effjax.costs import walk

    def flops(remat):
        graphdef, state = models.split(make_decoder('scan', remat))
        return walk(jax.value_and_grad(loss(graphdef, tokens)), state).flops

    ratio = flops('full') / flops('none')
    assert 1.1 < ratio <= 1.34
    assert 1.0 <= flops('dots') / flops('none') <= 1.1


def test_scanned_programs_do_not_grow_with_depth(make_decoder, tokens):
    def size(layers):
        graphdef, state = models.split(make_decoder('scan', layers=layers))
        return len(jax.jit(jax.grad(loss(graphdef, tokens))).lower(state).as_text())

    # Only the digits of the trip count and of the stacked shapes differ.
    assert abs(size(48) / size(12) - 1) < 0.01
