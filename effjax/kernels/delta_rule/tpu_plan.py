"""How the TPU kernels cut up a call: tokens of a chunk, heads of a grid step, their FLOPs.

Plain Python, as `cost` is.
"""

import dataclasses

from effjax.kernels.linear_recurrence.tpu_plan import BUDGET, LANES

CHUNK = 128  # longest chunk: running sums of decays are exact up to there
LEAF = 16  # tokens of the blocks of a system that are inverted row by row; whole tiles


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up.

    Attributes:
      size: tokens of a chunk C, a leaf doubled some times.
      heads: H.
      block: heads of one grid step.
      key_dim, value_dim: K and V, in whole lanes.
    """

    size: int
    heads: int
    block: int
    key_dim: int
    value_dim: int

    @property
    def steps(self) -> int:
        """Grid steps that the heads of one chunk take."""
        return self.heads // self.block

    @property
    def inverse_flops(self) -> int:
        """FLOPs of merging the leaves' inverses into a chunk's: 2 products a doubling."""
        return 2 * self.size**3 * ((self.size // LEAF).bit_length() - 1)

    @property
    def forward_flops(self) -> int:
        """FLOPs of the products of one chunk of a row, all heads."""
        inside = 2 * self.size**2 * (2 * self.key_dim + 2 * self.value_dim)
        across = 6 * self.size * self.key_dim * self.value_dim
        return self.heads * (inside + across + self.inverse_flops)

    @property
    def backward_flops(self) -> int:
        """The same of the backward pass."""
        inside = 2 * self.size**2 * (6 * self.key_dim + 5 * self.value_dim)
        across = 14 * self.size * self.key_dim * self.value_dim
        return self.heads * (inside + across + self.inverse_flops)


def chunk_size(length: int, key_dim: int, value_dim: int, itemsize: int) -> int | None:
    """Returns the tokens of a chunk, or None where not even the shortest fits into VMEM.

    128 tokens fill the MXU's 128 columns and are as many as exact running sums allow; a shorter row
    is one chunk. While the backward step of one head would take more VMEM than its share
    (`vmem_bytes`), the chunk is halved, down to a leaf.
    """
    size = LEAF
    while size < min(CHUNK, length):
        size *= 2
    while vmem_bytes(size, 1, key_dim, value_dim, itemsize) > BUDGET:
        size //= 2
        if size < LEAF:
            return None
    return size


def vmem_bytes(size: int, block: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes of VMEM of one backward grid step of `block` heads, which takes the most.

    Twice, since the next step's are fetched meanwhile: the chunk's inputs and gradients, the state
    and its gradients at both ends of the row. Once: the running gradient and what is formed.
    """
    state = 4 * key_dim * value_dim
    tokens = size * (4 * key_dim + 3 * value_dim) * itemsize  # q, k, v, do; dq, dk, dv
    formed = 4 * size * (14 * size + 8 * key_dim + 10 * value_dim) + 3 * state
    return block * (2 * (tokens + 3 * state) + state + formed)


def plan_for(length: int, heads: int, key_dim: int, value_dim: int, itemsize: int) -> Plan | None:
    """Returns how to cut up rows of `length` tokens, or None where they cannot fit."""
    key_dim, value_dim = (-(-x // LANES) * LANES for x in (key_dim, value_dim))
    size = chunk_size(length, key_dim, value_dim, itemsize)
    if size is None:
        return None
    # Two heads a step: what one eliminates row by row can run beside the other's products.
    two = not heads % 2 and vmem_bytes(size, 2, key_dim, value_dim, itemsize) <= BUDGET
    return Plan(size, heads, 2 if two else 1, key_dim, value_dim)
