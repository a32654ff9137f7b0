"""How the Hopper kernel cuts up a call, and what its blocks of threads take.

Plain Python, as `cost` is.
"""

import dataclasses
from typing import Any

CHUNK = 64  # tokens of a chunk: the rows of one warpgroup's product
SHARED = 232448  # bytes of shared memory that a block of threads may have
KEYS = 256  # widest state that one warpgroup's registers hold beside a tile
PART = 64  # columns of keys that are decayed at once where each decays by itself
SAVE = 2  # chunks between the states that are kept for the gradient of decays
BLOCKS = 132  # multiprocessors of a Hopper GPU: with fewer blocks of threads rows are cut
LEAST = 16  # chunks of a stretch that rows are cut into: fewer are gone through in no time


@dataclasses.dataclass(frozen=True)
class Walk:
    """One run of the kernel over the chunks of all rows.

    Attributes:
      key_dim: K, a multiple of 64 up to 256.
      tile: columns of v that a block of threads has, 64 or 128.
      reverse: from the last chunk to the first.
      decays: something decays.
      like: the outputs' products with another array are summed up.
      save: chunks between the states that are returned, 0 for none; 1 with `given`.
      readers: warpgroups that form outputs, 1 or 2; 0 where only the last state is wanted.
      stages: chunks whose inputs are in shared memory, a multiple of `readers`.
      slots: chunks whose states are there, likewise.
      staged: weights go through shared memory, not registers, into the second product.
      given: weights of pairs and what is kept of the state are read, with decays of single keys.
      across: so is a matrix that the state goes through beside that.
      size: tokens of a chunk.
    """

    key_dim: int
    tile: int = 64
    reverse: bool = False
    decays: bool = False
    like: bool = False
    save: int = 0
    readers: int = 2
    stages: int = 2
    slots: int = 2
    staged: bool = False
    given: bool = False
    across: bool = False
    size: int = CHUNK

    @property
    def rows(self) -> int:
        """Rows of the state that are updated at once."""
        return 64 if self.key_dim % 128 or self.tile > 64 else 128

    @property
    def registers(self) -> tuple[int, int, int]:
        """A thread's registers in a reader, with the state, and where inputs are brought in."""
        return (160, 168, 24) if self.readers == 2 else (240, 240, 24)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of threads, without barriers."""
        keys = (2 if self.readers else 1) * self.key_dim
        matrices = self.size * (keys + (2 if self.like else 1) * self.tile)
        stage = 2 * matrices + (16 * self.size if self.decays else 0)
        stage += (2 * self.size**2 + 4 * self.key_dim) if self.given else 0
        stage += 2 * self.key_dim**2 if self.across else 0
        staged = self.staged and not self.given
        reader = self.size * (2 * self.tile + 4 * self.like + 2 * staged * self.size)
        written = 2 * self.size * self.tile if self.decays else 0
        states = 2 * self.slots * self.key_dim * self.tile if self.readers else 0
        return self.stages * stage + self.readers * reader + written + states

    def borders(self, chunks: int) -> int:
        """States that are returned: at inner borders, or with weights given every chunk's."""
        if self.given:
            return chunks if self.save else 0
        return (chunks - 1) // self.save if self.save else 0

    def flops(self, value_dim: int) -> int:
        """FLOPs of one chunk of one head."""
        if not self.readers:
            return 2 * self.size * self.key_dim * value_dim
        scores = 0 if self.given else value_dim // self.tile * self.key_dim
        pairs = scores + value_dim
        across = 2 * self.key_dim**2 * value_dim if self.across else 0
        return 2 * self.size * (self.size * pairs + 2 * self.key_dim * value_dim) + across


