"""Reversible blocks: the plain two streams' values and gradients, and nothing kept by depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import models
from effjax.core.cost import total
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.costs import walk
from effjax.layers.ffn import FFNS
from effjax.layers.ffn.identity import Identity
from effjax.models import reversible

NOISY = SeqInfo.of(2, 16, rng=jax.random.key(3, impl='rbg'), train=True)
PLAIN = SeqInfo.of(2, 16)
# Tiny programs run once: compiling them well takes longer than running them badly.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(scope='module')
def make(make_decoder):
    return lambda run='scan', **config: make_decoder(run, **{'block': 'reversible', **config})


def as_written(body, x, info):
    """The paper's two streams as a loop over layers, each segment apart; returns (y, aux sum)."""
    layer, loads = 0, 0.0
    for name in body.names:
        segment = body.segment(name)
        slots = {n: nnx.split(segment.slot(n)) for n in segment.names}
        a = b = x
        for repeat in range(segment.repeat):
            for graphdef, arrays in slots.values():
                own = jax.tree.map(lambda w: w[repeat // segment.share], arrays)  # noqa: B023
                block, noise = nnx.merge(graphdef, own), info.fold(layer)
                a = a + block.mixed(block.norm_mixer(b), noise)[0]
                y, aux = block.fed(block.norm_ffn(a), noise)
                b, loads = b + y, loads + aux.get('load', (0.0,))[0]
                layer += 1
        x = 0.5 * (a + b)
    return x, loads


def loss(graphdef, info, form='reversible'):
    """A scalar function of (parameters, input) that depends on all outputs, and on aux.

    'written' is the loop above, 'kept' the same program without its own gradient rule.
    """
    weights = jax.random.normal(jax.random.key(7), (2, 16, 16))

    def f(state, x):
        body = models.merge(graphdef, state).body
        if form == 'written':
            y, loads = as_written(body, x, info)
        else:
            y, _, aux = body(x, info, None, form == 'kept')
            found = [p['ffn']['load'] for s in aux.values() for p in s.values() if 'ffn' in p]
            loads = sum(jnp.sum(load) for load, _ in found)
        return jnp.sum(y.astype(jnp.float32) * weights) + loads

    return f


def gradients(model, info, form='reversible'):
    graphdef, state = models.split(model)
    x = jax.random.normal(jax.random.key(5), (2, 16, 16), model.compute_dtype)
    return jit(jax.value_and_grad(loss(graphdef, info, form), argnums=(0, 1)))(state, x)


def close(got, wanted, of_largest):
    def one(a, b):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.max(np.abs(a - b)) <= of_largest * np.max(np.abs(b))

    jax.tree.map(one, got, wanted)


class Loaded(Identity):
    """A feed-forward part with a statistic that has a gradient, and a count that has none."""

    def __call__(self, x, *, info):
        return jnp.tanh(x), {'load': (jnp.sum(jnp.square(x)), jnp.asarray(x.size))}


HYBRID = (
    {'pattern': ({}, {'mixer': {'kind': 'retnet', 'heads': 2}}), 'repeat': 2},
    {'pattern': ({'ffn': {'kind': 'loaded'}},), 'repeat': 2, 'share': 2},
)


@pytest.mark.ci
@pytest.mark.parametrize(
    ('run', 'config', 'info'),
    [
        ('scan', {'dropout': 0.4}, NOISY),  # keys recomputed alike
        ('unroll', {'dropout': 0.4, 'share': 2}, NOISY),
        ('scan', {'layers': 0, 'segments': HYBRID}, PLAIN),
    ],
    ids=['dropout', 'shared', 'hybrid'],
)
def test_values_and_gradients_are_those_of_the_streams_as_written(
    make, monkeypatch, run, config, info
):
    monkeypatch.setattr('effjax.layers.ffn.identity.Loaded', Loaded, raising=False)
    monkeypatch.setitem(FFNS, 'loaded', 'effjax.layers.ffn.identity:Loaded')
    model = make(run, **config)
    value, grads = gradients(model, info)
    wanted, wanted_grads = gradients(model, info, 'written')
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    # float32: each layer adds a rounding of its input to what plain autodiff rounds.
    close(grads, wanted_grads, 5e-5)


@pytest.mark.ci
def test_in_bfloat16_the_streams_keep_their_precision(make):
    """Inputs made again from sums in bfloat16 would drift over 12 layers; the streams are wider."""
    model = make(compute='bfloat16', layers=12)
    close(gradients(model, PLAIN), gradients(model, PLAIN, 'kept'), 1e-3)


def test_a_block_is_undone(make):
    graphdef, arrays = nnx.split(make(layers=1).body.segment_0.slot_0)
    arrays = jax.tree.map(lambda a: a[0], nnx.to_pure_dict(arrays))
    x = tuple(jax.random.normal(jax.random.key(i), (2, 16, 16)) for i in range(2))
    y, _, _ = jit(lambda x: nnx.merge(graphdef, arrays)(x, info=PLAIN))(x)
    found, _, _ = jit(lambda y: reversible.undo(graphdef, arrays, y, PLAIN, x, []))(y)
    for a, b in zip(found, x, strict=True):
        assert np.max(np.abs(a - b)) < 1e-5
    assert not np.allclose(y[0], x[0]) and not np.allclose(y[1], x[1])


@pytest.mark.ci
def test_what_is_kept_does_not_grow_with_depth(make):
    info = SeqInfo.of(16, 16)
    x = jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))  # noqa: E731

    def kept(layers, **config):
        graphdef, state = models.split(make(layers=layers, **config))
        run = lambda state, x: jnp.sum(models.merge(graphdef, state).body(x, info)[0])  # noqa: E731
        closure = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], state, x)
        program = jax.jit(jax.grad(run)).lower(state, x).compile()
        beside = size(closure) - size(state['params']['body'])
        return beside, program.memory_analysis().temp_size_in_bytes

    (few, few_bytes), (many, many_bytes) = kept(2), kept(8)
    assert few == many <= 2 * 4 * x.size + 4 * (16 * 16 + 8)  # both streams, and positions
    assert many_bytes < 1.05 * few_bytes
    others = kept(8, block='sequential')
    assert others[0] > 50 * many and others[1] > 4 * many_bytes


