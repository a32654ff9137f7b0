"""Induction heads: what followed the trigger the first time must follow it the second time."""

import numpy as np

from effjax.core.errors import ConfigError
from effjax.data import order
from effjax.data.rows import AT, LABELS, TOKENS, RowSource, integers


class Induction(RowSource):
    """Random tokens with a trigger somewhere and again at the end; the label is what followed it.

    Olsson et al., arXiv 2209.11895; as in H3 (arXiv 2212.14052) and Mamba (arXiv 2312.00752,
    section 4.1.2), whose vocabulary has 16 ids with the trigger, the last of them.
    """

    def __init__(
        self,
        *,
        seq_len: int = 256,
        vocab_size: int = 16,
        train: int = 2_000_000,
        valid: int = 1_024,
        seed: int = 0,
    ):
        """Sets the task.

        Args:
          seq_len: tokens in a row, the second trigger included.
          vocab_size: token ids, the trigger included.
          train: rows of the training split; they cost nothing until they are read.
          valid: rows of the held-out split.
          seed: of the content.

        Raises:
          ConfigError: a row too short, or a vocabulary without two ordinary tokens.
        """
        if seq_len < 3:
            raise ConfigError(f'config.data.seq_len must be at least 3, got {seq_len}.')
        if vocab_size < 3:
            raise ConfigError(f'config.data.vocab_size must be at least 3, got {vocab_size}.')
        super().__init__(
            'induction', seq_len=seq_len, queries=1, vocab_size=vocab_size, train=train,
            valid=valid, seed=seed, facts={},
        )  # fmt: skip

    def _make(self, index: np.ndarray, key: int) -> dict[str, np.ndarray]:
        last, trigger = self.seq_len - 1, self.vocab_size - 1
        tokens = integers(index, self.seq_len, trigger, order.fold(key, 'tokens'))
        place = integers(index, 1, last - 1, order.fold(key, 'place'))
        np.put_along_axis(tokens, place, trigger, axis=1)
        tokens[:, last] = trigger
        labels = np.take_along_axis(tokens, place + 1, axis=1)
        return {TOKENS: tokens, AT: np.full_like(place, last), LABELS: labels}
