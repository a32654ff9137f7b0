"""Next-token prediction: the objective of a decoder language model."""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.tasks.outputs import Outputs

# Above this many vocabulary entries a chunk's logits dominate the memory of a small model.
_CHUNK_VOCAB = 16384


class NextToken:
    """Cross-entropy of each token given those before it in its document, in nats.

    Args:
      execution: the config's execution block; `loss_chunks` pieces of the head's product.
      z_loss: weight of `log(Z)^2`, which keeps the logits' scale bounded (PaLM, arXiv 2204.02311).
    """

    data = 'text'

    def __init__(self, execution: Mapping[str, Any], *, z_loss: float = 0.0):
        if not z_loss >= 0:
            raise ConfigError(f'config.task.z_loss must not be negative, got {z_loss}.')
        self.z_loss = z_loss
        self.chunks = execution['loss_chunks']

    def info(self, batch: Mapping[str, jax.Array], rng: jax.Array | None, train: bool) -> SeqInfo:
        """Returns positions and documents of a batch."""
        return SeqInfo(
            positions=batch['positions'], segment_ids=batch.get('segment_ids'), rng=rng, train=train
        )

    def loss(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns (loss_sum, weight, aux) of a batch of int32 [B, T] tokens and targets."""
        outputs, aux = self.outputs(model, batch, info)
        loss, weight, metrics = self.loss_of(outputs)
        return loss, weight, {**metrics, **aux}

    def outputs(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns (`Outputs` of the B x T predictions, aux)."""
        chex.assert_rank(batch['tokens'], 2)
        chex.assert_equal_shape([batch['tokens'], batch['targets'], batch['weights']])
        hidden, aux = model(batch['tokens'], info)
        weight_DV = model.head_weight()
        rows = hidden.shape[0] * hidden.shape[1]
        out = Outputs(
            hidden.reshape(rows, hidden.shape[-1]),
            batch['targets'].reshape(rows),
            batch['weights'].reshape(rows),
            weight_DV,
            soft_cap=model.soft_cap,
            chunks=self.chunks or _pick_chunks(rows, weight_DV.shape[-1]),
        )
        return out, aux

    def loss_of(self, outputs: Outputs):
        """Returns (loss_sum, weight, metrics) of a model's outputs."""
        loss, parts = outputs.cross_entropy(self.z_loss)
        weight = jnp.sum(outputs.weights, dtype=jnp.float32)
        metrics = {'accuracy': (parts['correct'], weight)}
        if self.z_loss:
            metrics['z_loss'] = (parts['z_loss'], weight)
        return loss, weight, metrics

    def evaluate(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns sums of the loss (without z-loss) and of correct predictions."""
        outputs, _ = self.outputs(model, batch, info)
        loss, parts = outputs.cross_entropy()
        weight = jnp.sum(outputs.weights, dtype=jnp.float32)
        return {'loss': (loss, weight), 'accuracy': (parts['correct'], weight)}

    def metrics(self, sums: Mapping[str, tuple[float, float]], source: Any) -> dict[str, float]:
        """Returns loss (nats a token), perplexity, accuracy and bits per byte.

        Bits per byte divide the whole split's loss by the raw bytes it came from, so that
        tokenizers can be compared with each other and with gzip.
        """
        loss_sum, weight = sums['loss']
        loss = loss_sum / max(weight, 1.0)
        out = {
            'loss': loss,
            'perplexity': math.exp(min(loss, 700.0)),
            'accuracy': sums['accuracy'][0] / max(sums['accuracy'][1], 1.0),
            'tokens': weight,
        }
        if source.bytes:
            out['bits_per_byte'] = loss_sum / math.log(2.0) / source.bytes
        return out

    def units(self, batch_size: int, seq_len: int) -> tuple[int, int]:
        """Returns (examples, tokens) of one batch."""
        return batch_size, batch_size * seq_len

    def cost(self, model: Any, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the model's cost by part."""
        return model.cost(batch, seq_len)


def _pick_chunks(rows: int, vocab: int) -> int:
    """Pieces so that one piece's logits stay near 2^28 elements, as long as rows divide."""
    if vocab < _CHUNK_VOCAB:
        return 1
    chunks = 1
    while rows // chunks * vocab > 2**28 and rows % (2 * chunks) == 0:
        chunks *= 2
    return chunks
