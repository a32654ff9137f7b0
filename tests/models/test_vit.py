"""The Vision Transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import models
from effjax.core import trees
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.models.setup import Setup
from effjax.models.vit import ViT

TINY = {
    'image_size': 8,
    'channels': 3,
    'classes': 5,
    'patch': 4,
    'width': 16,
    'layers': 2,
    'mixer': {'kind': 'attention', 'heads': 2},
    'ffn': {'kind': 'gelu', 'hidden': 32},
}
INFO = SeqInfo.of(3, 1)


def real(**config):
    return ViT(Setup(), **{**TINY, **config}, rngs=nnx.Rngs(params=jax.random.key(0)))


@pytest.fixture(scope='module')
def make(fill):
    """`make(**config)`: a tiny model whose parameters are noise."""
    return lambda **config: fill(lambda: real(**config))


def images():
    return jax.random.normal(jax.random.key(1), (3, 8, 8, 3))


@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_shapes_and_parameters(make, pool):
    model = make(pool=pool)
    graphdef, state = models.split(model)
    logits, aux = jax.jit(lambda s: models.merge(graphdef, s)(images(), INFO))(state)
    assert logits.shape == (3, 5) and aux == {}
    assert model.param_count() == trees.count(state['params'])


def test_first_predictions_are_uniform():
    head = jax.jit(lambda: models.split(real())[1]['params']['head_kernel'])()
    np.testing.assert_array_equal(head, jnp.zeros((16, 5)))


def test_patches_are_cut_in_rows(make):
    model = make(pool='mean')
    image = jnp.zeros((1, 8, 8, 3)).at[0, 4:, :4, 1].set(1.0)  # lower left of four patches
    x = model.embed(image) - model.embed(jnp.zeros((1, 8, 8, 3)))
    changed = np.any(np.asarray(x[0]) != 0, axis=-1)
    assert changed.tolist() == [False, False, True, False]
    kernel = model.patch_kernel[...].reshape(4, 4, 3, 16)
    np.testing.assert_allclose(x[0, 2], kernel[:, :, 1].sum((0, 1)), rtol=1e-5)


def test_every_patch_reaches_the_output(make):
    graphdef, state = models.split(make(layers=1))

    def f(pixels):
        return jnp.sum(models.merge(graphdef, state)(pixels, INFO)[0] ** 2)

    grad = np.asarray(jax.jit(jax.grad(f))(images()))
    assert np.all(np.any(grad != 0, axis=-1))


def test_bytes_are_scaled(make):
    model = make()
    pixels = jax.random.randint(jax.random.key(2), (3, 8, 8, 3), 0, 256).astype(jnp.uint8)
    np.testing.assert_allclose(
        model.embed(pixels), model.embed(pixels.astype(jnp.float32) / 127.5 - 1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'patch': 3}, r'config\.model\.patch 3 does not divide the image size 8'),
        ({'classes': 0}, r'config\.model\.classes must be at least 1'),
        ({'mixer': {'kind': 'attention', 'heads': 3}}, r'config\.model\.mixer'),
    ],
)
def test_impossible_configs_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        real(**config)
