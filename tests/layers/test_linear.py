"""Projections, embeddings and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.axes import metadata
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers.dropout import dropout
from effjax.layers.embeddings import TokenEmbedding
from effjax.layers.linear import Projection, identity, initializer


def context(**kw):
    return Context(width=64, policy=Policy(compute='bfloat16'), depth=8, **kw)


def test_projection_names_its_axes_and_computes_in_the_compute_dtype():
    ctx = context()
    p = Projection(
        ctx,
        '...d,dhk->...hk',
        (64, 4, 16),
        ('embed', 'heads', 'head_dim'),
        bias=True,
        init=initializer(ctx, 64),
        rngs=nnx.Rngs(0),
    )
    p.bias[...] = jnp.arange(64.0).reshape(4, 16)
    x = jax.random.normal(jax.random.key(0), (2, 3, 64), jnp.bfloat16)
    y = p(x)
    assert y.shape == (2, 3, 4, 16) and y.dtype == jnp.bfloat16
    assert p.kernel[...].dtype == jnp.float32
    expected = jnp.einsum('btd,dhk->bthk', x.astype(jnp.float32), p.kernel[...]) + p.bias[...]
    # Sums of magnitude up to 64, rounded to 8 bits.
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.3)
    meta = metadata(nnx.state(p, nnx.Param))
    assert meta['kernel'].axes == ('embed', 'heads', 'head_dim')
    assert meta['bias'].axes == ('heads', 'head_dim') and meta['bias'].no_decay


def test_initialisers():
    key, shape = jax.random.key(0), (64, 1000)
    for init, residual, std in (
        ('gpt2', False, 0.02),
        ('gpt2', True, 0.02 / 4),  # 16 sub-blocks add to the stream
        ('lecun', True, 1 / 8),
    ):
        x = initializer(context(init=init), 64, residual=residual)(key, shape, jnp.float32)
        np.testing.assert_allclose(jnp.std(x), std, rtol=0.02)
    with pytest.raises(ConfigError, match="unknown init 'xavier'; known: 'gpt2', 'lecun'"):
        initializer(context(init='xavier'), 64)
    inward = identity(key, (8, 2, 4), jnp.float32)
    outward = identity(key, (2, 4, 8), jnp.float32)
    x = jax.random.normal(key, (3, 8))
    h = jnp.einsum('td,dhk->thk', x, inward)
    np.testing.assert_array_equal(h, x.reshape(3, 2, 4))
    np.testing.assert_array_equal(jnp.einsum('thk,hkd->td', h, outward), x)


def test_embedding_looks_up_and_is_its_own_head():
    embedding = TokenEmbedding(context(), 100, rngs=nnx.Rngs(0))
    tokens = jnp.asarray([[3, 3, 99]])
    x = embedding(tokens)
    assert x.dtype == jnp.bfloat16 and x.shape == (1, 3, 64)
    np.testing.assert_array_equal(x, embedding.table[...][tokens].astype(jnp.bfloat16))
    assert embedding.head_weight().shape == (64, 100)
    graphdef, params = nnx.split(embedding)

    def f(params):
        return jnp.sum(nnx.merge(graphdef, params)(tokens).astype(jnp.float32))

    grad = jax.grad(f)(params)['table'][...]
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad[jnp.asarray([3, 99, 0]), 0], [2, 1, 0])


def test_dropout_drops_only_while_training():
    x = jnp.ones((100, 100), jnp.bfloat16)
    key = jax.random.key(0)
    train = SeqInfo.of(1, 1, rng=key, train=True)
    y = dropout(x, 0.25, train)
    assert y.dtype == jnp.bfloat16
    assert set(np.unique(np.asarray(y, np.float32))) == {0.0, np.float32(jnp.bfloat16(1 / 0.75))}
    # 10,000 draws: 4 standard deviations.
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.018
    np.testing.assert_array_equal(y, dropout(x, 0.25, train))
    assert jnp.any(y != dropout(x, 0.25, train.fold(1)))
    assert dropout(x, 0.25, SeqInfo.of(1, 1, rng=key)) is x
    assert dropout(x, 0.0, train) is x
    with pytest.raises(ValueError, match=r'needs a PRNG key: set SeqInfo\.rng'):
        dropout(x, 0.25, SeqInfo.of(1, 1, train=True))
