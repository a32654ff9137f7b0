"""ListOps: nested lists of operations on digits, whose value is a digit."""

import functools
import random
import statistics
from collections.abc import Callable

import numpy as np

from effjax.core.errors import ConfigError
from effjax.data import order
from effjax.data.rows import AT, LABELS, SEGMENTS, TOKENS, RowSource

# Ids: 0 pads, 1 to 10 are the digits, then the operations with their bracket, then its end.
_DIGIT = 1
_OPS: dict[str, Callable[[list[int]], int]] = {
    '[MIN': min,
    '[MAX': max,
    '[MED': lambda args: int(statistics.median(args)),
    '[SM': lambda args: sum(args) % 10,
}
_VALUE_OF = tuple(_OPS.values())
_FIRST_OP = _DIGIT + 10
_END = _FIRST_OP + len(_OPS)
VOCAB = ('', *map(str, range(10)), *_OPS, ']')
_VALUE = 0.75  # chance that an argument is a digit, as in the original generator
_TRIES = 200_000


class _TooLong(Exception):
    """A tree has more tokens than a row."""


class ListOps(RowSource):
    """`[MAX 2 9 [MIN 4 7 ] 0 ]`; the label, a digit's id, stands at the last bracket.

    Nangia and Bowman, arXiv 1804.06028; lengths as in the Long Range Arena (arXiv 2011.04006) are
    `min_len=500, seq_len=2000`. Trees are drawn until one has a length in range. Shorter rows are
    padded behind (segment 0).
    """

    def __init__(
        self,
        *,
        seq_len: int = 200,
        min_len: int = 20,
        depth: int = 10,
        arguments: int = 10,
        train: int = 20_000,
        valid: int = 2_000,
        seed: int = 0,
    ):
        """Sets the task.

        Args:
          seq_len: most tokens in a row.
          min_len: fewest tokens.
          depth: deepest nesting.
          arguments: most arguments of an operation; the fewest are 2.
          train: rows of the training split.
          valid: rows of the held-out split.
          seed: of the content.

        Raises:
          ConfigError: lengths, depth or arguments that no tree has.
        """
        if not 4 <= min_len <= seq_len:
            raise ConfigError(
                f'config.data: min_len must be from 4 to seq_len ({seq_len}), got {min_len}.'
            )
        if depth < 1 or arguments < 2:
            raise ConfigError(
                f'config.data: depth must be at least 1 and arguments at least 2, got {depth} and '
                f'{arguments}.'
            )
        self._min_len, self._depth, self._arguments = min_len, depth, arguments
        facts = {'min_len': min_len, 'depth': depth, 'arguments': arguments}
        super().__init__(
            'listops', seq_len=seq_len, queries=1, vocab_size=len(VOCAB), train=train,
            valid=valid, seed=seed, facts=facts,
        )  # fmt: skip

    def _make(self, index: np.ndarray, key: int) -> dict[str, np.ndarray]:
        tokens = np.zeros((len(index), self.seq_len), np.int64)
        at, labels = (np.zeros((len(index), 1), np.int64) for _ in range(2))
        for row, i in enumerate(index.tolist()):
            ids, value = self._row(order.fold(key, i))
            tokens[row, : len(ids)] = ids
            at[row], labels[row] = len(ids) - 1, _DIGIT + value
        segments = (tokens > 0).astype(np.int64)
        return {TOKENS: tokens, AT: at, LABELS: labels, SEGMENTS: segments}

    @functools.lru_cache(maxsize=200_000)  # noqa: B019 (a source lives as long as its run)
    def _row(self, key: int) -> tuple[tuple[int, ...], int]:
        draw = random.Random(key).random
        for _ in range(_TRIES):
            ids: list[int] = []
            try:
                value = self._tree(draw, 1, ids)
            except _TooLong:
                continue
            if self._min_len <= len(ids) <= self.seq_len:
                return tuple(ids), value
        raise ConfigError(
            f'config.data: none of {_TRIES} trees had {self._min_len} to {self.seq_len} tokens; '
            'raise depth or arguments, or lower min_len.'
        )

    def _tree(self, draw: Callable[[], float], depth: int, ids: list[int]) -> int:
        """Appends a tree's ids and returns its digit; gives up once it cannot fit a row.

        Most trees are far too long, and nearly all the time would go into drawing them to the end.
        """
        if depth > self._depth or (depth > 1 and draw() < _VALUE):
            value = int(10 * draw())
            ids.append(_DIGIT + value)
            return value
        op = int(len(_OPS) * draw())
        count = 2 + int((self._arguments - 1) * draw())
        ids.append(_FIRST_OP + op)
        if len(ids) + count + 1 > self.seq_len:  # the arguments, and the end
            raise _TooLong
        value = _VALUE_OF[op]([self._tree(draw, depth + 1, ids) for _ in range(count)])
        ids.append(_END)
        return value