def test_costs(make):
    """Each layer runs forward twice; what is saved is two streams, at any depth."""
    graphdef, state = models.split(make())
    x = jnp.ones((2, 16, 16))
    found = walk(jax.value_and_grad(loss(graphdef, PLAIN)), state, x, strict=True).by_phase
    assert found['recompute'] == found['forward'] and found['backward'] == 2 * found['forward']
    kept = walk(jax.value_and_grad(loss(graphdef, PLAIN, 'kept')), state, x, strict=True)
    assert kept.by_phase == {'forward': found['forward'], 'backward': found['backward']}
    costs = [total(make(layers=n).body.cost(2, 16).values()) for n in (4, 8)]
    assert [c.activation_bytes for c in costs] == [2 * 2 * 16 * 16 * 4] * 2
    plain = total(make(layers=4, block='sequential').body.cost(2, 16).values())
    assert costs[0].model_flops == plain.model_flops and costs[0].params == plain.params
    assert costs[0].activation_bytes < plain.activation_bytes / 8
    assert make().body.describe()[0]['remat'] == 'reversible'


def test_stepping_equals_the_parallel_form(make, tokens, forward):
    model = make(layers=2)
    hidden, _ = forward(model, tokens, PLAIN)
    graphdef, arrays = models.split(model)

    def run(arrays, tokens):
        model = models.merge(graphdef, arrays)
        first, state = model.prefill(tokens[:, :9], model.init_state(2, 16))

        def one(state, token):
            h, state = model.step(token, state)
            return state, h

        return jnp.concatenate(
            [first, jax.lax.scan(one, state, tokens[:, 9:].T)[1].swapaxes(0, 1)], 1
        )

    np.testing.assert_allclose(jit(run)(arrays, tokens), hidden, atol=1e-5)


@pytest.mark.ci
def test_with_a_recurrent_memory_and_over_seeds(make, tokens):
    """The rule inside a scan over segments of a row, and under `vmap`."""
    model = make(layers=2, memory={'tokens': 2, 'segment': 6})
    graphdef, state = models.split(model)
    run = lambda state: jnp.sum(models.merge(graphdef, state)(tokens, PLAIN)[0] ** 2)  # noqa: E731
    both = jax.tree.map(lambda a: jnp.stack([a, 1.1 * a]), state)
    found = jit(jax.vmap(jax.grad(run)))(both)
    assert np.any(found['params']['memory']['first'])
    alone = jit(jax.grad(run))(state)
    close(jax.tree.map(lambda a: a[0], found), alone, 1e-4)


def test_what_it_refuses(make):
    with pytest.raises(
        ConfigError, match="config.model.block: a 'reversible' block adds .* an ffn"
    ):
        make(ffn=None)
    with pytest.raises(ConfigError, match='carry two streams, and sequential ones do not'):
        make(layers=0, segments=({'pattern': ({}, {'block': 'sequential'})},))
    with pytest.raises(ConfigError, match="remat: 'dots' saves inputs of blocks"):
        make(remat='dots')
