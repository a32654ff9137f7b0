"""Linformer and Nyströmformer against softmax attention, numpy and transformers; their memory."""

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
from effjax.core.trees import flatten, map_named
from effjax.costs import walk
from effjax.layers.mixers.attention import Attention
from effjax.layers.mixers.linformer import Linformer
from effjax.layers.mixers.nystromformer import Nystromformer

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'golden'
WIDTH, HEADS, LENGTH = 12, 2, 13


def context(length=LENGTH, **changes):
    facts = {'causal': False, 'max_len': length, 'positions': {'kind': 'none'}, 'init': 'lecun'}
    return Context(WIDTH, Policy(compute='float32'), **{**facts, **changes})


def make(kind, length=LENGTH, **config):
    return kind(context(length), heads=HEADS, **config, rngs=nnx.Rngs(0))


def inputs(length=LENGTH):
    return jax.random.normal(jax.random.key(1), (2, length, WIDTH)), SeqInfo.of(2, length)


def projections(mixer, x):
    return (
        np.asarray(part(x), np.float64).transpose(0, 2, 1, 3)
        for part in (mixer.query, mixer.key, mixer.value)
    )


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def output(mixer, o_BHTD):
    return np.einsum('bhtd,hdw->btw', o_BHTD, np.asarray(mixer.out.kernel[...], np.float64))


@pytest.mark.parametrize('share', ['none', 'heads', 'key_value'])
def test_linformer_in_numpy(share):
    """Also of a row shorter than the model's longest, which takes the first columns."""
    mixer, (x, info) = make(Linformer, LENGTH + 3, rank=4, share=share), inputs()
    e = np.asarray(mixer.shrink_key[...], np.float64)
    f = e if mixer.shrink_value is None else np.asarray(mixer.shrink_value[...], np.float64)
    assert (share == 'key_value') == (mixer.shrink_value is None)
    assert e.shape == ((HEADS, 4, LENGTH + 3) if share == 'none' else (4, LENGTH + 3))
    q, k, v = projections(mixer, x)
    scores = q @ (e[..., :LENGTH] @ k).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    expected = output(mixer, softmax(scores) @ (f[..., :LENGTH] @ v))
    np.testing.assert_allclose(mixer(x, info=info)[0], expected, atol=1e-5, rtol=1e-5)


def test_linformer_with_the_identity_is_attention():
    x, info = inputs()
    plain = make(Attention)
    mixer = make(Linformer, rank=LENGTH, share='key_value')
    mixer.shrink_key[...] = jnp.eye(LENGTH)
    np.testing.assert_allclose(mixer(x, info=info)[0], plain(x, info=info)[0], atol=1e-6)


