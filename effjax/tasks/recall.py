"""Recall: the loss at a few labelled positions of each row, and nowhere else."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.kernels import linear_cross_entropy


class Recall:
    """Cross-entropy at the labelled positions of synthetic rows, in nats a label.

    The head's product is formed at those positions alone (MQAR: Arora et al., arXiv 2312.04927).

    Args:
      execution: the config's execution block (nothing of it is read here).
      queries: labelled positions in a row; 0 takes the data's.
    """

    data = 'rows'

    def __init__(self, execution: Mapping[str, Any], *, queries: int = 0):
        del execution
        if queries < 0:
            raise ConfigError(f'config.task.queries must not be negative, got {queries}.')
        self.queries = queries

    def info(self, batch: Mapping[str, jax.Array], rng: jax.Array | None, train: bool) -> SeqInfo:
        """Returns positions and, of rows that are padded, documents of a batch."""
        segments = batch.get('segment_ids')
        return SeqInfo.of(*batch['tokens'].shape, segment_ids=segments, rng=rng, train=train)

    def loss(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns (loss_sum, weight, aux) of int32 tokens [B, T], at [B, Q] and labels [B, Q]."""
        sums, aux = self._sums(model, batch, info)
        loss, weight = sums.pop('loss')
        return loss, weight, {**sums, **aux}

    def evaluate(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns sums of the loss and of labels found."""
        return self._sums(model, batch, info)[0]

    def metrics(self, sums: Mapping[str, tuple[float, float]], source: Any) -> dict[str, float]:
        """Returns mean loss, accuracy (share of labels found) and the number of labels."""
        del source
        out = {name: s / max(w, 1.0) for name, (s, w) in sums.items()}
        out['labels'] = sums['loss'][1]
        return out

    def units(self, batch_size: int, seq_len: int) -> tuple[int, int]:
        """Returns (examples, tokens) of one batch."""
        return batch_size, batch_size * seq_len

    def cost(self, model: Any, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the model's cost by part, with a head that works on labelled positions alone."""
        parts = dict(model.cost(batch, seq_len))
        left_out = batch * (seq_len - self.queries)
        saved = matmul_flops(left_out, model.embed_width, model.vocab_size)
        head = parts['head']
        parts['head'] = dataclasses.replace(head, matmul=head.matmul - saved)
        return parts

    def _sums(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        chex.assert_rank([batch['tokens'], batch['at'], batch['labels']], 2)
        chex.assert_equal_shape([batch['at'], batch['labels']])
        hidden, aux = model(batch['tokens'], info)
        asked = jnp.take_along_axis(hidden, batch['at'][..., None], axis=1)
        weights = jnp.broadcast_to(batch['weights'][:, None], batch['at'].shape)
        loss, parts = linear_cross_entropy(
            asked.reshape(-1, asked.shape[-1]),
            model.head_weight(),
            batch['labels'].reshape(-1),
            weights.reshape(-1),
            soft_cap=model.soft_cap,
        )
        weight = jnp.sum(weights, dtype=jnp.float32)
        return {'loss': (loss, weight), 'accuracy': (parts['correct'], weight)}, aux
