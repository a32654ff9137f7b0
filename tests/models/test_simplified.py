"""The simplified block (He and Hofmann, arXiv 2311.01906)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.core.info import SeqInfo

SHAPED = {'kind': 'shaped_attention', 'heads': 2}


@pytest.fixture(scope='module')
def signal(make_decoder):
    """A deep stack as initialised, run on noise: what each layer's mixer and output did."""

    @jax.jit
    def run():
        model = make_decoder(
            layers=48, block='simplified', mixer=SHAPED, width=32,
            ffn={'kind': 'relu', 'hidden': 128}, init='lecun',
        )  # fmt: skip
        graphdef, state = models.split(model.body.segment_0.slot_0)
        info = SeqInfo.of(2, 16)

        def layer(x, weights):
            block = models.merge(graphdef, weights)
            h = block.norm_both(x)
            mixed, _, _ = block.mixer(h, info=info)
            y, _, _ = block(x, info=info)
            ffn = block.ffn_gain[...] * block.ffn(h, info=info)[0]
            errors = jnp.max(jnp.abs(mixed - h)), jnp.max(jnp.abs(y - h - ffn))
            return y, (*errors, jnp.sqrt(jnp.mean(jnp.square(y))))

        return jax.lax.scan(layer, jax.random.normal(jax.random.key(2), (2, 16, 32)), state)

    return run()


def test_at_first_its_mixer_is_the_identity(signal):
    _, (mixer, block, _) = signal
    # Two averages in different orders of summation.
    assert jnp.max(mixer) < 1e-5 and jnp.max(block) < 1e-5


def test_signal_keeps_its_norm_over_48_layers(signal):
    y, (_, _, norms) = signal
    assert np.all((norms > 0.7) & (norms < 1.4)), norms
    # The identity path alone, with a norm a layer, must not wash tokens out into one another.
    unit = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
    assert jnp.max(jnp.abs(unit[0, 0] @ unit[0, 1:].T)) < 0.95


def test_saves_parameters_against_a_prenorm_block(make_decoder):
    """Query, key and the FFN are left of 12 D^2: a sixth less."""
    ffn = {'kind': 'gelu', 'hidden': 64}
    plain = make_decoder(ffn=ffn).body.cost(1, 1)
    short = make_decoder(ffn=ffn, block='simplified', mixer=SHAPED).body.cost(1, 1)
    saved = 1 - sum(c.params for c in short.values()) / sum(c.params for c in plain.values())
    assert 0.15 < saved < 0.18
