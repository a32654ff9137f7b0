"""Masked language modelling: which tokens are hidden, that draws repeat exactly, and learning."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import train
from effjax.core.errors import ConfigError
from effjax.models.encoder import MASK
from effjax.tasks.masked_lm import MaskedLM
from effjax.training import setup
from effjax.training.loop import Trainer

VOCAB = 1000


def batch_of(rows=64, length=200, seed=0, bos=17):
    """Rows of tokens in which every `bos`-th begins a document; the last row ends in padding."""
    rng = np.random.default_rng(seed)
    weights = np.ones((rows, length), np.float32)
    weights[:, bos - 1 :: bos] = 0  # what stands before a BOS predicts nothing
    weights[-1, 50:] = 0
    return {
        'tokens': jnp.asarray(rng.integers(0, VOCAB, (rows, length)), jnp.int32),
        'positions': jnp.broadcast_to(jnp.arange(length) % bos, (rows, length)),
        'weights': jnp.asarray(weights),
    }


def hide(task, batch, key=None):
    info = task.info(batch, key, key is not None)
    return [np.asarray(a) for a in jax.jit(task.hide, static_argnums=2)(batch, info, VOCAB)]


def test_rates_are_the_papers():
    task, batch = MaskedLM({}), batch_of()
    tokens, places, weights = hide(task, batch, jax.random.key(3))
    old = np.asarray(batch['tokens'])
    inside = np.pad(np.asarray(batch['weights'])[:, :-1] > 0, ((0, 0), (1, 0)))
    chosen = np.zeros(old.shape, int)
    np.add.at(chosen, (np.arange(len(old))[:, None], places), weights.astype(int))
    # Exactly 15 % of each row's text, never twice, no separator and no padding.
    assert chosen.max() == 1 and not np.any(chosen[~inside])
    np.testing.assert_array_equal(chosen.sum(1), np.round(0.15 * inside.sum(1)))
    assert not np.any((tokens != old) & (chosen == 0))
    picked = chosen == 1
    n, masked = picked.sum(), (tokens == MASK) & picked
    changed = (tokens != old) & picked & ~masked
    # Of about 1800: four standard deviations; one random token in 1000 is the old one.
    for count, share in ((masked.sum(), 0.8), (changed.sum(), 0.1)):
        assert abs(count / n - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert tokens[changed].min() >= 0 and tokens[changed].max() < VOCAB
    # Every place of a row is as likely as any other.
    shares = [part.sum() / inside_part.sum() for part, inside_part in (
        (chosen[:, :100], inside[:, :100]), (chosen[:, 100:], inside[:, 100:])
    )]  # fmt: skip
    assert abs(shares[0] - shares[1]) < 0.03


def test_training_draws_from_the_step_and_evaluation_from_the_text():
    task, batch = MaskedLM({}), batch_of(rows=4)
    key = jax.random.key(0)
    first, again, other = (hide(task, batch, k)[0] for k in (key, key, jax.random.key(1)))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    fixed = hide(task, batch)
    # Whatever batch a row stands in, and wherever in it.
    turned = {name: array[::-1][:3] for name, array in batch.items()}
    for whole, part in zip(fixed, hide(task, turned), strict=True):
        np.testing.assert_array_equal(whole[::-1][:3], part)
    # Another row, even one with two tokens exchanged, draws other places.
    swapped = {**batch, 'tokens': batch['tokens'].at[:, 5].set(batch['tokens'][:, 6])}
    swapped['tokens'] = swapped['tokens'].at[:, 6].set(batch['tokens'][:, 5])
    assert np.all(np.any(hide(task, swapped)[1] != fixed[1], axis=1))


def test_dynamic_masks_differ_by_epoch_and_static_ones_do_not():
    """RoBERTa's switch: the rows of an epoch come again at another step, with another key."""
    batch, epochs = batch_of(rows=4), [jax.random.key(step) for step in (0, 7)]
    first, second = (hide(MaskedLM({}), batch, key) for key in epochs)
    assert np.all(np.any(first[1] != second[1], axis=1))
    static = MaskedLM({}, dynamic=False)
    once, again = (hide(static, batch, key) for key in epochs)
    for a, b, judged in zip(once, again, hide(MaskedLM({}), batch), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, judged)


class Model:
    """Logits from a table, and no transform."""

    vocab_size = VOCAB
    head_bias = jnp.linspace(0.0, 1.0, VOCAB)

    def __call__(self, tokens, info):
        table = jax.random.normal(jax.random.key(0), (VOCAB + 1, 8))
        return table[tokens], {'seen': (jnp.float32(3.0), jnp.float32(1.0))}

    def features(self, hidden):
        return 2.0 * hidden

    def head_weight(self):
        return jax.random.normal(jax.random.key(1), (8, VOCAB))


