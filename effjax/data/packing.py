"""Rows out of a stream of tokens: which slices, in which order, and the batch they make.

The stream of a split is `BOS d1 BOS d2 BOS ...`, each document preceded by the tokenizer's BOS. A
*row* is a slice of it, at most `seq_len` tokens long, and each input position predicts the token
after it. Three packings:

    pack    rows cut the stream wherever they fall; documents share rows, but nothing crosses them
    split   a row holds (a piece of) one document, padded
    stream  random windows of the stream, nothing marks a document (nanoGPT's way)

In `pack` and `split` every token of every document is a target exactly once an epoch: the target
of a row's last input is read from beyond the row, and a document's first token is predicted from
its BOS. BOS itself is never a target (nor an end of text: a document's last token predicts
nothing), so that the sum of the losses is the cost of the documents' own bytes. In `stream`
training BOS is a token like any other; in its evaluation it is again no target. A tokenizer
without BOS (characters of one document) cannot predict a document's first token: no target either.

**Order.** The stream is cut into *units*: records of `record` tokens (`pack`; the cut moves each
epoch) or pieces of documents no longer (`split`). Units are permuted, taken in *blocks* of at most
64, and the rows of a block are permuted again, so that neighbouring rows come from different
places even when rows are much shorter than units. Both permutations are hashes of (key, epoch,
index): nothing is kept in memory. Rows never span units: where `seq_len` does not divide `record`,
each record ends in a padded row.

**Position** of one stream, JSON: `epoch`, `block`, `row` in the block, for rows of `seq_len` out
of units of `record` tokens; `tokens` consumed, `skipped` tokens. Another batch size goes on with
the very next row. Another `seq_len` goes on with the next block, so that nothing is seen twice in
an epoch: what is left of the current block is skipped, less than 64 records (or an eighth of
the epoch, where that is less; eight records where an epoch has fewer than 64). A `seq_len` above
`record` starts the next epoch, with longer records; give the longest one to `build` to avoid it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import chex
import numpy as np

from effjax.core.errors import ConfigError, DataError
from effjax.data import order

Packing = Literal['pack', 'split', 'stream']
PACKINGS: tuple[str, ...] = ('pack', 'split', 'stream')
BLOCK = 64  # most units in a block: what is shuffled together, and what a stage may skip
_SMALL_BLOCK = 8  # units in a block of a tiny split
_BLOCKS = 8  # an epoch has at least as many blocks, if it has the units

Batch = dict[str, np.ndarray]
Position = dict[str, Any]


class Tokens(Protocol):
    """A split's stream, as `effjax.data.shards.TokenStream` reads it.

    Attributes:
      size: number of tokens, BOS included.
      starts: int64 [documents], where each document's BOS (or first token) stands.
    """

    size: int
    starts: np.ndarray

    def gather(self, start: np.ndarray, length: np.ndarray, width: int) -> np.ndarray:
        """Returns int32 [n, width]: row i holds `length[i]` tokens from `start[i]`, then zeros."""
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """Slices of one stream.

    Attributes:
      start: int64 [n].
      length: int64 [n], input tokens in the row, at most `seq_len`.
    """

    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: Any) -> 'Rows':
        return Rows(self.start[index], self.length[index])

    @staticmethod
    def join(parts: list['Rows']) -> 'Rows':
        """Concatenates rows."""
        if len(parts) == 1:
            return parts[0]
        return Rows(
            np.concatenate([p.start for p in parts]), np.concatenate([p.length for p in parts])
        )

    @staticmethod
    def cut(units: 'Rows', seq_len: int) -> 'Rows':
        """Cuts each unit into rows of `seq_len`, the last one of a unit possibly shorter."""
        count = -(-units.length // seq_len)
        unit = np.repeat(np.arange(len(units)), count)
        offset = _ragged(count) * seq_len
        return Rows(units.start[unit] + offset, np.minimum(units.length[unit] - offset, seq_len))


def _ragged(count: np.ndarray) -> np.ndarray:
    """Returns 0..count[0]-1, 0..count[1]-1, ..., int64 [sum(count)]."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count)


