"""Next-token loss: the weighted sum, its metrics, and bits per byte."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.info import SeqInfo
from effjax.tasks.next_token import NextToken, _pick_chunks

EXECUTION = {'loss_chunks': 0}


class Model:
    """Hidden vectors from a table; a head of its own."""

    soft_cap = None

    def __init__(self, vocab=11, width=4):
        self.table = jax.random.normal(jax.random.key(0), (vocab, width))
        self.head = jax.random.normal(jax.random.key(1), (width, vocab))

    def __call__(self, tokens, info):
        return self.table[tokens], {'seen': (jnp.float32(3.0), jnp.float32(1.0))}

    def head_weight(self):
        return self.head


def batch_of(rows=3, length=5, vocab=11):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, length + 1))
    return {
        'tokens': jnp.asarray(tokens[:, :-1]),
        'targets': jnp.asarray(tokens[:, 1:]),
        'weights': jnp.asarray(rng.integers(0, 2, (rows, length)), jnp.float32),
        'positions': jnp.zeros((rows, length), jnp.int32),
    }


@pytest.mark.parametrize('z_loss', [0.0, 0.01])
def test_the_loss_is_a_sum_over_weighted_tokens(z_loss):
    model, batch = Model(), batch_of()
    task = NextToken(EXECUTION, z_loss=z_loss)
    info = task.info(batch, None, True)
    assert isinstance(info, SeqInfo) and info.segment_ids is None and info.train
    loss, weight, aux = task.loss(model, batch, info)
    logits = model.table[batch['tokens']] @ model.head
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - jnp.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
    expected = jnp.sum((nll + z_loss * lse**2) * batch['weights'])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert weight == batch['weights'].sum()
    right = (logits.argmax(-1) == batch['targets']) * batch['weights']
    assert aux['accuracy'] == (right.sum(), weight)
    assert aux['seen'] == (3.0, 1.0) and ('z_loss' in aux) == bool(z_loss)
    # An evaluation reports the cross-entropy alone.
    sums = task.evaluate(model, batch, info)
    np.testing.assert_allclose(sums['loss'][0], jnp.sum(nll * batch['weights']), rtol=1e-5)


def test_metrics_count_bits_over_the_raw_bytes():
    task = NextToken(EXECUTION)
    sums = {'loss': (100.0 * math.log(2.0), 50.0), 'accuracy': (10.0, 50.0)}
    out = task.metrics(sums, types.SimpleNamespace(bytes=200))
    assert out['bits_per_byte'] == pytest.approx(0.5) and out['accuracy'] == 0.2
    assert out['loss'] == pytest.approx(2 * math.log(2.0)) and out['perplexity'] == pytest.approx(4)
    assert 'bits_per_byte' not in task.metrics(sums, types.SimpleNamespace(bytes=0))


def test_large_vocabularies_are_cut_into_chunks():
    assert _pick_chunks(4096, 4096) == 1
    assert _pick_chunks(16384, 32000) == 2
    assert _pick_chunks(16383, 128000) == 1  # odd: it stays whole rather than padded
    assert 2**28 // 2 <= 65536 // _pick_chunks(65536, 128000) * 128000 <= 2**28


def test_units():
    assert NextToken(EXECUTION).units(4, 32) == (4, 128)
