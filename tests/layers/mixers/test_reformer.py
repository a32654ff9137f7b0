"""Reformer's attention: transformers' with its buckets, the hash by step, and what it refuses."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.costs import walk
from effjax.kernels import lsh_attention
from effjax.kernels.lsh_attention import cost
from effjax.layers.mixers.reformer import Reformer
from effjax.training.runtime import Runtime

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'golden' / 'reformer.npz'
WIDTH, HEADS, CHUNK = 12, 2, 4


def make(causal=False, length=32, **config):
    ctx = Context(
        WIDTH, Policy(compute='float32'), causal=causal, max_len=length,
        positions={'kind': 'none'}, init='lecun',
    )  # fmt: skip
    return Reformer(ctx, heads=HEADS, **config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('name', ['causal', 'both'])
def test_transformers_reformer_has_the_same_outputs(name):
    with np.load(GOLDEN) as file:
        golden = {k.removeprefix(f'{name}/'): file[k] for k in file.files if f'{name}/' in k}
    mixer = make(chunk=CHUNK)
    mixer.query.kernel[...] = jnp.asarray(golden['params/query/kernel'])
    mixer.value.kernel[...] = jnp.asarray(golden['params/value/kernel'])
    x, buckets = jnp.asarray(golden['x']), jnp.asarray(golden['buckets'], jnp.int32)
    v = mixer.value(x)
    o = lsh_attention(mixer.query(x), v, buckets, chunk=CHUNK, causal=name == 'causal')
    o, v = np.asarray(o), np.asarray(v)
    # The first chunk of each round looks round at the last one there.
    place = np.argsort(np.argsort(golden['buckets'], axis=-1, kind='stable'), axis=-1)
    inside = np.all(place >= CHUNK, axis=1).swapaxes(1, 2)
    # A token that sees itself alone in both rounds has a score of -1e5 there, whose float32 sum of
    # two loses 0.2 %.
    alone = np.all(np.abs(o - v) < 1e-6, axis=-1)
    assert 0.5 < (inside & ~alone).mean() < 1 and np.any(alone) == (name == 'causal')
    expected = golden['y'].reshape(o.shape)
    for which, tolerance in ((inside & ~alone, 1e-5), (inside & alone, 3e-3)):
        np.testing.assert_allclose(o[which], expected[which], atol=1e-5, rtol=tolerance)


def test_the_hash_is_the_steps_in_training_and_fixed_otherwise():
    mixer = make(chunk=CHUNK, seed=3)
    info = SeqInfo.of(2, 32)
    keys = [jax.random.key(i) for i in (0, 0, 1)]
    first, again, other = (mixer.rotations(SeqInfo.of(2, 32, rng=key, train=True)) for key in keys)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    fixed = mixer.rotations(info)
    np.testing.assert_array_equal(fixed, make(chunk=CHUNK, seed=3).rotations(info))
    np.testing.assert_array_equal(fixed, mixer.rotations(SeqInfo.of(2, 32, rng=keys[0])))
    assert not np.allclose(fixed, make(chunk=CHUNK).rotations(info))
    # Twice as many buckets as chunks, as in the paper.
    assert fixed.shape == (HEADS, WIDTH // HEADS, 2, 8)


def test_the_papers_chunks_would_show_a_causal_model_its_future():
    """Why a causal model cuts bucket by bucket: a later token's bucket decides who is near whom."""
    q, v = jax.random.normal(jax.random.key(0), (2, 1, 12, 1, 4))
    buckets = jnp.asarray([1] * 8 + [0] * 4)[None, None, None]
    later = buckets.at[..., -1].set(1)

    def first(buckets, by_bucket):
        o = lsh_attention(q, v, buckets, chunk=3, by_bucket=by_bucket, causal=True)
        return np.asarray(o)[:, :-4]

    assert np.abs(first(buckets, False) - first(later, False)).max() > 1e-3
    np.testing.assert_allclose(first(buckets, True), first(later, True), atol=1e-6)
    with pytest.raises(ConfigError, match="'sorted' depend on later tokens.*use cut='bucket'"):
        make(causal=True, cut='sorted')


@pytest.mark.parametrize('causal', [False, True])
def test_costs_equal_the_walk(causal):
    """But for masked pairs, which blocks execute and the model's cost leaves out."""
    length, chunk, rounds = 96, 8, 2
    mixer = make(causal, length, chunk=chunk, rounds=rounds)
    x, info = jax.ShapeDtypeStruct((2, length, WIDTH), jnp.float32), SeqInfo.of(2, length)
    graphdef, params = nnx.split(mixer)
    result = walk(lambda p, x: nnx.merge(graphdef, p)(x, info=info)[0], params, x, strict=True)
    shape = (2, length, HEADS, WIDTH // HEADS)
    executed = cost.executed_flops(
        'xla', *shape, rounds=rounds, chunk=chunk, by_bucket=causal, documents=False, causal=causal
    )
    allowed = rounds * cost.pairs(length, chunk, causal=causal)
    allowed = cost.attention_flops(2, HEADS, WIDTH // HEADS, allowed)
    assert result.total == mixer.cost(2, length).model_flops - allowed + executed


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ({'chunk': 0}, 'reformer: chunk must be at least 1, got 0'),
        ({'rounds': 0}, 'reformer: rounds must be at least 1, got 0'),
        ({'buckets': 3}, 'reformer: buckets must be even and at least 2, got 3'),
    ],
)
def test_sizes_that_cannot_be(config, message):
    with pytest.raises(ConfigError, match=message):
        make(**config)


def test_a_run_that_is_to_end_in_a_sample_is_refused_before_it_begins(tiny):
    config = tiny('finish.sample_tokens=4', "model.mixer={'kind': 'reformer', 'heads': 2}")
    with pytest.raises(ConfigError, match='sample_tokens: reformer .* has no decoding state'):
        Runtime(config)