def test_the_loss_is_a_sum_over_hidden_tokens():
    task, model, batch = MaskedLM({}, rate=0.3, masked=0.5, random=0.25), Model(), batch_of(rows=4)
    info = task.info(batch, jax.random.key(5), True)
    loss, weight, aux = task.loss(model, batch, info)
    tokens, places, weights = (np.asarray(a) for a in task.hide(batch, info, VOCAB))
    logits = 2.0 * model(tokens, info)[0] @ model.head_weight() + model.head_bias
    nll = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.asarray(batch['tokens'])[..., None], -1
    )[..., 0]
    expected = np.sum(np.take_along_axis(nll, places, 1) * weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert weight == weights.sum() and aux['seen'] == (3.0, 1.0) and aux['accuracy'][1] == weight
    empty = {**batch, 'weights': jnp.zeros_like(batch['weights'])}
    loss, weight, _ = task.loss(model, empty, info)
    assert loss == weight == 0


def test_metrics_and_units():
    task = MaskedLM({})
    out = task.metrics({'loss': (2.0 * math.log(4.0), 2.0), 'accuracy': (1.0, 2.0)}, None)
    assert out == pytest.approx(
        {'loss': math.log(4.0), 'perplexity': 4.0, 'accuracy': 0.5, 'tokens': 2.0}
    )
    assert task.units(4, 32) == (4, 128) and task.most(32) == 5 and task.most(2) == 1


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'rate': 0.0}, r'task\.rate must be in \(0, 1\), got 0'),
        ({'masked': 1.5}, r'task\.masked must be in \[0, 1\], got 1.5'),
        ({'masked': 0.8, 'random': 0.3}, 'sum must not exceed 1, got 1.1'),
    ],
)
def test_shares_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        MaskedLM({}, **options)


def encoder(tiny, *overrides, **changes):
    """The tiny config with an encoder and this task."""
    model = {
        'kind': 'encoder', 'width': 16, 'layers': 1, 'mixer': {'kind': 'attention', 'heads': 2},
        'ffn': {'kind': 'gelu', 'hidden': 32}, 'positions': {'kind': 'learned'}, 'dropout': 0.1,
    }  # fmt: skip
    changes = {'model': model, 'task': {'kind': 'masked_lm'}, **changes}
    return tiny(*overrides, **changes)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (['task.kind=next_token'], r"'next_token' asks for what model 'encoder'.*kind=decoder"),
        (["model={'kind': 'decoder'}"], r"'masked_lm' hides tokens, .* 'decoder'.*kind=encoder"),
        (["model={'kind': 'vit'}"], r"'masked_lm' reads tokens, which model 'vit'.*kind=encoder"),
        (['task.kind=classification'], r"reads images, which model 'encoder'.*kind=vit"),
        (['finish.sample_tokens=3'], r"'masked_lm' looks both ways and generates no text"),
        (['finish.gzip=true'], r"gzip is compared with bits per byte, which task 'masked_lm'"),
    ],
)
def test_what_does_not_go_together(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        setup.check(encoder(tiny, *overrides))


@pytest.mark.ci
def test_a_resumed_run_hides_the_same_tokens(tiny, tmp_path, monkeypatch):
    config = encoder(tiny, 'steps=5', 'checkpoint.every_steps=2', evals={'valid': {'batches': 1}})
    whole = train.run(config, tmp_path / 'whole')
    record = Trainer._record

    def crash(self, flight, *args):
        record(self, flight, *args)
        if flight.row['step'] == 3:
            raise MemoryError('killed')

    monkeypatch.setattr(Trainer, '_record', crash)
    with pytest.raises(MemoryError):
        train.run(config, tmp_path / 'cut')
    monkeypatch.setattr(Trainer, '_record', record)
    done = train.run(config, tmp_path / 'cut')

    def losses(run):
        lines = (run.workdir / 'metrics.jsonl').read_text().splitlines()
        return [json.loads(line)['loss'] for line in lines]

    assert losses(done) == losses(whole) and len(losses(done)) == 5
    assert done.summary['eval'] == whole.summary['eval']


@pytest.mark.ci
def test_a_tiny_encoder_uses_what_stands_around(tiny, tmp_path):
    """A masked byte of the words costs less than the 2.78 nats that its frequency alone gives."""
    done = train.run(
        encoder(tiny, 'steps=400', 'batch_size=32', 'schedule.peak=2e-2', 'model.dropout=0.0'),
        tmp_path,
    )
    assert done.summary['eval']['valid']['loss'] < 2.6
