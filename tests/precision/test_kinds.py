"""Kinds of precision: dtypes in the jaxpr, and what master weights are for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import precision
from effjax.core.axes import Meta
from effjax.core.errors import ConfigError
from effjax.training import optimizers

DTYPES = {
    'fp32': ('float32', 'float32'),
    'bf16': ('float32', 'bfloat16'),
    'bf16_params': ('bfloat16', 'bfloat16'),
    'fp16': ('float32', 'float16'),
}


def _loss(policy, params, x):
    """A layer and a mean square, as the parts of a model compute them."""
    y = jnp.tanh(policy.cast(x) @ policy.cast(params['a'])) @ policy.cast(params['b'])
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def _params(policy):
    rng = np.random.default_rng(0)
    shapes = {'a': (8, 16), 'b': (16, 4)}
    return {k: jnp.asarray(rng.normal(size=s), policy.param_dtype) for k, s in shapes.items()}


@pytest.mark.parametrize('kind', sorted(precision.PRECISIONS))
def test_dtypes_in_the_jaxpr(kind):
    """Every product, forward and backward, runs in the compute dtype; gradients are masters'."""
    policy = precision.build({'kind': kind}).policy
    param, compute = DTYPES[kind]
    assert (policy.param, policy.compute) == (param, compute)
    params, x = _params(policy), jnp.ones((5, 8))
    grad = jax.make_jaxpr(jax.value_and_grad(lambda p: _loss(policy, p, x)))(params)
    products = [e for e in grad.jaxpr.eqns if e.primitive.name == 'dot_general']
    assert len(products) == 5  # two forward, three backward (no gradient of x)
    assert {str(v.aval.dtype) for e in products for v in e.invars} == {compute}
    assert str(grad.out_avals[0].dtype) == 'float32'
    assert {str(v.dtype) for v in grad.out_avals[1:]} == {param}


def test_only_fp16_scales():
    scaled = {k for k in precision.PRECISIONS if precision.build({'kind': k}).loss_scale}
    assert scaled == {'fp16'}


def test_bf16_parameters_stagnate_where_master_weights_move():
    """Steps of 1e-3 on weights of 1 are below half a unit in the last place of bfloat16, 2^-9."""
    moved = {}
    for kind in ('bf16', 'bf16_params'):
        policy = precision.build({'kind': kind}).policy
        params = {'w': jnp.ones((64,), policy.param_dtype)}
        optimizer = optimizers.build(
            {'kind': 'adamw', 'weight_decay': 0.0}, meta={'w': Meta(('embed',))}
        )
        state = optimizer.init(params)
        assert state.mu['w'].dtype == policy.param_dtype
        for _ in range(20):
            grads = {'w': jnp.ones_like(params['w'])}
            updates, state = optimizer.update(grads, state, params, jnp.float32(1e-3))
            params = optax.apply_updates(params, updates)
        moved[kind] = float(jnp.max(jnp.abs(params['w'].astype(jnp.float32) - 1)))
    assert moved['bf16_params'] == 0  # not one of 20 steps arrived
    assert moved['bf16'] == pytest.approx(20e-3, rel=1e-3)


@pytest.mark.parametrize(
    ('block', 'message'),
    [
        ({'kind': 'fp15'}, "unknown precision 'fp15' at config.precision"),
        ({'kind': 'bf16', 'initial': 1.0}, "takes no 'initial'; it takes: nothing"),
        ({'kind': 'fp16', 'growth': 0.5}, 'growth must be above 1'),
        ({'kind': 'fp16', 'initial': 0.5}, 'needs 0 < minimum <= initial'),
        ({'kind': 'fp16', 'interval': 1.5}, 'config.precision.interval: expected int'),
    ],
)
def test_bad_blocks(block, message):
    with pytest.raises(ConfigError, match=message):
        precision.build(block)
