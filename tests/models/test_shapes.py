"""Published models: exact parameters, FLOPs, cache bytes and shares, all without arrays."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.core import trees
from effjax.core.config import load
from effjax.core.cost import total
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.costs import walk

SHAPES = str(pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'shapes.py')
GIB = 2**30


@pytest.fixture(scope='module')
def built():
    """`built(variant)`: the abstract model, made once."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = models.build(load(f'{SHAPES}:{variant}'))
        return made[variant]

    return get


PARAMS = {
    'gpt1': 116_534_784,
    'gpt2': 124_439_808,
    'gpt2_medium': 354_823_168,
    'gpt2_xl': 1_557_611_200,
    'llama_7b': 6_738_415_616,
    'vit_b': 86_567_656,
}


@pytest.mark.parametrize('variant', PARAMS)
def test_exact_parameters(built, variant):
    params = built(variant).abstract_state['params']
    assert trees.count(params) == PARAMS[variant]
    assert built(variant).model.param_count() == PARAMS[variant]


def test_gpt1_is_within_a_percent_of_117m(built):
    assert abs(built('gpt1').model.param_count() / 117e6 - 1) < 0.01


def test_gpt3(built):
    model = built('gpt3').model
    n = model.param_count()
    assert n == trees.count(built('gpt3').abstract_state['params'])
    assert abs(n / 174.6e9 - 1) < 3e-4
    assert abs(6 * n * 300e9 / 3.15e23 - 1) < 5e-3
    assert [s['period'] for s in model.body.describe()] == [['sequential(attention, gelu)'] * 2]
    # Banded layers cost less than dense ones: every second one here.
    dense = 96 * 2 * 2 * (2048 * 2049 / 2) * 12288
    scores = model.cost(1, 2048)['attention'].matmul - 96 * 8 * 2048 * 12288**2
    assert 0.5 < scores / dense < 0.6


VIT_GMACS = {'vit_ti': 1.253, 'vit_s': 4.598, 'vit_b': 17.56, 'vit_l': 61.55, 'vit_h': 167.3}
PATCH_SHARE = {'vit_ti': 2.31, 'vit_s': 1.26, 'vit_b': 0.66, 'vit_l': 0.25, 'vit_h': 0.12}


@pytest.mark.parametrize('variant', VIT_GMACS)
def test_vit_macs_and_patch_share(built, variant):
    cost = built(variant).model.cost(1)
    macs = total(cost.values()).model_flops / 2e9
    np.testing.assert_allclose(macs, VIT_GMACS[variant], rtol=1e-3)
    share = 100 * cost['embedding'].matmul / 2e9 / macs
    np.testing.assert_allclose(share, PATCH_SHARE[variant], atol=0.005)


def test_embedding_shares_of_storage(built):
    for variant, share in (('gpt2', 31.6), ('gpt2_xl', 5.3), ('gpt3', 0.4)):
        cost = built(variant).model.cost(1, 1)
        found = 100 * cost['embedding'].params / total(cost.values()).params
        np.testing.assert_allclose(found, share, atol=0.1)


def kv_bytes(model, batch, length, dtype):
    state = jax.eval_shape(lambda: model.init_state(batch, length, dtype))
    return sum(
        x.size * x.dtype.itemsize
        for name, x in trees.flatten(state).items()
        if name.rsplit('/', 1)[-1] in ('key', 'value')
    )


def test_cache_bytes(built):
    """B x S x D x L x 2 x bytes: what the real cache holds, its few integers a row apart."""
    gpt2, llama, gpt3 = (built(v).model for v in ('gpt2', 'llama_7b', 'gpt3'))
    assert kv_bytes(gpt2, 8, 1024, jnp.float32) == 576 * 2**20
    assert kv_bytes(llama, 1, 2048, jnp.float16) == GIB
    assert kv_bytes(llama, 1, 2048, jnp.float32) == 2 * GIB
    # 18 GiB for dense layers; the banded half of GPT-3 keeps 128 of 2048 tokens.
    assert kv_bytes(gpt3, 1, 2048, jnp.float32) == 9 * GIB * (1 + 128 / 2048)


def test_feed_forward_is_the_largest_part_until_t_is_four_d():
    """cost-attention, cost-ffn: scores and values cost 2 T^2 D MACs, the FFN 8 T D^2."""
    from flax import nnx

    from effjax.models.setup import Setup
    from effjax.models.vit import ViT

    def costs(width, grid):
        def make():
            return ViT(
                Setup(), image_size=grid, channels=1, classes=1, patch=1, width=width, layers=1,
                mixer={'kind': 'attention', 'heads': 1}, ffn={'kind': 'gelu', 'hidden': 4 * width},
                pool='mean', rngs=nnx.Rngs(0),
            )  # fmt: skip

        cost = nnx.eval_shape(make).cost(1)
        tokens = grid**2
        return cost['attention'].matmul - 8 * tokens * width**2, cost['ffn'].matmul

    width = 64  # T = 4 D = 256 = 16 x 16
    scores, ffn = zip(*(costs(width, grid) for grid in (8, 15, 16, 17)), strict=True)
    assert [s < f for s, f in zip(scores, ffn, strict=True)] == [True, True, False, False]
    assert scores[2] == ffn[2]
    assert costs(width, 16)[0] == 16 * costs(width, 8)[0]  # 4 x the tokens
    assert costs(2 * width, 8)[1] == 4 * costs(width, 8)[1]


def test_full_attention_counts_equal_the_walk(built):
    """A ViT has no mask, so that model FLOPs are exactly the products of the program."""
    vit = built('vit_ti')
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

    def forward(state, images):
        return models.merge(vit.graphdef, state)(images, SeqInfo.of(1, 1))[0]

    found = walk(forward, vit.abstract_state, images, strict=True).total
    assert found == total(vit.model.cost(1).values()).model_flops


def test_unknown_variant():
    with pytest.raises(ConfigError, match=r"no variant 'gpt4'.*Did you mean 'gpt"):
        load(f'{SHAPES}:gpt4')
