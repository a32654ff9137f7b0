"""Dynamic loss scaling."""

import chex
import jax
import jax.numpy as jnp

from effjax import precision
from effjax.precision import DynamicLossScale


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
