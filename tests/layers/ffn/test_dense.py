"""Dense feed-forward parts against their formulas, and their costs against the arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.axes import metadata
from effjax.core.context import Context
from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.core.policy import Policy
from effjax.core.registry import check_block
from effjax.core.trees import count
from effjax.costs import walk
from effjax.layers.ffn import FFNS
from effjax.layers.gates import gated_product

FORMULAS = {
    'relu': lambda g, u: jnp.maximum(u, 0),
    'relu2': lambda g, u: jnp.maximum(u, 0) ** 2,
    'gelu': lambda g, u: 0.5 * u * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (u + 0.044715 * u**3))),
    'swiglu': lambda g, u: g / (1 + jnp.exp(-g)) * u,
    'geglu': lambda g, u: FORMULAS['gelu'](None, g) * u,
}


def make(kind, width=8, bias=True, **kw):
    component = check_block(FFNS, {'kind': kind, **kw}, 'ffn', 'ffn')
    context = Context(width=width, policy=Policy(), bias=bias, init='lecun')
    return component(context, rngs=nnx.Rngs(0), **kw)


def test_every_kind_has_a_formula():
    assert set(FORMULAS) | {'identity'} == set(FFNS)


def test_identity_does_nothing_and_costs_nothing():
    ffn = check_block(FFNS, {'kind': 'identity'}, 'ffn', 'ffn')(
        Context(width=8, policy=Policy()), rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    y, aux = ffn(x, info=None)
    assert y is x and aux == {} and ffn.cost(2, 5) == Cost()


@pytest.mark.parametrize('kind', FORMULAS)
def test_against_its_formula(kind):
    ffn = make(kind, hidden=12)
    graphdef, params = nnx.split(ffn)
    params = nnx.to_pure_dict(params)
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases that are not 0
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    def ours(params, x):
        y, aux = nnx.merge(graphdef, params)(x, info=None)
        assert aux == {}
        return jnp.sum(jnp.sin(y)), y

    def formula(params, x):
        def product(name, x):
            return x @ params[name]['kernel'] + params[name]['bias']

        gate = product('gate', x) if ffn.gated else None
        y = product('down', FORMULAS[kind](gate, product('up', x)))
        return jnp.sum(jnp.sin(y)), y

    a, b = (jax.value_and_grad(f, (0, 1), has_aux=True)(params, x) for f in (ours, formula))
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)

    cost = ffn.cost(2, 5)
    assert cost.params == cost.params_used == count(params)
    walked = walk(lambda p, x: ours(p, x)[1], params, x)
    assert cost.matmul == walked.total
    axes = {k: v['kernel'].axes for k, v in metadata(nnx.state(ffn, nnx.Param)).items()}
    assert axes.pop('down') == ('mlp', 'embed')
    assert set(axes.values()) == {('embed', 'mlp')}


def test_default_widths_and_bad_ones():
    assert make('gelu', width=96).hidden == 384
    assert make('swiglu', width=96).hidden == 256
    assert make('swiglu', width=768).hidden == 2048
    assert make('swiglu', width=100).hidden == 320  # 266.7 rounded up to a multiple of 64
    with pytest.raises(ConfigError, match='hidden must be at least 1, got 0'):
        make('relu', hidden=0)


def test_the_gate_keeps_its_two_inputs_only():
    gate, up = (jnp.ones((4, 32), jnp.bfloat16) for _ in range(2))
    y, pull = jax.vjp(lambda g, u: gated_product(jax.nn.silu, g, u), gate, up)
    kept = [a.dtype for a in jax.tree.leaves(pull) if a.size >= gate.size]
    assert kept == [jnp.bfloat16] * 2 and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), 1 / (1 + np.exp(-1)), rtol=1e-2)


def test_a_gate_changes_no_other_initial_value():
    """Arms of a study that differ in the gate alone start equal elsewhere."""
    plain, gated = make('gelu', hidden=24), make('swiglu', hidden=24)
    for name in ('up', 'down'):
        a, b = (getattr(part, name).kernel[...] for part in (plain, gated))
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(gated.gate.kernel[...], gated.up.kernel[...])
