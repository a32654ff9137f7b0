"""tokamax behind `attention` and `grouped_product`: what is passed on, and what is refused.

Its kernels need a GPU or a TPU; here it runs its own plain form, so that meanings are compared.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.kernels import attention, grouped_product, last_choice, target
from effjax.kernels.attention import tokamax as attention_tokamax
from effjax.kernels.grouped_product import tokamax as product_tokamax

needed = pytest.mark.skipif(
    importlib.util.find_spec('tokamax') is None, reason="needs the 'tokamax' extra"
)
SEEN = np.tril(np.ones((12, 12), bool), -2)  # the first two queries see nothing
CALLS = {
    'causal': {},
    'full': {'mask': 'full', 'soft_cap': 3.0},
    'window': {'window': 5, 'scale': 0.3},
    'array': {'mask': SEEN},
}


@needed
@pytest.mark.parametrize('name', CALLS)
def test_attention_equals_the_reference(name, monkeypatch):
    monkeypatch.setattr(attention_tokamax, 'IMPLEMENTATION', 'xla')
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 12, heads, 16)), jnp.bfloat16) for heads in (4, 2, 2)
    )

    def both(implementation):
        run = functools.partial(attention, implementation=implementation, **CALLS[name])
        f = lambda *a: jnp.sum(jnp.sin(run(*a).astype(jnp.float32)))  # noqa: E731
        return jax.value_and_grad(f, (0, 1, 2))(q, k, v)

    with target('gpu'):
        got = both('tokamax')
        assert last_choice('attention')['implementation'] == 'tokamax'
    # bfloat16 rounds what goes in and comes out of each product by 2^-9 of it.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(both('reference')), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=3e-2, rtol=3e-2)


@needed
def test_the_grouped_product_equals_the_reference(monkeypatch):
    monkeypatch.setattr(product_tokamax, 'IMPLEMENTATION', 'xla')
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((40, 16), (3, 16, 8)))
    x, sizes = x.at[33:].set(jnp.nan), np.array([20, 0, 13])

    def both(implementation):
        run = functools.partial(grouped_product, implementation=implementation)
        f = lambda x, w: jnp.sum(jnp.sin(run(x, w, sizes).astype(jnp.float32)))  # noqa: E731
        return run(x, w, sizes), jax.grad(f, (0, 1))(x, w)

    with target('gpu'):
        got = both('tokamax')
        assert last_choice('grouped_product')['implementation'] == 'tokamax'
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(both('reference')), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=2e-2, rtol=2e-2)


def test_what_it_refuses_is_said(monkeypatch):
    def refusal(there=True, platform='gpu', dtype=jnp.bfloat16, **kw):
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object() if there else None)
        q = jax.ShapeDtypeStruct((1, 12, 2, 64), dtype)
        with target(platform):
            jax.eval_shape(lambda q: attention(q, q, q, implementation='reference', **kw), q)
        return last_choice('attention')['refused'].get('tokamax')

    assert refusal() is None
    assert refusal(there=False) == 'it needs the package tokamax, which effjax[tokamax] installs'
    assert refusal(platform='cpu') == 'it needs a GPU or a TPU, not cpu'
    assert refusal(dtype=jnp.float32) == 'it takes bfloat16 or float16 on a GPU, not float32'
    ids = np.ones((1, 12), np.int32)
    assert refusal(segment_ids=ids) == 'it takes documents as a mask of all pairs only'
    assert refusal(window=4) is None
    assert refusal(window=4, platform='tpu') == 'it has no window on a TPU'
    x, w = jnp.zeros((8, 4)), jnp.zeros((2, 4, 4))
    with pytest.raises(ValueError, match="as 'tokamax': it needs a GPU or a TPU, not cpu"):
        grouped_product(x, w, np.array([1, 2]), implementation='tokamax')
