"""The simplified block (He and Hofmann, arXiv 2311.01906)."""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.info import SeqInfo
from effjax import models

SHAPED = {'kind': 'shaped_attention', 'heads': 2}


def test_at_first_its_mixer_is_the_identity(make_decoder):
    model = make_decoder(layers=1, block='simplified', mixer=SHAPED, init='gpt2')
    graphdef, state = models.split(model.body.segment_0.slot_0)
    block = models.merge(graphdef, jax.tree.map(lambda a: a[0], state))
    x, info = jax.random.normal(jax.random.key(1), (2, 16, 16)), SeqInfo.of(2, 16)
    # Two averages in different orders of summation.
    np.testing.assert_allclose(block.mixer(x, info=info)[0], x, atol=1e-5)
    h = block.norm_both(x)
    expected = h + block.ffn_gain[...] * block.ffn(h, info=info)[0]
    np.testing.assert_allclose(block(x, info=info)[0], expected, atol=1e-5)


def test_signal_keeps_its_norm_over_48_layers(make_decoder, tokens):
    model = make_decoder(
        layers=48, block='simplified', mixer=SHAPED, width=32,
        ffn={'kind': 'relu', 'hidden': 128}, init='lecun',
    )  # fmt: skip
    graphdef, state = models.split(model.body.segment_0.slot_0)
    info = SeqInfo.of(2, 16)

    def layer(x, weights):
        y, _, _ = models.merge(graphdef, weights)(x, info=info)
        return y, jnp.sqrt(jnp.mean(jnp.square(y)))

    x = jax.random.normal(jax.random.key(2), (2, 16, 32))
    y, norms = jax.lax.scan(layer, x, state)
    assert np.all((norms > 0.7) & (norms < 1.4)), norms
    # The identity path alone, with a norm a layer, must not wash tokens out into one another.
    unit = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
    assert jnp.max(jnp.abs(unit[0, 0] @ unit[0, 1:].T)) < 0.95


def test_saves_parameters_against_a_prenorm_block(make_decoder):
    """Query, key and the FFN are left of 12 D^2: a sixth less."""
    ffn = {'kind': 'gelu', 'hidden': 64}
    plain = make_decoder(ffn=ffn).body.cost(1, 1)
    short = make_decoder(
        ffn=ffn, block='simplified', mixer=SHAPED
    ).body.cost(1, 1)
    saved = 1 - sum(c.params for c in short.values()) / sum(c.params for c in plain.values())
    assert 0.15 < saved < 0.18
