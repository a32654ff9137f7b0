"""How the Hopper kernels cut up a call, and what their blocks of threads take.

Plain Python, as `cost` is.
"""

import dataclasses

CHUNK = 64  # tokens of a chunk: the rows of one warpgroup's product
TILE = 64  # columns of values, and of keys, that are worked on at once
SHARED = 232448  # bytes of shared memory that a block of threads may have
KEYS = 256  # widest keys whose state one warpgroup's registers hold beside a tile
VALUES = 512  # widest values that lie in shared memory beside the keys while a system is solved
ROWS = 5  # numbers a token: running sums of log-decays in two parts, decays to and from it, beta
_SPARE = 4096  # bytes of barriers and alignment


@dataclasses.dataclass(frozen=True)
class Walk:
    """One run of the sequential kernel over the chunks of all rows.

    Attributes:
      key_dim: K, a multiple of 64 up to 256.
      reverse: from the last chunk to the first, with the gradient of the state.
      save: what a backward pass needs is returned too.
      stages: chunks whose inputs are in shared memory.
      slots: chunks whose states are there.
      tile: columns of values that a block of threads has.
      size: tokens of a chunk.
    """

    key_dim: int
    reverse: bool = False
    save: bool = False
    stages: int = 2
    slots: int = 2
    tile: int = TILE
    size: int = CHUNK

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of threads, without barriers."""
        block = self.size * self.tile
        stage = 2 * self.size * 3 * self.key_dim + 2 * block + 4 * ROWS * self.size
        slot = 2 * self.key_dim * self.tile + 2 * block + (6 * block if self.reverse else 0)
        once = 2 * self.size**2 + (0 if self.reverse else 4 * block)
        return self.stages * stage + self.slots * slot + once

    def flops(self, value_dim: int) -> int:
        """FLOPs of one chunk of one head."""
        pairs = value_dim // self.tile * self.key_dim + value_dim
        return 2 * self.size * (self.size * pairs + 3 * self.key_dim * value_dim)


def fitted(walk: Walk) -> Walk:
    """Returns the same walk with as many chunks ahead as shared memory has room for."""
    for stages, slots in ((3, 2), (2, 2), (2, 1), (1, 1)):
        found = dataclasses.replace(walk, stages=stages, slots=slots)
        if found.shared_bytes + _SPARE <= SHARED:
            return found
    raise ValueError(f'delta_rule: {walk} fits no shared memory.')


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up.

    Attributes:
      key_dim, value_dim: K and V filled up to what the kernels take.
      heads: H.
      size: tokens of a chunk.
    """

    key_dim: int
    value_dim: int
    heads: int
    size: int = CHUNK

    @property
    def system_bytes(self) -> int:
        """Shared memory of a block of threads that solves one chunk's system."""
        return (
            2 * self.size * (self.key_dim + self.value_dim + 6 * self.size) + 4 * ROWS * self.size
        )

    @property
    def system_flops(self) -> int:
        """FLOPs of one chunk of one head: keys with keys, the inverse, and what it multiplies.

        Each of the 5 doublings after the first has two products, each of three products of halves.
        """
        return 2 * self.size**2 * (2 * self.key_dim + self.value_dim + 30 * self.size)

    def walk(self, **facts: bool) -> Walk:
        """A run of the sequential kernel."""
        return fitted(Walk(self.key_dim, **facts))

    @property
    def forward_flops(self) -> int:
        """FLOPs of the kernels in one chunk of a row, all heads."""
        return self.heads * (self.system_flops + self.walk().flops(self.value_dim))

    @property
    def backward_flops(self) -> int:
        """The same of the backward pass."""
        return self.heads * (self.walk(reverse=True).flops(self.value_dim) + self.gradient_flops)

    @property
    def gradient_flops(self) -> int:
        """FLOPs of what one chunk of one head takes once the walks are done."""
        again = self.key_dim // TILE * self.value_dim  # a product that each part of the keys redoes
        inside = 3 * self.value_dim + again + 4 * self.key_dim
        return 2 * self.size * (self.size * inside + 3 * self.key_dim * self.value_dim)


def plan_for(heads: int, key_dim: int, value_dim: int) -> Plan | None:
    """Returns how to cut up a call, or None where keys or values are too wide."""
    key_dim, value_dim = (-(-x // 64) * 64 for x in (key_dim, value_dim))
    if key_dim > KEYS or value_dim > VALUES:
        return None
    return Plan(key_dim, value_dim, heads)
