"""Selective copying: some tokens among noise must be said again, in order, at the end."""

import numpy as np

from effjax.core.errors import ConfigError
from effjax.data import order
from effjax.data.rows import AT, LABELS, TOKENS, RowSource, distinct, integers


class SelectiveCopy(RowSource):
    """`copies` data tokens at random places among noise (id 0), then as many markers.

    Gu and Dao, Mamba, arXiv 2312.00752, section 4.1.1. The ids are noise 0, data 1 to
    `vocab_size - 2`, and the marker, `vocab_size - 1`; at marker i the label is data token i.
    """

    def __init__(
        self,
        *,
        seq_len: int = 272,
        copies: int = 16,
        vocab_size: int = 17,
        train: int = 2_000_000,
        valid: int = 1_024,
        seed: int = 0,
    ):
        """Sets the task.

        Args:
          seq_len: tokens in a row, the markers included.
          copies: data tokens to remember.
          vocab_size: token ids, noise and marker included.
          train: rows of the training split; they cost nothing until they are read.
          valid: rows of the held-out split.
          seed: of the content.

        Raises:
          ConfigError: a row too short, or a vocabulary without two data tokens.
        """
        if copies < 1 or seq_len < 2 * copies:
            raise ConfigError(
                f'config.data.seq_len must be at least {2 * max(copies, 1)} for {copies} copies, '
                f'got {seq_len}.'
            )
        if vocab_size < 4:
            raise ConfigError(f'config.data.vocab_size must be at least 4, got {vocab_size}.')
        self._copies = copies
        super().__init__(
            'selective_copy', seq_len=seq_len, queries=copies, vocab_size=vocab_size,
            train=train, valid=valid, seed=seed, facts={'copies': copies},
        )  # fmt: skip

    def _make(self, index: np.ndarray, key: int) -> dict[str, np.ndarray]:
        rows, copies = len(index), self._copies
        body = self.seq_len - copies
        places = np.sort(distinct(index, copies, body, order.fold(key, 'places')), axis=1)
        data = 1 + integers(index, copies, self.vocab_size - 2, order.fold(key, 'data'))
        tokens = np.zeros((rows, self.seq_len), np.int64)
        np.put_along_axis(tokens, places, data, axis=1)
        tokens[:, body:] = self.vocab_size - 1
        at = np.broadcast_to(np.arange(body, self.seq_len), (rows, copies))
        return {TOKENS: tokens, AT: at, LABELS: data}
