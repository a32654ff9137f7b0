"""Samplers: the batch at a position, a pure function of the seed and what has been consumed.

A position is JSON and belongs in the checkpoint:

    {'sample': samples drawn so far, 'sources': {KEY: position in that source}}

A source's KEY names its content, tokenizer and packing, so that a position survives a stage that
changes batch size, sequence length or the mixture: sources met again go on where they stood,
new ones begin, and those that pause keep their place. `effjax.data.packing` says how a source
goes on after a change; there is nothing to convert. Keep the seed for that.

`batch(position, rows)` returns rows of the *global* batch: whatever the number of hosts, together
they read the same samples.
"""

import dataclasses
from typing import Any, Protocol

import chex
import numpy as np

from effjax.data import order, packing
from effjax.data.packing import Batch, Order, Position, Rows, Tokens

RowIndex = slice | np.ndarray | None


class Sampler(Protocol):
    """What a loader and a trainer need.

    Attributes:
      batch_size: rows of the global batch.
      workers: processes that a loader starts to make batches; 0 is a thread.
    """

    batch_size: int
    workers: int

    def initial(self) -> Position:
        """Returns the position before the first batch."""
        ...

    def batch(self, position: Position, rows: RowIndex = None) -> Batch:
        """Returns the batch at a position, or some rows of it; the same whenever it is called."""
        ...

    def advance(self, position: Position) -> Position:
        """Returns the position after the batch at `position`."""
        ...

    def describe(self, position: Position) -> list[str]:
        """Names the samples of the batch at a position, one a row, for an error message."""
        ...


@dataclasses.dataclass(frozen=True)
class TextPart:
    """One source in a text sampler.

    Attributes:
      name: for people.
      key: its name in positions.
      tokens: the stream it reads.
      packing: 'pack', 'split' or 'stream'.
      share: its part of the samples; those of all parts sum to 1.
    """

    name: str
    key: str
    tokens: Tokens
    packing: str
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Taken:
    """The samples of a batch: which part each row comes from, and which of the part's rows."""

    part: np.ndarray  # int64 [B]
    index: np.ndarray  # int64 [B]
    rows: list[Rows]  # of each part
    after: Position


class TextSampler:
    """Rows of one text source, or of several mixed.

    Which source a sample comes from is a function of its number alone (`order.choose`).
    """

    def __init__(
        self,
        parts: list[TextPart],
        *,
        record: int,
        batch_size: int,
        seq_len: int,
        seed: int,
        workers: int = 0,
    ):
        """Sets the batch.

        Args:
          parts: the sources.
          record: tokens in a unit of shuffling, unless the position brings another.
          batch_size: rows of the global batch.
          seq_len: tokens in a row.
          seed: of the order.
          workers: processes that make batches.

        Raises:
          DataError: a source too short for one row.
        """
        for part in parts:
            packing.check_length(part.packing, part.tokens, seq_len, f'{part.name}/train')
        self.batch_size = batch_size
        self.workers = workers
        self.seq_len = seq_len
        self._parts = parts
        self._orders: list[Order] = [
            packing.make_order(p.packing, p.tokens, record, order.fold(seed, p.key)) for p in parts
        ]
        self._key = order.fold(seed, 'mixture')

    def initial(self) -> Position:
        """Returns the position before the first batch."""
        return {'sample': 0, 'sources': {}}

    def batch(self, position: Position, rows: RowIndex = None) -> Batch:
        """Returns the batch at a position, or some rows of it.

        Args:
          position: from `initial`, `advance`, or a checkpoint.
          rows: which rows of the global batch; None is all.

        Returns:
          The arrays of `effjax.data.packing.make_batch`.
        """
        taken = self._take(position)
        wanted = np.arange(self.batch_size)[slice(None) if rows is None else rows]
        chex.assert_rank(wanted, 1)
        out: Batch = {}
        for i, (part, part_rows) in enumerate(zip(self._parts, taken.rows, strict=True)):
            place = np.flatnonzero(taken.part[wanted] == i)
            chosen = part_rows[taken.index[wanted[place]]]
            if not len(place):
                continue
            piece = packing.make_batch(part.tokens, chosen, self.seq_len, part.packing, True)
            if len(place) == len(wanted):
                return piece
            for name, array in piece.items():
                out.setdefault(name, np.zeros((len(wanted), self.seq_len), array.dtype))
                out[name][place] = array
        return out

    def advance(self, position: Position) -> Position:
        """Returns the position after the batch at `position`."""
        return self._take(position).after

    def describe(self, position: Position) -> list[str]:
        """Names the samples: 'source@first token+length', in tokens of the training split."""
        taken, out = self._take(position), []
        for part, index in zip(taken.part.tolist(), taken.index.tolist(), strict=True):
            row = taken.rows[part][index]
            out.append(f'{self._parts[part].name}@{int(row.start)}+{int(row.length)}')
        return out

    def _take(self, position: Position) -> _Taken:
        first, size = position['sample'], self.batch_size
        part = order.choose(
            np.arange(first, first + size), [p.share for p in self._parts], self._key
        )
        index = np.zeros(size, np.int64)
        rows, sources = [], dict(position['sources'])
        for i, p in enumerate(self._parts):
            place = np.flatnonzero(part == i)
            index[place] = np.arange(len(place))
            taken, sources[p.key] = self._orders[i].take(
                sources.get(p.key), len(place), self.seq_len
            )
            rows.append(taken)
        return _Taken(part, index, rows, {'sample': first + size, 'sources': sources})


