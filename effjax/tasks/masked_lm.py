"""Masked language modelling: tokens are hidden, and predicted from both sides (BERT)."""

import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.models.encoder import MASK
from effjax.tasks.outputs import Outputs

# Folded into the step's key; blocks fold their index, the embedding 2^31 - 1.
_DRAW = 0x7FFFFFFE
# Odd, so that its powers tell the places of a row apart.
_FACTOR = 0x9E3779B1


class MaskedLM:
    """Cross-entropy of hidden tokens given the rest of their row, in nats (arXiv 1810.04805).

    Of each row `rate` of its text tokens are chosen, an exact number without replacement. Of those
    `masked` are replaced by the mask, `random` by a token drawn from the vocabulary, and the rest
    stay as they are. Documents' separators and padding are never chosen. The head's product is
    formed at the chosen places alone.

    Training draws from the step's key, so that a row hides other tokens each time it comes
    (RoBERTa's dynamic masking, arXiv 1907.11692) and a resumed run the same ones. An evaluation
    draws from each row's own text: the same tokens whenever and in whatever batch it is judged.

    Args:
      execution: the config's execution block (nothing of it is read here).
      rate: share of a row's tokens to predict, in (0, 1).
      masked: share of those that the mask replaces.
      random: share of those that a random token replaces.
      dynamic: False: training too draws from a row's text, so that a row hides the same tokens in
        every epoch (BERT's masks, made once before training).
    """

    data = 'text'
    bidirectional = True

    def __init__(
        self,
        execution: Mapping[str, Any],
        *,
        rate: float = 0.15,
        masked: float = 0.8,
        random: float = 0.1,
        dynamic: bool = True,
    ):
        del execution
        if not 0 < rate < 1:
            raise ConfigError(f'config.task.rate must be in (0, 1), got {rate}.')
        for key, share in (('masked', masked), ('random', random)):
            if not 0 <= share <= 1:
                raise ConfigError(f'config.task.{key} must be in [0, 1], got {share}.')
        if masked + random > 1:
            raise ConfigError(
                f'config.task.masked and config.task.random are shares of the chosen tokens: their '
                f'sum must not exceed 1, got {masked + random:g}.'
            )
        self.rate, self.masked, self.random = float(rate), float(masked), float(random)
        self.dynamic = dynamic

    def info(self, batch: Mapping[str, jax.Array], rng: jax.Array | None, train: bool) -> SeqInfo:
        """Returns positions and documents of a batch."""
        return SeqInfo(
            positions=batch['positions'],
            segment_ids=batch.get('segment_ids'),
            rng=rng,
            train=train,
            groups=batch.get('groups'),
        )

    def loss(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns (loss_sum, weight, aux) of a batch of int32 [B, T] tokens."""
        outputs, aux = self.outputs(model, batch, info)
        loss, weight, metrics = self.loss_of(outputs)
        return loss, weight, {**metrics, **aux}

    def outputs(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns (`Outputs` at the hidden tokens' places, aux)."""
        chex.assert_rank(batch['tokens'], 2)
        chex.assert_equal_shape([batch['tokens'], batch['weights']])
        with jax.named_scope('hide'):
            tokens, places, weights = self.hide(batch, info, model.vocab_size)
        hidden, aux = model(tokens, info)
        found = jnp.take_along_axis(hidden, places[..., None], axis=1)
        features = model.features(found)
        out = Outputs(
            features.reshape(-1, features.shape[-1]),
            jnp.take_along_axis(batch['tokens'], places, axis=1).reshape(-1),
            weights.reshape(-1),
            model.head_weight(),
            bias=model.head_bias[...],
        )
        return out, aux

    def loss_of(self, outputs: Outputs):
        """Returns (loss_sum, weight, metrics) of a model's outputs."""
        loss, parts = outputs.cross_entropy()
        weight = jnp.sum(outputs.weights)
        return loss, weight, {'accuracy': (parts['correct'], weight)}

    def evaluate(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns sums of the loss and of hidden tokens that were found."""
        loss, weight, metrics = self.loss_of(self.outputs(model, batch, info)[0])
        return {'loss': (loss, weight), **metrics}

    def metrics(self, sums: Mapping[str, tuple[float, float]], source: Any) -> dict[str, float]:
        """Returns loss (nats a hidden token), its exponential, accuracy and the number of tokens.

        There are no bits per byte: these are no probabilities of a text.
        """
        del source
        loss, weight = sums['loss'][0] / max(sums['loss'][1], 1.0), sums['loss'][1]
        return {
            'loss': loss,
            'perplexity': math.exp(min(loss, 700.0)),
            'accuracy': sums['accuracy'][0] / max(weight, 1.0),
            'tokens': weight,
        }

    def units(self, batch_size: int, seq_len: int) -> tuple[int, int]:
        """Returns (examples, tokens) of one batch; all tokens count, hidden or not."""
        return batch_size, batch_size * seq_len

    def cost(self, model: Any, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the model's cost by part, with a head that works on the chosen places alone."""
        return model.cost(batch, seq_len, self.most(seq_len))

    def most(self, seq_len: int) -> int:
        """Returns how many tokens of a row of text without padding are chosen; at least 1."""
        return max(1, round(self.rate * seq_len))

    def hide(
        self, batch: Mapping[str, jax.Array], info: SeqInfo, vocab_size: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Chooses tokens and hides them.

        Args:
          batch: `tokens` and `weights` [B, T].
          info: its key draws; without one, or if not `dynamic`, each row's text does.
          vocab_size: random tokens are below it.

        Returns:
          (tokens int32 [B, T] as the model reads them, places int32 [B, K] of the chosen ones,
          weights float32 [B, K]: 1 for a choice, 0 where a row has fewer than K).
        """
        tokens = batch['tokens']
        rows = jnp.arange(tokens.shape[0])
        if info.rng is None or not self.dynamic:
            key, own = jax.random.key(0), _digest(tokens)
        else:
            key, own = jax.random.fold_in(info.rng, _DRAW), rows
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, own)
        inside = _text(batch)
        places, weights = jax.vmap(self._choose)(keys, inside)
        drawn, other = jax.vmap(lambda key: self._replace(key, places.shape[1], vocab_size))(keys)
        old = jnp.take_along_axis(tokens, places, axis=1)
        new = jnp.where(drawn < self.masked, MASK, other)
        new = jnp.where((drawn < self.masked + self.random) & (weights > 0), new, old)
        return tokens.at[rows[:, None], places].set(new), places, weights

    def _choose(self, key: jax.Array, inside_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws places of one row without replacement; returns them and their weights."""
        most = self.most(inside_T.shape[0])
        drawn = jax.random.uniform(jax.random.fold_in(key, 0), inside_T.shape)
        _, places = jax.lax.top_k(jnp.where(inside_T, drawn, -1.0), most)
        count = jnp.sum(inside_T)
        wanted = jnp.maximum(jnp.round(self.rate * count), 1)
        chosen = jnp.arange(most) < jnp.minimum(wanted, count)
        return places, chosen.astype(jnp.float32)

    def _replace(self, key: jax.Array, count: int, vocab_size: int) -> tuple[jax.Array, jax.Array]:
        """Draws what becomes of one row's chosen tokens, and a random token for each."""
        drawn = jax.random.uniform(jax.random.fold_in(key, 1), (count,))
        return drawn, jax.random.randint(jax.random.fold_in(key, 2), (count,), 0, vocab_size)


def _text(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns bool [B, T]: tokens of documents, neither separators nor padding.

    These are the tokens that the one before them has to predict in next-token training, so a row's
    first token, whose own predecessor stands in another row, is none.
    """
    predicted = batch['weights'][:, :-1] > 0
    return jnp.pad(predicted, ((0, 0), (1, 0)))


def _digest(tokens_BT: jax.Array) -> jax.Array:
    """Returns a uint32 of each row's text: a polynomial in an odd number modulo 2^32."""
    length = tokens_BT.shape[1]
    powers = np.array([pow(_FACTOR, i + 1, 2**32) for i in range(length)], np.uint32)
    mixed = (tokens_BT.astype(jnp.uint32) + 1) * jnp.uint32(0x85EBCA6B)
    mixed ^= mixed >> 15
    return jnp.sum(mixed * powers, axis=1, dtype=jnp.uint32)
