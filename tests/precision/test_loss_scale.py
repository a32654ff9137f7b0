"""Dynamic loss scaling."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import precision
from effjax.precision import DynamicLossScale, all_finite


def test_scaled_gradients_divided_by_the_scale_are_the_gradients():
    """In float32, to 1e-6 for any scale and exactly for powers of two."""
    rng = np.random.default_rng(0)
    params = {'a': rng.normal(size=(8, 16)), 'b': rng.normal(size=(16, 4))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    x = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)

    def loss(p):
        return jnp.mean(jnp.square(jnp.tanh(x @ p['a']) @ p['b']))

    expected = jax.grad(loss)(params)
    for initial in (2.0**15, 1000.0, 1.0):
        scaling = DynamicLossScale(initial=initial)
        state = scaling.init()
        grads = jax.grad(lambda p, s=state, d=scaling: d.scale(loss(p), s))(params)
        got = scaling.unscale(grads, state)
        # Measured 1e-6 relative or less; absolute for entries near zero.
        chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-7)
        if initial == 2.0**15:
            chex.assert_trees_all_equal(got, expected)


def test_overflow_lowers_and_clean_steps_raise():
    scaling = DynamicLossScale(interval=3)
    update = jax.jit(scaling.update)
    state = scaling.init()
    scales, skipped = [], []
    for finite in (True, True, False, True, True, True, True):
        state = update(state, jnp.array(finite))
        scales.append(float(state['scale']) / 2**15)
        skipped.append(int(state['skipped']))
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1]
    assert skipped == [0, 0, 1, 1, 1, 1, 1]
    assert state['good_steps'] == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(state, scaling.init())


def test_scale_stays_above_its_minimum():
    scaling = DynamicLossScale(initial=4.0, minimum=1.0)
    state = scaling.init()
    for _ in range(5):
        state = scaling.update(state, jnp.array(False))
    assert state['scale'] == 1
    assert state['skipped'] == 5


def test_defaults():
    """Start 2^15, halve, double after 2000 clean steps."""
    scaling = precision.build({'kind': 'fp16'}).loss_scale
    state = scaling.init() | {'good_steps': jnp.int32(1998)}
    assert state['scale'] == 2**15
    state = scaling.update(state, jnp.array(True))
    assert state['scale'] == 2**15
    state = scaling.update(state, jnp.array(True))
    assert (state['scale'], state['good_steps']) == (2**16, 0)
    assert scaling.update(state, jnp.array(False))['scale'] == 2**15


def test_fp16_underflows_without_scaling_and_not_with_it():
    """A gradient of 2^-26 is below float16's smallest number, 2^-24."""
    built = precision.build({'kind': 'fp16'})
    params = {'w': jnp.float32(1.0)}

    def loss(p):
        return (built.policy.cast(p['w']) * jnp.float16(1.0)).astype(jnp.float32) * 2.0**-26

    assert jax.grad(loss)(params)['w'] == 0
    state = built.loss_scale.init()
    grads = jax.grad(lambda p: built.loss_scale.scale(loss(p), state))(params)
    assert built.loss_scale.unscale(grads, state)['w'] == 2.0**-26


def test_overflow_is_seen():
    """A scaled loss that overflows float16 gives gradients that are not finite."""
    built = precision.build({'kind': 'fp16', 'initial': 2.0**20})
    state = built.loss_scale.init()
    loss = lambda p: built.loss_scale.scale(built.policy.cast(p).astype(jnp.float32), state)  # noqa: E731
    assert not all_finite(jax.grad(loss)(jnp.float32(1.0)))


@pytest.mark.parametrize(
    ('tree', 'finite'),
    [
        ({}, True),
        ({'a': jnp.ones(3), 'b': {'c': jnp.zeros(())}}, True),
        ({'a': jnp.ones(3), 'b': {'c': jnp.array([1.0, jnp.nan])}}, False),
        ({'a': jnp.array(-jnp.inf)}, False),
    ],
)
def test_all_finite(tree, finite):
    assert bool(all_finite(tree)) == finite