class ExampleSampler:
    """Images or rows in a new order each epoch. Position in the source: `examples` consumed."""

    def __init__(
        self, examples: Any, *, name: str, key: str, batch_size: int, seed: int, workers: int = 0
    ):
        """Sets the batch.

        Args:
          examples: `len`, and `[indices]` -> dict of arrays with N in front.
          name: for people.
          key: the source's name in positions.
          batch_size: rows of the global batch.
          seed: of the order.
          workers: processes that make batches.
        """
        self.batch_size = batch_size
        self.workers = workers
        self._examples = examples
        self._name = name
        self._source = key
        self._key = order.fold(seed, key)

    def initial(self) -> Position:
        """Returns the position before the first batch."""
        return {'sample': 0, 'sources': {}}

    def batch(self, position: Position, rows: RowIndex = None) -> Batch:
        """Returns the examples' arrays, with `weights` float32 [B] of ones."""
        wanted = self._indices(position)[slice(None) if rows is None else rows]
        return example_batch(self._examples, wanted, len(wanted))

    def advance(self, position: Position) -> Position:
        """Returns the position after the batch at `position`."""
        consumed = self._consumed(position) + self.batch_size
        sources = {**position['sources'], self._source: {'examples': consumed}}
        return {'sample': position['sample'] + self.batch_size, 'sources': sources}

    def describe(self, position: Position) -> list[str]:
        """Names the samples: 'source#index', in the training split."""
        return [f'{self._name}#{i}' for i in self._indices(position).tolist()]

    def _consumed(self, position: Position) -> int:
        return position['sources'].get(self._source, {'examples': 0})['examples']

    def _indices(self, position: Position) -> np.ndarray:
        first, size = self._consumed(position), len(self._examples)
        epoch, place = np.divmod(np.arange(first, first + self.batch_size), size)
        out = np.empty(self.batch_size, np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            out[here] = order.permute(place[here], size, order.fold(self._key, 'epoch', e))
        return out


def example_batch(examples: Any, index: np.ndarray, size: int) -> Batch:
    """Reads examples, and pads them to `size` rows with weight 0.

    Returns:
      The examples' arrays, [size, ...], and `weights` float32 [size].
    """
    got = {name: np.asarray(array) for name, array in examples[index].items()}
    for name, array in got.items():
        if len(array) != len(index):
            raise ValueError(f'{len(index)} examples were asked for, {name!r} has {len(array)}.')
    got['weights'] = np.ones(len(index), np.float32)
    missing = size - len(index)
    return {k: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for k, a in got.items()}