@pytest.mark.parametrize('name', ['nystromformer', 'nystromformer_conv'])
def test_transformers_nystromformer_has_the_same_outputs(name):
    with np.load(GOLDEN / 'nystromformer.npz') as file:
        golden = {k.removeprefix(f'{name}/'): file[k] for k in file.files if f'{name}/' in k}
    taps = golden['params/conv'].shape[0] if 'params/conv' in golden else 0
    length = golden['x'].shape[1]
    mixer = make(Nystromformer, length, landmarks=4, iterations=6, conv=taps, bias=True)
    graphdef, state = nnx.split(mixer)
    state = nnx.to_pure_dict(state)
    ours = {k: v for k, v in flatten(state).items() if not k.startswith('out/')}
    assert {f'params/{k}' for k in ours} == set(golden) - {'x', 'y'}
    eye = np.eye(WIDTH).reshape(HEADS, WIDTH // HEADS, WIDTH)
    golden |= {'params/out/kernel': eye, 'params/out/bias': np.zeros(WIDTH)}
    params = map_named(lambda key, _: jnp.asarray(golden[f'params/{key}'], jnp.float32), state)
    y = nnx.merge(graphdef, params)(golden['x'], info=SeqInfo.of(*golden['x'].shape[:2]))[0]
    # Six steps of a pseudo-inverse in float32.
    np.testing.assert_allclose(y, golden['y'], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('length', [13, 16, 5])
def test_nystromformer_in_numpy(length):
    """With the exact pseudo-inverse, that many steps come to; pieces of unequal length too."""
    mixer, (x, info) = make(Nystromformer, length, landmarks=4, iterations=30), inputs(length)
    size = -(-length // 4)
    q, k, v = projections(mixer, x)
    q /= np.sqrt(q.shape[-1])
    cuts = range(0, length, size)
    q_mark, k_mark = (np.stack([a[:, :, i : i + size].mean(2) for i in cuts], 2) for a in (q, k))
    inverse = np.linalg.pinv(softmax(q_mark @ k_mark.swapaxes(-1, -2)))
    o = softmax(q @ k_mark.swapaxes(-1, -2)) @ inverse
    o = o @ (softmax(q_mark @ k.swapaxes(-1, -2)) @ v)
    # The float32 inverse of a matrix whose condition is about 1000.
    np.testing.assert_allclose(mixer(x, info=info)[0], output(mixer, o), atol=5e-3, rtol=5e-3)


def test_nystromformer_of_a_short_row_is_attention():
    x, info = inputs()
    plain, mixer = make(Attention), make(Nystromformer, landmarks=LENGTH)
    np.testing.assert_allclose(mixer(x, info=info)[0], plain(x, info=info)[0], atol=1e-6)


KINDS = [(Linformer, {'rank': 16}), (Nystromformer, {'landmarks': 16, 'conv': 3})]


@pytest.mark.parametrize(('kind', 'config'), KINDS)
def test_costs_equal_the_walk_and_memory_is_linear(kind, config):
    length = 384
    mixer = make(kind, length, **config)
    x, info = jax.ShapeDtypeStruct((2, length, WIDTH), jnp.float32), SeqInfo.of(2, length)
    graphdef, params = nnx.split(mixer)

    def loss(params, x):
        return nnx.merge(graphdef, params)(x, info=info)[0].sum()

    result = walk(loss, params, x, strict=True)
    assert result.total == mixer.cost(2, length).model_flops
    sizes = array_sizes(jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr)
    assert max(sizes) < length * length
    double = kind(context(2 * length), heads=HEADS, **config, rngs=nnx.Rngs(0))
    ratio = double.cost(2, 2 * length).activation_bytes / mixer.cost(2, length).activation_bytes
    assert ratio < 2.01
    flops = double.cost(2, 2 * length).model_flops / mixer.cost(2, length).model_flops
    assert flops < 2.001  # less where a pseudo-inverse of fixed size is a part of it


def array_sizes(jaxpr):
    """Number of elements of every array that a program makes, one head of one row at a time."""
    out = []
    for eqn in jaxpr.eqns:
        out += [v.aval.size // (2 * HEADS) for v in eqn.outvars if hasattr(v.aval, 'size')]
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')
        ):
            inner = getattr(value, 'jaxpr', value)
            out += array_sizes(inner) if hasattr(inner, 'eqns') else []
    return out


@pytest.mark.parametrize(
    ('kind', 'config', 'message'),
    [
        (Linformer, {'rank': 0}, 'linformer: rank must be at least 1, got 0'),
        (Nystromformer, {'landmarks': 0}, 'nystromformer: landmarks must be at least 1'),
        (Nystromformer, {'conv': 4}, 'nystromformer: conv must be odd, or 0 for none, got 4'),
    ],
)
def test_sizes_that_cannot_be(kind, config, message):
    with pytest.raises(ConfigError, match=message):
        make(kind, **config)


def test_a_row_that_is_too_long():
    x, info = inputs(LENGTH + 1)
    with pytest.raises(ConfigError, match='a row of 14 tokens is longer than the 13'):
        make(Linformer)(x, info=info)
