"""Image classification."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.tasks.outputs import Outputs


class Classification:
    """Softmax cross-entropy over classes, in nats.

    Args:
      execution: the config's execution block (nothing of it is read here).
      label_smoothing: probability mass spread over all classes (arXiv 1512.00567).
    """

    data = 'image'

    def __init__(self, execution: Mapping[str, Any], *, label_smoothing: float = 0.0):
        del execution
        if not 0 <= label_smoothing < 1:
            raise ConfigError(
                f'config.task.label_smoothing must be in [0, 1), got {label_smoothing}.'
            )
        self.label_smoothing = label_smoothing

    def info(self, batch: Mapping[str, jax.Array], rng: jax.Array | None, train: bool) -> SeqInfo:
        """Returns an info that carries only the key: the model makes the patches' positions."""
        rows = batch['image'].shape[0]
        return SeqInfo.of(rows, 1, rng=rng, train=train)

    def loss(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns (loss_sum, weight, aux) of images [B, H, W, C] with labels int32 [B]."""
        outputs, aux = self.outputs(model, batch, info)
        loss, weight, metrics = self.loss_of(outputs)
        return loss, weight, {**metrics, **aux}

    def outputs(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns (`Outputs` whose rows are float32 logits [B, classes], aux)."""
        chex.assert_rank([batch['image'], batch['label'], batch['weights']], [4, 1, 1])
        logits, aux = model(batch['image'], info)
        weights = batch['weights'].astype(jnp.float32)
        return Outputs(logits.astype(jnp.float32), batch['label'], weights), aux

    def loss_of(self, outputs: Outputs):
        """Returns (loss_sum, weight, metrics) of a model's outputs."""
        sums = self._sums(outputs, self.label_smoothing)
        loss, weight = sums.pop('loss')
        return loss, weight, sums

    def evaluate(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns sums of the loss (without smoothing) and of correct predictions."""
        return self._sums(self.outputs(model, batch, info)[0], 0.0)

    def metrics(self, sums: Mapping[str, tuple[float, float]], source: Any) -> dict[str, float]:
        """Returns mean loss and accuracy and the number of examples."""
        del source
        out = {name: s / max(w, 1.0) for name, (s, w) in sums.items()}
        out['examples'] = sums['loss'][1]
        return out

    def units(self, batch_size: int, seq_len: int) -> tuple[int, int]:
        """Returns (examples, tokens): an image counts as `seq_len` patches."""
        return batch_size, batch_size * seq_len

    def cost(self, model: Any, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the model's cost by part."""
        return model.cost(batch, seq_len)

    def _sums(self, outputs: Outputs, smoothing: float):
        logits, label, weights = outputs.rows, outputs.targets, outputs.weights
        targets = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        correct = (jnp.argmax(logits, -1) == label).astype(jnp.float32)
        total = jnp.sum(weights)
        return {
            'loss': (jnp.sum(losses * weights), total),
            'accuracy': (jnp.sum(correct * weights), total),
        }
