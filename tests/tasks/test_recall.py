"""The recall task: its loss against the plain formula, its cost, a run that learns, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.config import as_dict, defaults
from effjax.core.errors import ConfigError
from effjax.tasks.recall import Recall


def config(**changes):
    out = defaults()
    out.model = {
        'kind': 'decoder', 'width': 32, 'layers': 2, 'mixer': {'kind': 'attention', 'heads': 1},
        'ffn': None, 'positions': {'kind': 'learned'}, 'init': 'lecun',
    }  # fmt: skip
    out.data = {'kind': 'induction', 'seq_len': 12, 'vocab_size': 6, 'train': 5000, 'valid': 100}
    out.task = {'kind': 'recall'}
    out.seq_len, out.batch_size, out.steps = 12, 64, 5
    out.optimizer = {'kind': 'adamw', 'weight_decay': 0.0}
    out.schedule = {'kind': 'linear', 'peak': 3e-3, 'warmup': 0.05}
    out.evals.valid = {'every_share': 1.0}
    out.log.progress = False
    for key, value in changes.items():  # whole blocks
        del out[key]
        out[key] = value
    return out


def test_the_loss_is_that_of_the_labels_alone():
    key = jax.random.key(0)
    hidden = jax.random.normal(key, (3, 7, 4))
    head = jax.random.normal(jax.random.key(1), (4, 11))

    class Model:
        soft_cap, embed_width, vocab_size = None, 4, 11

        def __call__(self, tokens, info):
            return hidden, {}

        def head_weight(self):
            return head

    batch = {
        'tokens': jnp.zeros((3, 7), jnp.int32),
        'at': jnp.array([[0, 6], [2, 3], [5, 6]]),
        'labels': jnp.array([[1, 2], [3, 4], [5, 6]]),
        'weights': jnp.array([1.0, 1.0, 0.0]),  # the last row pads
    }
    task = Recall({}, queries=2)
    loss, weight, aux = task.loss(Model(), batch, task.info(batch, None, False))
    logits = jax.nn.log_softmax(hidden @ head)
    expected = [-logits[0, 0, 1], -logits[0, 6, 2], -logits[1, 2, 3], -logits[1, 3, 4]]
    assert weight == 4 and aux['accuracy'][1] == 4
    np.testing.assert_allclose(loss, np.sum(expected), rtol=1e-5)  # float32 sums


def test_the_head_is_charged_for_labels_only():
    from effjax.training.runtime import Runtime

    runtime = Runtime(config())
    assert runtime.config['task']['queries'] == 1  # the data's
    whole = runtime.built.model.cost(64, 12)
    mine = runtime.task.cost(runtime.built.model, 64, 12)
    assert mine['head'].matmul * 12 == whole['head'].matmul == 2 * 64 * 12 * 32 * 6
    assert {k: v for k, v in mine.items() if k != 'head'} == {
        k: v for k, v in whole.items() if k != 'head'
    }
    # The compiled step agrees: three times the forward products, and the remat-free rest.
    stage = runtime.stages[0]
    sampler = runtime.sampler(stage)
    batch = runtime.putter(64)(sampler.batch(sampler.initial()))
    assert runtime.compile(stage, batch).cost.model_flops == 3 * sum(
        c.model_flops for c in mine.values()
    )


@pytest.mark.ci
@pytest.mark.usefixtures('full_compile')
def test_attention_learns_induction(tmp_path):
    from effjax.training.session import train

    summary, _ = train(as_dict(config(steps=1000)), tmp_path)
    assert summary['eval']['valid']['accuracy'] > 0.9, summary['eval']  # chance is 0.2
    assert summary['eval']['valid']['labels'] == 100


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'task': {'kind': 'recall', 'queries': 3}}, 'rows of the data have 1 labelled'),
        ({'task': {'kind': 'next_token'}}, "'next_token' needs text data, but .* gives rows"),
        ({'data': {'kind': 'digits'}}, "'recall' needs rows data, but .* gives image"),
        ({'seq_len': 10}, 'make config.seq_len and config.data.seq_len the same'),
        ({'finish': {'gzip': True}}, 'config.finish.gzip is for text'),
    ],
)
def test_refusals(changes, message):
    from effjax.training import setup
    from effjax.training.runtime import Runtime

    broken = config(**{k: v for k, v in changes.items() if k != 'finish'})
    for key, value in changes.get('finish', {}).items():
        broken.finish[key] = value
    build = functools.partial(Runtime, broken)
    with pytest.raises(Exception, match=message) as error:
        setup.check(as_dict(broken))
        build()
    assert issubclass(error.type, ConfigError) or 'DataError' in error.type.__name__
