"""What parts say of growth is true, for every registered one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core import trees
from effjax.core.context import Context
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.core.registry import lookup
from effjax.layers.ffn import FFNS
from effjax.layers.mixers import MIXERS

HEADS = {'heads': 2}
ARGUMENTS = {
    'bigbird': {'heads': 2, 'block': 2, 'random': 1},
    'etc': {'heads': 2, 'radius': 2},
    'linformer': {'heads': 2, 'rank': 3},
    'longformer': {'heads': 2, 'reach': 2},
    'longnet': {'heads': 2, 'segments': (3,), 'dilations': (1,)},
    'mamba2': {'head_dim': 4, 'state': 3},
    'mate': {'heads': 2, 'columns': 2},
    'nystromformer': {'heads': 2, 'landmarks': 2},
    'polysketch': {'heads': 2, 'sketch': 2, 'block': 4},
    'reformer': {'heads': 2, 'chunk': 2, 'buckets': 2},
    'rg_lru': {'heads': 2},
    'transformer_xl': {'heads': 2, 'segment': 3, 'memory': 3},
}
WITHOUT_HEADS = (
    'base_conv', 'h3', 'hyena', 'mamba', 'mega', 'rwkv4', 's4', 's4d', 's5',
)  # fmt: skip
BOTH_WAYS = ('etc', 'linformer', 'nystromformer')


def mixer(name, bias=True):
    arguments = ARGUMENTS.get(name, {} if name in WITHOUT_HEADS else HEADS)
    ctx = Context(width=8, policy=Policy(), causal=name not in BOTH_WAYS, max_len=6, bias=bias)
    return lookup(MIXERS, name, 'mixer')(ctx, **arguments, rngs=nnx.Rngs(0))


def filled(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), abstract)


def test_who_may_be_widened():
    """A new entry is a claim: prove it in test_exact.py, then add it here."""
    specs = {n: lookup(MIXERS, n, 'mixer').growth_spec for n in MIXERS}
    assert {n for n, spec in specs.items() if spec.widens} == {'attention'}
    assert all(lookup(FFNS, n, 'part').growth_spec.widens for n in FFNS)


@pytest.mark.ci
@pytest.mark.parametrize('name', sorted(MIXERS))
def test_zeros_in_the_products_that_a_mixer_names_silence_it(name):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: mixer(name)))
    params = filled(nnx.to_pure_dict(params))
    outputs = lookup(MIXERS, name, 'mixer').growth_spec.outputs
    assert bool(outputs) == (name not in ('base_conv', 'mega', 'shaped_attention'))

    def silenced(path, x):
        return x * 0 if any(path.startswith(f'{out}/') for out in outputs) else x

    info, x = SeqInfo.of(2, 6), jax.random.normal(jax.random.key(0), (2, 6, 8))
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(x, info=info)[0])
    assert np.any(run(params))
    assert not outputs or not np.any(run(trees.map_named(silenced, params)))
