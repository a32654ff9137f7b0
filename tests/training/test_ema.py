"""The parameters' moving average."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.training import ema


def _run(decay, bias_free, steps=50):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(steps + 1, 3)).astype(np.float32)
    state = ema.init({'a': {'w': jnp.asarray(values[0])}})
    step = jax.jit(lambda s, p: ema.update(s, {'a': {'w': p}}, decay, bias_free=bias_free))
    for value in values[1:]:
        state = step(state, value)
    return np.asarray(state['params']['a']['w']), values.astype(np.float64), state


@pytest.mark.parametrize('decay', [0.0, 0.9, 0.9999])
def test_bias_free_average_ignores_the_start(decay):
    averaged, values, state = _run(decay, bias_free=True)
    weights = decay ** np.arange(len(values) - 2, -1, -1, dtype=np.float64)
    # 50 float32 updates of values near 1.
    np.testing.assert_allclose(averaged, weights @ values[1:] / weights.sum(), atol=2e-6)
    assert state['count'] == 50


def test_plain_average_starts_at_the_first_parameters():
    averaged, values, _ = _run(0.9, bias_free=False)
    expected = values[0]
    for value in values[1:]:
        expected = 0.9 * expected + 0.1 * value
    np.testing.assert_allclose(averaged, expected, atol=2e-6)


def test_state_is_float32_and_a_copy():
    params = {'w': jnp.ones((2,), jnp.bfloat16)}
    state = ema.update(ema.init(params), params, 0.99)
    assert state['params']['w'].dtype == jnp.float32
    assert ema.params(state, params)['w'].dtype == jnp.bfloat16
    full = {'w': jnp.ones((2,))}
    copy = ema.init(full)['params']['w']
    assert copy.unsafe_buffer_pointer() != full['w'].unsafe_buffer_pointer()  # both can be donated


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        ema.update(ema.init({'w': jnp.ones(2)}), {'w': jnp.ones(3)}, 0.9)


@pytest.mark.mesh
def test_sharded_average_stays_sharded():
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {'w': jax.NamedSharding(mesh, jax.P('fsdp'))}
    params = jax.device_put({'w': jnp.arange(16.0)}, spec)
    shardings = ema.shardings(spec)
    state = jax.jit(ema.init, out_shardings=shardings)(params)
    step = jax.jit(ema.update, static_argnames='decay', out_shardings=shardings)
    state = step(state, params, decay=0.5)
    assert state['params']['w'].sharding.spec == jax.P('fsdp')
    chex.assert_trees_all_close(state['params'], params)