def make_batch(tokens: Tokens, rows: Rows, seq_len: int, packing: str, training: bool) -> Batch:
    """Reads rows into arrays.

    Positions restart at 0 with each document, and at the start of a row that cuts one.

    Args:
      tokens: the stream.
      rows: n slices of it.
      seq_len: T, the width of a row.
      packing: 'pack', 'split' or 'stream'.
      training: whether `stream` may make BOS a target.

    Returns:
      `tokens`, `targets`, `segment_ids` (1.. in a row, 0 where padded), `positions`: int32
      [n, T]; `weights`: float32 [n, T], 1 where there is a target. A position without one has
      target 0 and weight 0. `stream` has no `segment_ids`: a row is one piece of text, padded at
      its end at most, and attention without documents is faster.
    """
    n = len(rows)
    chex.assert_equal_shape([rows.start, rows.length])
    ahead = np.minimum(rows.length + 1, tokens.size - rows.start)
    text = tokens.gather(rows.start, ahead, seq_len + 1)
    chex.assert_shape(text, (n, seq_len + 1))
    column = np.arange(seq_len, dtype=np.int32)
    held = column < rows.length[:, None]
    opens = _document_starts(tokens.starts, rows, seq_len)
    has_target = held & (column + 1 < ahead[:, None])
    segment_ids = None
    if packing == 'stream':
        positions = np.where(held, column, 0)
        if not training:
            has_target &= ~opens[:, 1:]
    else:
        has_target &= ~opens[:, 1:]
        opens = opens[:, :-1]
        opens[:, 0] = True
        segment_ids = np.cumsum(opens, axis=1, dtype=np.int32)
        opened = np.maximum.accumulate(np.where(opens, column, 0), axis=1)
        positions = column - opened
        if not held.all():
            segment_ids, positions = np.where(held, segment_ids, 0), np.where(held, positions, 0)
    inputs, targets = text[:, :-1], text[:, 1:]
    batch = {
        'tokens': np.ascontiguousarray(inputs) if held.all() else np.where(held, inputs, 0),
        'targets': np.where(has_target, targets, 0),
        'positions': positions.astype(np.int32, copy=False),
        'weights': has_target.astype(np.float32),
    }
    return batch if segment_ids is None else {**batch, 'segment_ids': segment_ids}


def _document_starts(starts: np.ndarray, rows: Rows, seq_len: int) -> np.ndarray:
    """Returns bool [n, T + 1]: where a BOS stands in a row and the token after it."""
    first = np.searchsorted(starts, rows.start)
    count = np.searchsorted(starts, rows.start + rows.length, side='right') - first
    row = np.repeat(np.arange(len(rows)), count)
    at = starts[np.repeat(first, count) + _ragged(count)] - rows.start[row]
    out = np.zeros((len(rows), seq_len + 1), bool)
    out[row, at] = True
    return out


class Order(Protocol):
    """In which order a stream's rows are seen, and where one stands in it."""

    def take(self, position: Position | None, count: int, seq_len: int) -> tuple[Rows, Position]:
        """Returns the next `count` rows, and the position after them. None is the beginning."""
        ...

    def held_out(self, seq_len: int) -> Rows:
        """Returns the rows that cover the whole stream once, in its own order."""
        ...


