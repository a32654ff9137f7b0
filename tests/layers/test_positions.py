"""Positions: the catalogue's check of positional encoding, and each kind's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers import positions
from effjax.layers.mixers.attention import Attention

WIDTH = 16


def context(kind, **kw):
    return Context(
        width=WIDTH, policy=Policy(), max_len=32, causal=False, positions={'kind': kind, **kw}
    )


@pytest.mark.parametrize('kind', ['none', 'rope', 'learned', 'sinusoidal'])
def test_order_is_invisible_without_positions_and_visible_with_them(kind):
    """Shuffling the tokens shuffles the outputs, unless positions stay where they were."""
    ctx = context(kind)
    add = positions.additive(ctx, rngs=nnx.Rngs(3))
    mixer = Attention(ctx, heads=2, rngs=nnx.Rngs(0))
    for p in (mixer.query.kernel, mixer.key.kernel):
        p[...] = 30 * p[...]  # attention far from uniform
    x = jax.random.normal(jax.random.key(0), (1, 9, WIDTH))
    order = np.random.default_rng(0).permutation(9)
    info = SeqInfo.of(1, 9)

    def f(x):
        x = x if add is None else x + add(info.positions)
        return mixer(x, info=info)[0]

    change = jnp.abs(f(x)[:, order] - f(x[:, order])).max()
    assert (change < 1e-6) if kind == 'none' else (change > 1e-4)


@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_rotary_scores_depend_on_the_distance_only(fraction):
    rope = positions.Rope(8, base=100.0, fraction=fraction)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    i, j = np.meshgrid(np.arange(12), np.arange(12), indexing='ij')

    def at(x, places):  # x at every place: [1, P, 1, 8]
        x = jnp.broadcast_to(x, (1, places.size, 1, 8))
        return rope(x, jnp.asarray(places.reshape(1, -1)))

    scores = np.asarray(jnp.sum(at(q, i) * at(k, j), -1)).reshape(12, 12)
    shifted = np.asarray(jnp.sum(at(q, i + 500) * at(k, j + 500), -1)).reshape(12, 12)
    # Angles of 500 radians have 5e-5 of rounding in float32, of which the slow pairs see little.
    np.testing.assert_allclose(shifted, scores, atol=2e-4)
    for offset in range(-11, 12):
        np.testing.assert_allclose(np.ptp(np.diag(scores, offset)), 0, atol=1e-5)
    assert np.std(scores[0]) > 0.01
    still = at(q, i)[..., rope.rotated :]
    np.testing.assert_array_equal(still, jnp.broadcast_to(q[..., rope.rotated :], still.shape))


def test_rotary_against_complex_numbers_and_in_16_bits():
    rope = positions.Rope(6, base=50.0)
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 6))
    at = np.stack([np.arange(7), np.arange(7) * 3])
    angle = at[:, :, None, None] * 50.0 ** -(np.arange(3) / 3)
    turned = (np.asarray(x[..., :3]) + 1j * np.asarray(x[..., 3:])) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rope(x, jnp.asarray(at)), expected, atol=1e-5)
    half = rope(x.astype(jnp.bfloat16), jnp.asarray(at) + 100_000)
    assert half.dtype == jnp.bfloat16
    wide = rope(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.asarray(at) + 100_000)
    # Angles are float32 whatever x is: only the result is rounded, to 8 bits.
    np.testing.assert_allclose(half.astype(np.float32), wide, atol=2e-2)


def test_sinusoidal_and_learned_tables():
    add = positions.additive(context('sinusoidal', base=100.0), rngs=nnx.Rngs(0))
    at = jnp.asarray([[0, 5, 2]])
    half = WIDTH // 2
    angle = np.asarray(at)[..., None] * 100.0 ** -(np.arange(half) / half)
    np.testing.assert_allclose(
        add(at), np.concatenate([np.sin(angle), np.cos(angle)], -1), atol=1e-5
    )
    learned = positions.additive(context('learned'), rngs=nnx.Rngs(0))
    assert learned.table.shape == (32, WIDTH)
    np.testing.assert_array_equal(learned(at), learned.table[...][at])
    assert positions.additive(context('rope'), rngs=nnx.Rngs(0)) is None
    assert positions.rotary(context('learned'), 8) is None
    none = positions.NoPositions(context('none'), rngs=nnx.Rngs(0))
    assert none(at).shape == (1, 3, WIDTH) and not none(at).any()


def test_bad_positions_say_what_is_wrong():
    cases = (
        ({'fraction': 0.2}, 'turn an even number of dimensions of a head, not 1 of 8'),
        ({'fraction': 1.5}, r'positions.fraction must be in \(0, 1\]'),
        ({'base': 1.0}, 'positions.base must be above 1'),
        ({'bsae': 3.0}, "Did you mean 'base'"),
    )
    for kw, message in cases:
        with pytest.raises(ConfigError, match=message):
            positions.rotary(context('rope', **kw), 8)
    with pytest.raises(ConfigError, match='unknown positions'):
        positions.additive(context('alibi'), rngs=nnx.Rngs(0))
