"""Masks said in words: who may attend to whom, as a dense mask and as blocks of keys to gather.

One `MaskSpec` gives both. `allowed` is a formula on places in order, for numpy and jax arrays
alike; `plan` lists, for each block of queries, the blocks of keys that hold an allowed pair,
without looking at all pairs. Places count from the document's beginning.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

SMALLEST, LARGEST = 16, 128  # tokens of a block that `plan` makes, where the mask names none
FEW = 16  # global tokens of a document that each query gathers for itself in a packed row


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """A mask said in words, which kernels can use to skip work.

    Query i and key j may attend where j is near to i, or one of them is global, or j is in one of
    i's random blocks; and, with `causal`, j <= i. Near is what `window`, `segment` and `stride`
    all allow; without any of them, and without globals and random blocks, it is everything.

    Attributes:
      causal: query i sees keys j <= i.
      window: |i - j| < window; with `block`, the same for the numbers of their blocks.
      block: tokens of a block, for `window` and `random`.
      segment: i and j lie in one segment of so many tokens.
      stride: i - j is a multiple of it.
      offset: with `stride`, only the tokens with this remainder see and are seen.
      global_tokens: so many first tokens see all and are seen by all (Longformer).
      last_tokens: so many last tokens too; not with `causal`.
      random: blocks that each block of queries sees beside the near ones, drawn by a hash of
        `seed` (BigBird); with `causal`, of those before.
      seed: of the random blocks.
      table: the random blocks themselves, a tuple for each block of queries, for sequences
        without documents; `random` is then their largest number.
      branches: masks whose softmaxes are mixed by their denominators (LongNet), so that a pair
        counts as often as they allow it; beside them only `causal`, the same in all, is said.
    """

    causal: bool = True
    window: int | None = None
    block: int | None = None
    segment: int | None = None
    stride: int | None = None
    offset: int | None = None
    global_tokens: int = 0
    last_tokens: int = 0
    random: int = 0
    seed: int = 0
    table: tuple[tuple[int, ...], ...] | None = None
    branches: tuple['MaskSpec', ...] = ()

    def __post_init__(self):
        for name in ('window', 'block', 'segment', 'stride'):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f'attention: {name} of a mask is at least 1, not {size}.')
        if min(self.global_tokens, self.last_tokens, self.random) < 0:
            raise ValueError(
                'attention: a mask has no fewer than 0 global tokens or random blocks.'
            )
        if self.random and self.block is None:
            raise ValueError('attention: random blocks need block, the number of their tokens.')
        if self.causal and self.last_tokens:
            raise ValueError(
                'attention: last tokens are seen by all, which causal forbids; use global_tokens.'
            )
        if self.stride is not None and self.block is not None:
            raise ValueError('attention: a mask has either block or stride, not both.')
        if self.offset is not None and not 0 <= self.offset < (self.stride or 0):
            raise ValueError(f'attention: offset is from 0 to stride - 1, not {self.offset}.')
        said = (self.window, self.block, self.segment, self.stride, self.table)
        counts = self.global_tokens + self.last_tokens + self.random
        if self.branches and (any(x is not None for x in said) or counts):
            raise ValueError('attention: a mask of branches says nothing beside them but causal.')
        if any(branch.causal != self.causal or branch.branches for branch in self.branches):
            raise ValueError('attention: branches are as causal as their mask, without branches.')

    def words(self) -> str:
        """Returns what the mask says, for a run's record."""
        if self.branches:
            return ' + '.join(branch.words() for branch in self.branches)
        said = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != 'table'
        }
        unsaid = {'causal', 'branches'} | {n for n in said if said[n] is None}
        unsaid |= {n for n in ('global_tokens', 'last_tokens', 'random', 'seed') if not said[n]}
        named = [f'{name} {value}' for name, value in said.items() if name not in unsaid]
        return ', '.join(['causal' if self.causal else 'both sides', *named])

    @property
    def plain(self) -> bool:
        """Whether it is causal, a causal window, or full: what needs no plan."""
        plain = MaskSpec(self.causal, self.window if self.causal else None)
        return self == plain

    @property
    def absolute(self) -> bool:
        """Whether places matter, not only their differences."""
        counted = self.block or self.segment or self.global_tokens or self.last_tokens
        apart = self.offset is not None or any(branch.absolute for branch in self.branches)
        return bool(counted or apart)

    @property
    def ahead(self) -> bool:
        """Whether a document's length matters."""
        alone = self.last_tokens or (self.random and not self.causal)
        return bool(alone) or any(branch.ahead for branch in self.branches)

    @property
    def reach(self) -> int | None:
        """Near pairs are all less than this apart; None: some are further apart than that."""
        if self.branches:
            each = [branch.reach for branch in self.branches]
            return None if None in each else max(reach or 0 for reach in each)
        if self.random:
            return None
        limits = [self.window * (self.block or 1)] if self.window else []
        limits += [self.segment] if self.segment else []
        nothing_near = self.stride is None and (self.global_tokens or self.last_tokens)
        return min(limits, default=0 if nothing_near else None)

    def packed(self) -> 'MaskSpec | None':
        """Returns a mask by places in a row that holds the near pairs of its documents, or None.

        Documents begin anywhere, so that a row's plan can rest on distances only: a pair of one
        segment is less than a segment apart, whoever begins it. None where distances say nothing,
        and where the mask names tokens by their place in a document in a way that no static plan
        can find: random blocks, last tokens, and tokens that see all, whose number in a row grows
        with that of its documents. First tokens that are only seen are not part of the returned
        mask: a query finds those of its document by its own place (at most `FEW`).
        """
        if self.branches:
            each = [branch.packed() for branch in self.branches]
            found = tuple(branch for branch in each if branch is not None)
            return MaskSpec(self.causal, branches=found) if len(found) == len(each) else None
        see_all = self.last_tokens or (self.global_tokens and not self.causal)
        if self.random or see_all or self.global_tokens > FEW:
            return None
        if self.reach is None:
            return None if self.stride is None else MaskSpec(self.causal, stride=self.stride)
        return MaskSpec(self.causal, max(1, self.reach), stride=self.stride)

    def allowed(self, i: Any, j: Any, length: Any = None) -> Any:
        """Returns which pairs may attend, bool, of places that broadcast against each other.

        Args:
          i: places of queries, numpy or jax.
          j: places of keys.
          length: tokens of their document, for last tokens and for random blocks that may lie
            ahead.
        """
        if self.branches:
            return self.count(i, j, length) > 0
        out = self._near(i, j)
        if self.global_tokens:
            out = out | (j < self.global_tokens) | (i < self.global_tokens)
        if self.last_tokens:
            out = out | (j >= length - self.last_tokens) | (i >= length - self.last_tokens)
        if self.random:
            assert self.block is not None
            rows, columns = i // self.block, j // self.block
            for k in range(self.random):
                out = out | (columns == self.drawn(rows, k, length))
        return out & (j <= i) if self.causal else out

    def count(self, i: Any, j: Any, length: Any = None) -> Any:
        """Returns how often pairs count, for places as `allowed` takes them."""
        return sum(1 * branch.allowed(i, j, length) for branch in self.branches or (self,))

    def _near(self, i: Any, j: Any) -> Any:
        limited = self.window or self.segment or self.stride
        out = (i == i) & (j == j) if limited or not (self.global_tokens or self.random) else i != i
        out = out & (j == j)
        if self.window is not None:
            a, b = (i, j) if self.block is None else (i // self.block, j // self.block)
            out = out & (a - b < self.window) & (b - a < self.window)
        if self.segment is not None:
            out = out & (i // self.segment == j // self.segment)
        if self.stride is not None:
            out = out & ((i - j) % self.stride == 0)
        if self.offset is not None:
            out = out & (i % self.stride == self.offset)
        return out

    def drawn(self, row: Any, k: int, length: Any) -> Any:
        """Returns the k-th random block of blocks of queries, for documents of a length."""
        if self.table is not None:
            widest = [(r + (-1,) * self.random)[k] for r in self.table]
            # Counted out instead of looked up, so that it serves numpy and jax arrays alike.
            return sum((row == n) * (block + 1) for n, block in enumerate(widest)) - 1
        assert self.block is not None
        x = row.astype('uint32') * np.uint32(2654435761) + np.uint32((self.seed * 97 + k) % 2**32)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        x = x ^ (x >> np.uint32(16))
        if self.causal:
            before = row - (self.window or 1) + 1  # blocks that lie behind the near ones
            count = before * (before > 0) + (before <= 0)
        else:
            count = -(-length // self.block) + 0 * row
        return (x % count.astype('uint32')).astype('int32')

    def dense(self, length: int) -> np.ndarray:
        """Returns the mask of one document, bool [T, T]: the truth that plans are held to."""
        place = np.arange(length)
        return self.allowed(place[:, None], place[None, :], length)

    def size(self, length: int) -> int:
        """Returns the tokens of a block of a plan."""
        wanted = self.block or self.window or self.segment or LARGEST
        if self.stride is not None:
            wanted = -(-wanted // self.stride)
        wanted = wanted if self.block else max(SMALLEST, min(LARGEST, wanted))
        return min(wanted, length)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What to gather for the queries of one mask over T tokens.

    Attributes:
      order: int [N C], the tokens in the order in which they are cut into blocks of C, those
        left out that see and are seen by none; -1 beyond.
      table: int [N, M], the blocks of keys that each block of queries sees; -1 for none.
      shared: int [G], tokens seen by all, which are gathered apart and read only there.
      rows: int [R], tokens that see all, computed apart.
    """

    order: np.ndarray
    table: np.ndarray
    shared: np.ndarray
    rows: np.ndarray

    @property
    def scored(self) -> int:
        """Pairs whose scores are computed."""
        size = len(self.order) // len(self.table)
        each = self.table.shape[1] * size + len(self.shared)
        return len(self.order) * each + len(self.rows) * int((self.order >= 0).sum())


@functools.lru_cache(maxsize=64)
def plan(spec: MaskSpec, length: int) -> Plan:
    """Returns the plan of a mask over a document of `length` tokens."""
    size, step = spec.size(length), spec.stride or 1
    parts = range(min(step, length)) if spec.offset is None else [spec.offset]
    order = np.concatenate([np.arange(r, length, step) for r in parts])
    blocks = max(1, -(-len(order) // size))
    where = np.full(length, -1)
    where[order] = np.arange(len(order))
    first, last = _near_range(spec, order, length)
    first, last = where[first] // size, where[last] // size
    limited = spec.window or spec.segment or spec.stride
    nothing_near = not limited and (spec.global_tokens or spec.last_tokens or spec.random)
    seen: list[set[int]] = []
    for n in range(blocks):
        mine = slice(n * size, min((n + 1) * size, len(order)))
        pairs = set() if nothing_near else set(zip(first[mine], last[mine], strict=True))
        seen.append({j for a, b in pairs for j in range(a, b + 1)})
        if spec.random:
            row = np.array([order[n * size] // size])
            drawn = {int(spec.drawn(row, k, np.array([length]))[0]) for k in range(spec.random)}
            seen[n] |= {j for j in drawn if 0 <= j < blocks and not (spec.causal and j > n)}
    most = max([1, *map(len, seen)])
    table = np.full((blocks, most), -1)
    for n, s in enumerate(seen):
        table[n, : len(s)] = sorted(s)
    padded = np.full(blocks * size, -1)
    padded[: len(order)] = order
    ends = np.arange(max(0, length - spec.last_tokens), length)
    shared = np.union1d(np.arange(min(spec.global_tokens, length)), ends).astype(int)
    return Plan(padded, table, shared, shared[:0] if spec.causal else shared)


def _near_range(spec: MaskSpec, i: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last token that is near to each token of i and differs by strides of it."""
    low, high = np.zeros_like(i), np.full_like(i, length - 1)
    if spec.window is not None and spec.block is None:
        low, high = i - spec.window + 1, i + spec.window - 1
    elif spec.window is not None:
        block = i // spec.block
        low = (block - spec.window + 1) * spec.block
        high = (block + spec.window) * spec.block - 1
    if spec.segment is not None:
        begin = i // spec.segment * spec.segment
        low, high = np.maximum(low, begin), np.minimum(high, begin + spec.segment - 1)
    low = np.maximum(low, 0)
    high = np.minimum(high, i if spec.causal else length - 1)
    step = spec.stride or 1
    return i - (i - low) // step * step, i + (high - i) // step * step


def scored(spec: MaskSpec, length: int, *, packed: bool = False) -> int:
    """Returns how many pairs the plans of a mask's branches score.

    Args:
      spec: the mask.
      length: tokens of a row.
      packed: rows hold several documents, in whose places the mask is said, and `spec.packed()`
        is not None.
    """
    if not packed:
        return sum(plan(branch, length).scored for branch in spec.branches or (spec,))
    total = 0
    for branch in spec.branches or (spec,):
        by_row = branch.packed()
        assert by_row is not None
        total += plan(by_row, length).scored + branch.global_tokens * length
    return total


@functools.lru_cache(maxsize=64)
def pairs(spec: MaskSpec, length: int) -> int:
    """Returns how many pairs a mask allows over a document of `length` tokens, by branch."""
    if spec.branches:
        return sum(pairs(branch, length) for branch in spec.branches)
    made, total = plan(spec, length), 0
    size, blocks = len(made.order) // len(made.table), len(made.table)
    apart = np.zeros(length + 1, bool)
    apart[made.rows] = True
    seen_apart = np.zeros(length + 1, bool)
    seen_apart[made.shared] = True
    by_block = made.order.reshape(blocks, size)
    for n in range(blocks):
        i = by_block[n][(by_block[n] >= 0) & ~apart[by_block[n]]]
        j = by_block[made.table[n][made.table[n] >= 0]].ravel()
        j = np.concatenate([j[(j >= 0) & ~seen_apart[j]], made.shared])
        total += int(spec.allowed(i[:, None], j[None, :], length).sum())
    return total + len(made.rows) * length
