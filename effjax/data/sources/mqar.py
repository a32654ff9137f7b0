"""MQAR, multi-query associative recall: key-value pairs, then the keys again at power-law gaps."""

import numpy as np

from effjax.core.errors import ConfigError
from effjax.data import order
from effjax.data.rows import AT, LABELS, TOKENS, RowSource, distinct, integers, weighted


class Mqar(RowSource):
    """Rows `k1 v1 k2 v2 ... 0 k2 0 0 k1 0 ...`; at each repeated key the label is its value.

    Arora et al., Zoology, arXiv 2312.04927, appendix E: keys are drawn from the lower half of the
    vocabulary but 0, values from the upper half, neither repeated in a row; each key comes again
    once, in a slot of two tokens after the pairs that is drawn in proportion to
    `power * slot^(power - 1)`.
    """

    def __init__(
        self,
        *,
        seq_len: int = 64,
        pairs: int = 4,
        vocab_size: int = 8192,
        train: int = 100_000,
        valid: int = 3_000,
        power: float = 0.01,
        random_fill: bool = False,
        seed: int = 0,
    ):
        """Sets the task.

        Args:
          seq_len: tokens in a row, even.
          pairs: key-value pairs in a row; as many labels.
          vocab_size: token ids.
          train: rows of the training split.
          valid: rows of the held-out split.
          power: exponent of the gaps; 1 makes all slots equally likely.
          random_fill: tokens that are neither pair nor query are random instead of 0.
          seed: of the content.

        Raises:
          ConfigError: a row too short for its pairs, or a vocabulary too small.
        """
        if pairs < 1 or seq_len % 2 or 4 * pairs > seq_len:
            raise ConfigError(
                f'config.data: {pairs} pairs need an even seq_len of at least {4 * max(pairs, 1)} '
                f'(each pair, and a slot of two tokens for its query), got {seq_len}.'
            )
        if vocab_size // 2 <= pairs:
            raise ConfigError(
                f'config.data.vocab_size {vocab_size} has too few keys for {pairs} pairs; give '
                f'more than {2 * pairs + 1}.'
            )
        if not power > 0:
            raise ConfigError(f'config.data.power must be above 0, got {power}.')
        self._pairs, self._fill = pairs, random_fill
        slots = np.arange(1, (seq_len - 2 * pairs) // 2 + 1, dtype=np.float64)
        self._weights = power * slots ** (power - 1)
        facts = {'pairs': pairs, 'power': power, 'random_fill': random_fill}
        super().__init__(
            'mqar', seq_len=seq_len, queries=pairs, vocab_size=vocab_size, train=train,
            valid=valid, seed=seed, facts=facts,
        )  # fmt: skip

    def _make(self, index: np.ndarray, key: int) -> dict[str, np.ndarray]:
        half, pairs = self.vocab_size // 2, self._pairs
        keys = 1 + distinct(index, pairs, half - 1, order.fold(key, 'keys'))
        values = half + distinct(index, pairs, self.vocab_size - half, order.fold(key, 'values'))
        slots = weighted(index, pairs, self._weights, order.fold(key, 'slots'))
        at = 2 * pairs + 2 * slots
        tokens = np.zeros((len(index), self.seq_len), np.int64)
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        np.put_along_axis(tokens, at, keys, axis=1)
        if self._fill:
            noise = integers(index, self.seq_len, self.vocab_size, order.fold(key, 'fill'))
            tokens = np.where(tokens == 0, noise, tokens)
        first = np.argsort(at, axis=1)
        at, labels = (np.take_along_axis(a, first, axis=1) for a in (at, values))
        return {TOKENS: tokens, AT: at, LABELS: labels}