def fitted(walk: Walk) -> Walk:
    """Returns the same walk with as many readers and chunks ahead as shared memory has room for.

    Two readers hide what one waits for; then further stages hide the way from global memory.
    """
    room = SHARED - 4096  # barriers, what the compiler takes for sums over lanes, alignment
    forms = [(2, 4, 2), (2, 2, 2), (1, 3, 2), (1, 2, 2), (1, 2, 1), (1, 1, 1)]
    if not walk.readers:
        forms = [(0, stages, 1) for stages in (4, 3, 2, 1)]
    for readers, stages, slots in forms:
        if readers == 2 and walk.key_dim * walk.tile > 128 * 64:
            continue  # the state takes the registers of the second reader
        found = dataclasses.replace(walk, readers=readers, stages=stages, slots=slots)
        if found.shared_bytes <= room:
            return found
    raise ValueError(f'linear_recurrence: {walk} fits no shared memory.')


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up.

    Attributes:
      key_dim, value_dim: K and V filled up to what the kernel takes.
      heads: value heads H.
      groups: query and key heads G.
      decays: something decays.
      vector: each dimension of keys by itself.
      strict: a token reads only what lies before it, up to which its own decay does not reach.
      resets: so that a document's first token has to be told to read nothing.
      stretches: that a row is cut into, which are walked side by side once the states between
        them are known.
      staged, size: see `Walk`.
    """

    key_dim: int
    value_dim: int
    heads: int
    groups: int
    decays: bool
    vector: bool = False
    strict: bool = False
    resets: bool = False
    stretches: int = 1
    staged: bool = False
    size: int = CHUNK

    @property
    def value_block(self) -> int:
        """Columns of V that the gradients of a chunk take at once."""
        return 64 if self.value_dim % 128 else 128

    @property
    def value_blocks(self) -> int:
        return self.value_dim // self.value_block

    @property
    def parts(self) -> int:
        """Parts of V, each a state's rows in the gradients of queries and keys."""
        return -(-self.value_dim // KEYS)

    def forward(self, *, save: bool = False) -> Walk:
        """The walk of the forward pass; `save`: decays have a gradient, for which states are kept.

        So in the other walks.
        """
        return self._walk(self.key_dim, save=self._save(save))

    def states(self, *, reverse: bool = False) -> Walk:
        """The walk that gives a stretch's last state alone."""
        return self._walk(self.key_dim, reverse=reverse, readers=0)

    def values(self, *, save: bool = False) -> Walk:
        """The backward walk that gives the gradient of the values and of states."""
        return self._walk(self.key_dim, reverse=True, save=self._save(save))

    def queries(self, *, reverse: bool, like: bool = False) -> Walk:
        """The walk that gives the gradient of queries, or `reverse` that of keys.

        `like`: decays have a gradient, which needs the products of both with what they belong to.
        """
        return self._walk(self.value_dim // self.parts, reverse=reverse, like=like)

    def _save(self, save: bool) -> int:
        return (1 if self.vector else SAVE) if save else 0

    def _walk(self, width: int, **facts) -> Walk:
        if self.vector:
            return fitted(Walk(width, given=True, **facts))
        return fitted(Walk(width, decays=self.decays, staged=self.staged, **facts))

    @property
    def levels(self) -> int:
        """Halvings of a chunk down to single tokens."""
        return self.size.bit_length() - 1

    @property
    def weights_flops(self) -> int:
        """FLOPs of one chunk of one head before a walk with weights given."""
        square = 2 * self.size**2 * self.key_dim
        # Scores and sums of decays a level, and their ends, and what tokens have of themselves.
        return square * (2 * self.levels + 3 + (not self.strict))

    @property
    def gradients_flops(self) -> int:
        """The same after both walks."""
        square = 2 * self.size**2 * self.key_dim
        values = 4 * self.size * self.value_dim * (self.size * self.key_dim // PART + self.key_dim)
        return square * (2 * self.levels + 2 + 4) + values

    @property
    def forward_flops(self) -> int:
        """FLOPs of one chunk of a row, all heads."""
        before = self.weights_flops if self.vector else self._between_flops
        return self.heads * (self.forward(save=False).flops(self.value_dim) + before)

    @property
    def _between_flops(self) -> int:
        """FLOPs of one chunk of one head for the states between stretches."""
        return self.states().flops(self.value_dim) if self.stretches > 1 else 0

    @property
    def backward_flops(self) -> int:
        """The same of the backward pass."""
        if self.vector:
            around = self.weights_flops + self.gradients_flops
            return self.heads * (self.values().flops(self.value_dim) + around)
        queries = self.parts * self.queries(reverse=False).flops(self.key_dim)
        values = self.values().flops(self.value_dim) + self._between_flops
        return self.heads * (values + 2 * queries)


def stretches(batch: int, length: int, heads: int, value_dim: int) -> int:
    """Returns into how many stretches rows are cut.

    Going over keys and values once more for the states between them, and over queries backwards,
    is about half of a walk; each doubling of the blocks of threads halves the time, as long as
    there are multiprocessors without one.
    """
    blocks, count = batch * heads * -(-value_dim // 64), 1
    chunks = -(-length // CHUNK)
    while 2 * count * blocks <= BLOCKS and chunks >= 2 * count * LEAST:
        count *= 2
    return count


def plan_for(
    heads: int, groups: int, key_dim: int, value_dim: int, *, decay: str, **facts: Any
) -> Plan | None:
    """Returns how to cut up a call, or None where a state is too large; facts are the plan's."""
    key_dim = -(-key_dim // 64) * 64
    if key_dim > KEYS:
        return None
    unit = 64 * -(-value_dim // KEYS)
    value_dim = -(-value_dim // unit) * unit
    decays, vector = decay != 'none', decay == 'vector'
    return Plan(key_dim, value_dim, heads, groups, decays, vector, **facts)
