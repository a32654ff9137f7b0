"""How the TPU kernels cut up a call: tokens of a chunk, heads of a grid step, their FLOPs.

Plain Python, as `cost` is.
"""

import dataclasses

LANES = 128
ROWS = 16  # a tile of bfloat16 has 16 rows, one of float32 8
CHUNK = 128  # longest chunk: running sums of decays are exact up to there
LEAF = 8  # tokens of the blocks whose pairs are formed one by one with vector decays
BUDGET = 24 * 2**20  # bytes of VMEM that a grid step may take, by `vmem_bytes`


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up.

    Attributes:
      size: tokens of a chunk C.
      heads: value heads H.
      groups: query and key heads G.
      block: value heads of one grid step.
      key_dim, value_dim: K and V, in whole lanes.
      decay: 'none', 'scalar' or 'vector'.
      strict: a token sees only what lies before it.
    """

    size: int
    heads: int
    groups: int
    block: int
    key_dim: int
    value_dim: int
    decay: str
    strict: bool

    @property
    def group_block(self) -> int:
        """Query heads of one grid step."""
        return max(1, self.block * self.groups // self.heads)

    @property
    def steps(self) -> int:
        """Grid steps that the heads of one chunk take."""
        return self.heads // self.block

    @property
    def forward_flops(self) -> int:
        """FLOPs of one chunk of a row, all heads."""
        size, state = self.size, self.key_dim * self.value_dim
        scored = self.steps * self.group_block * self.levels
        shared = size * size * (scored * self.key_dim + self.heads * self.value_dim)
        return 2 * shared + 4 * self.heads * size * state

    @property
    def backward_flops(self) -> int:
        """The same of the backward pass."""
        size, state = self.size, self.key_dim * self.value_dim
        scored = self.steps * self.group_block * self.levels
        shared = size * size * (3 * scored * self.key_dim + 2 * self.heads * self.value_dim)
        return 2 * shared + 8 * self.heads * size * state

    @property
    def levels(self) -> int:
        """Products of queries and keys a chunk: one for each halving with vector decays."""
        return (self.size // LEAF).bit_length() - 1 if self.decay == 'vector' else 1

    @property
    def sharing(self) -> int:
        """Neighbouring grid steps that read the same query heads."""
        return self.steps * self.group_block // self.groups


def chunk_size(
    length: int, key_dim: int, value_dim: int, itemsize: int, *, vector: bool = False
) -> int | None:
    """Returns the tokens of a chunk, or None where not even the shortest fits into VMEM.

    128 tokens fill the MXU's 128 columns and are as many as exact running sums allow; a shorter row
    is one chunk. VMEM bounds it from above: the backward step of one head holds, twice each since
    the next step's are fetched meanwhile, the chunk's inputs and gradients, the state and its
    gradients at both ends of the row, and once the running gradient and some float32 arrays as
    large as the chunk's (`vmem_bytes`). While that is above 24 MiB of the 64 to 128 that a core
    has, the chunk is halved; below 16 tokens it is no whole tile. With vector decays a chunk is
    halved by the kernel too, so that it is 16 tokens doubled some times.
    """
    size = min(CHUNK, -(-length // ROWS) * ROWS)
    if vector:
        size = ROWS << (-(-size // ROWS) - 1).bit_length()
    while vmem_bytes(size, 1, key_dim, value_dim, itemsize, vector=vector) > BUDGET:
        size = size // 2 // ROWS * ROWS
        if not size:
            return None
    return size


def vmem_bytes(
    size: int, block: int, key_dim: int, value_dim: int, itemsize: int, *, vector: bool = False
) -> int:
    """Bytes of VMEM of one backward grid step of `block` heads, which takes the most."""
    state = 4 * key_dim * value_dim
    tokens = size * (4 * key_dim + 3 * value_dim) * itemsize  # q, k, v, do; dq, dk, dv
    formed = 4 * size * (6 * size + 4 * key_dim + 4 * value_dim) + 2 * state
    if vector:  # sums in two parts and their gradient, with and without the token itself
        tokens += 4 * size * 6 * key_dim
        formed += 4 * size * 12 * key_dim + 8 * key_dim**2
    return block * (2 * (tokens + 3 * state) + state + formed)


def plan_for(
    length: int,
    heads: int,
    groups: int,
    key_dim: int,
    value_dim: int,
    *,
    decay: str,
    strict: bool,
    itemsize: int,
) -> Plan | None:
    """Returns how to cut up rows of `length` tokens, or None where they cannot fit."""
    key_dim, value_dim = (-(-x // LANES) * LANES for x in (key_dim, value_dim))
    vector = decay == 'vector'
    groups = heads if vector else groups  # whoever calls repeats queries and keys
    size = chunk_size(length, key_dim, value_dim, itemsize, vector=vector)
    if size is None:
        return None
    shared = heads // groups
    # Several heads a step: one head's products are shorter than the step's own overhead.
    block = next(
        n
        for n in (4, 3, 2, 1)
        if not heads % n
        and (not n % shared or not shared % n)
        and (n == 1 or vmem_bytes(size, n, key_dim, value_dim, itemsize, vector=vector) <= BUDGET)
    )
    decay = 'scalar' if decay == 'head' else decay
    return Plan(size, heads, groups, block, key_dim, value_dim, decay, strict)
