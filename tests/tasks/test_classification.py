"""Classification: weighted cross-entropy and accuracy; a run on the digits beats a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import train
from effjax.core import config as config_lib
from effjax.tasks.classification import Classification


def test_sums_and_smoothing():
    logits = jax.random.normal(jax.random.key(0), (4, 3))
    batch = {
        'image': jnp.zeros((4, 2, 2, 1)),
        'label': jnp.asarray([0, 1, 2, 0]),
        'weights': jnp.asarray([1.0, 1.0, 0.0, 1.0]),
    }

    def model(image, info):
        return logits, {}

    for smoothing in (0.0, 0.1):
        task = Classification({}, label_smoothing=smoothing)
        loss, weight, aux = task.loss(model, batch, task.info(batch, None, True))
        targets = np.eye(3)[np.asarray(batch['label'])] * (1 - smoothing) + smoothing / 3
        expected = -(targets * np.asarray(jax.nn.log_softmax(logits))).sum(-1)
        np.testing.assert_allclose(loss, expected[[0, 1, 3]].sum(), rtol=1e-5)
        assert weight == 3 and aux['accuracy'][1] == 3
    sums = task.evaluate(model, batch, task.info(batch, None, False))
    assert sums['loss'][0] != loss  # judged without smoothing
    assert task.metrics({'loss': (6.0, 3.0), 'accuracy': (3.0, 3.0)}, None) == {
        'loss': 2.0,
        'accuracy': 1.0,
        'examples': 3.0,
    }


@pytest.mark.ci
@pytest.mark.usefixtures('full_compile')
def test_the_digits_are_learned(repository, tmp_path):
    config = config_lib.load(
        str(repository / 'configs' / 'digits_vit.py'),
        ['budget=30000examples', 'log.progress=false', 'log.tensorboard=false', 'evals.valid={}'],
    )
    summary = train.run(config, tmp_path).summary
    # Half of the config's own budget, which ends at 0.96; guessing is right one time in ten.
    assert summary['eval']['valid']['accuracy'] > 0.9
    assert summary['eval']['valid']['examples'] == 385
    assert abs(summary['ledger']['examples'] - 30000) <= 32