class _Blocks:
    """The walk through epochs, blocks and rows that `pack` and `split` share."""

    def __init__(self, tokens: Tokens, record: int, key: int):
        """Keeps the facts.

        Args:
          tokens: the stream.
          record: longest unit, in tokens, unless a position brings another.
          key: of the permutations.
        """
        self._tokens = tokens
        self._record = record
        self._key = key
        self._block = functools.lru_cache(maxsize=16)(self._make_block)

    def __reduce__(self) -> tuple:
        return type(self), (self._tokens, self._record, self._key)

    def _epoch_tokens(self) -> int:
        """Returns the number of inputs in an epoch."""
        raise NotImplementedError

    def _unit_count(self, epoch: int, record: int) -> int:
        """Returns the number of units in an epoch."""
        raise NotImplementedError

    def _units(self, epoch: int, record: int, number: np.ndarray) -> Rows:
        """Returns the slices that units are."""
        raise NotImplementedError

    def take(self, position: Position | None, count: int, seq_len: int) -> tuple[Rows, Position]:
        """Returns the next `count` rows, and the position after them. None is the beginning."""
        at = self._settle(position, seq_len)
        parts, missing = [], count
        while missing:
            block = self._block(at['epoch'], at['block'], seq_len, at['record'])
            part = block[at['row'] : at['row'] + missing]
            parts.append(part)
            missing -= len(part)
            at['row'] += len(part)
            at['tokens'] += int(part.length.sum())
            if at['row'] == len(block):
                self._next_block(at)
        empty = np.zeros(0, np.int64)
        return Rows.join(parts or [Rows(empty, empty)]), at

    def _settle(self, position: Position | None, seq_len: int) -> Position:
        """Returns a copy of the position that fits rows of `seq_len`: see the module's rule."""
        if position is None:
            start = dict.fromkeys(('tokens', 'skipped', 'epoch', 'block', 'row'), 0)
            return {**start, 'seq_len': seq_len, 'record': max(self._record, seq_len)}
        at = dict(position)
        if seq_len > at['record']:
            begun = at['row'] or at['block']
            if begun:
                # What was consumed and what was skipped add up to whole epochs.
                whole = (at['epoch'] + 1) * self._epoch_tokens()
                at['skipped'] = whole - at['tokens']
            at.update(epoch=at['epoch'] + bool(begun), block=0, row=0)
            at['record'] = max(self._record, seq_len)
        elif seq_len != at['seq_len'] and at['row']:
            at['skipped'] += self._left_in_block(at)
            self._next_block(at)
        at['seq_len'] = seq_len
        return at

    def _next_block(self, at: Position) -> None:
        at.update(block=at['block'] + 1, row=0)
        if at['block'] == self._block_count(at['epoch'], at['record'])[0]:
            at.update(block=0, epoch=at['epoch'] + 1)

    def _left_in_block(self, at: Position) -> int:
        block = self._block(at['epoch'], at['block'], at['seq_len'], at['record'])
        return int(block.length[at['row'] :].sum())

    def _block_count(self, epoch: int, record: int) -> tuple[int, int]:
        """Returns the number of blocks in an epoch, and of units in a block."""
        units = self._unit_count(epoch, record)
        size = min(BLOCK, max(_SMALL_BLOCK, units // _BLOCKS))
        return -(-units // size), size

    def _make_block(self, epoch: int, block: int, seq_len: int, record: int) -> Rows:
        units = self._unit_count(epoch, record)
        _, size = self._block_count(epoch, record)
        slots = np.arange(block * size, min((block + 1) * size, units))
        number = order.permute(slots, units, order.fold(self._key, 'units', epoch))
        rows = Rows.cut(self._units(epoch, record, number), seq_len)
        key = order.fold(self._key, 'rows', epoch, block)
        return rows[order.permute(np.arange(len(rows)), len(rows), key)]


class PackOrder(_Blocks):
    """Records of equal length; where the first one ends is drawn anew each epoch."""

    def _epoch_tokens(self) -> int:
        return self._tokens.size

    def _first(self, epoch: int, record: int) -> int:
        """Returns the length of the first record, 1 to `record`."""
        return min(self._tokens.size, 1 + order.fold(self._key, 'cut', epoch) % record)

    def _unit_count(self, epoch: int, record: int) -> int:
        return 1 - (self._first(epoch, record) - self._tokens.size) // record

    def _units(self, epoch: int, record: int, number: np.ndarray) -> Rows:
        stop = self._first(epoch, record) + number * record
        start = np.maximum(stop - record, 0)
        return Rows(start, np.minimum(stop, self._tokens.size) - start)

    def held_out(self, seq_len: int) -> Rows:
        """Returns the rows that cover the whole stream once, in its own order."""
        whole = Rows(np.zeros(1, np.int64), np.array([self._tokens.size], np.int64))
        return Rows.cut(whole, seq_len)


class SplitOrder(_Blocks):
    """Pieces of documents. Keeps 16 bytes a document in memory."""

    def __init__(self, tokens: Tokens, record: int, key: int):
        """Keeps the facts: see `_Blocks`."""
        super().__init__(tokens, record, key)
        # A document of n tokens has n inputs with a target: BOS and all but its last token.
        self._length = np.diff(tokens.starts, append=tokens.size) - 1
        self._ends = functools.lru_cache(maxsize=2)(
            lambda record: np.cumsum(-(-self._length // record))
        )

    def _epoch_tokens(self) -> int:
        return int(self._length.sum())

    def _unit_count(self, epoch: int, record: int) -> int:
        return int(self._ends(record)[-1])

    def _units(self, epoch: int, record: int, number: np.ndarray) -> Rows:
        ends = self._ends(record)
        document = np.searchsorted(ends, number, side='right')
        first = ends[document] - -(-self._length[document] // record)
        offset = (number - first) * record
        length = np.minimum(self._length[document] - offset, record)
        return Rows(np.asarray(self._tokens.starts)[document] + offset, length)

    def held_out(self, seq_len: int) -> Rows:
        """Returns the rows that cover the whole stream once, in its own order."""
        return Rows.cut(Rows(np.asarray(self._tokens.starts), self._length), seq_len)


class StreamOrder:
    """Windows whose start is a hash of (key, number of the window); there are no epochs.

    Position: `windows` drawn and `tokens` in them. Neither batch size nor `seq_len` matters to it.
    """

    def __init__(self, tokens: Tokens, record: int, key: int):
        """Keeps the facts; `record` has no meaning here."""
        self._tokens = tokens
        self._key = key

    def take(self, position: Position | None, count: int, seq_len: int) -> tuple[Rows, Position]:
        """Returns the next `count` rows, and the position after them. None is the beginning."""
        at = dict(position) if position else {'windows': 0, 'tokens': 0}
        number = np.arange(at['windows'], at['windows'] + count)
        # The last window's last target is the stream's last token.
        start = order.draw(number, self._tokens.size - seq_len, order.fold(self._key, 'windows'))
        at['windows'] += count
        at['tokens'] += count * seq_len
        return Rows(start, np.full(count, seq_len, np.int64)), at

    def held_out(self, seq_len: int) -> Rows:
        """Returns the rows that cover the whole stream once, in its own order."""
        return PackOrder(self._tokens, seq_len, self._key).held_out(seq_len)


_ORDERS: dict[str, Callable[[Tokens, int, int], Order]] = {
    'pack': PackOrder,
    'split': SplitOrder,
    'stream': StreamOrder,
}


def make_order(packing: str, tokens: Tokens, record: int, key: int) -> Order:
    """Returns the order of a packing.

    Raises:
      ConfigError: no such packing.
    """
    check_packing(packing)
    return _ORDERS[packing](tokens, record, key)


def check_packing(packing: object) -> None:
    """Checks the name of a packing.

    Raises:
      ConfigError: no such packing.
    """
    if packing not in PACKINGS:
        raise ConfigError(
            f'config.data.packing must be one of {", ".join(PACKINGS)}, got {packing!r}.'
        )


def check_length(packing: str, tokens: Tokens, seq_len: int, what: str) -> None:
    """Checks that a split can fill a row.

    Raises:
      DataError: it is shorter than one row.
    """
    if packing == 'split' and tokens.size == len(tokens.starts):
        raise DataError(f'{what} has no token that another one precedes; give more text.')
    # A row of T inputs needs T + 1 tokens, the last target included.
    if packing != 'split' and tokens.size < seq_len + 1:
        raise DataError(
            f'{what} has {tokens.size} tokens, too few for one row of seq_len {seq_len} and its '
            'last target; give more text or a smaller seq_len.'
        )
