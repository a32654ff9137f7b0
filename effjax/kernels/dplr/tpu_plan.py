"""How the TPU kernels cut up a call: tokens of a chunk, heads of a grid step, their FLOPs.

Plain Python, as `cost` is.
"""

from effjax.kernels.delta_rule.tpu_plan import LEAF
from effjax.kernels.linear_recurrence import tpu_plan as recurrence
from effjax.kernels.linear_recurrence.tpu_plan import BUDGET, CHUNK, LANES


class Plan(recurrence.Plan):
    """How a call is cut up: as a recurrence with vector decays, with more to form in a chunk."""

    @property
    def _inverse(self) -> int:
        """FLOPs of merging the leaves' inverses into a chunk's: 2 products a doubling."""
        return 2 * self.size**3 * ((self.size // LEAF).bit_length() - 1)

    @property
    def forward_flops(self) -> int:
        """FLOPs of the products of one chunk of a row, all heads."""
        keys, values = self.key_dim, self.value_dim
        inside = 2 * self.size**2 * (4 * self.levels * keys + 4 * values)
        return self.heads * (inside + 8 * self.size * keys * values + self._inverse)

    @property
    def backward_flops(self) -> int:
        """The same of the backward pass."""
        keys, values = self.key_dim, self.value_dim
        inside = 2 * self.size**2 * (14 * self.levels * keys + 10 * values)
        return self.heads * (inside + 18 * self.size * keys * values + self._inverse)


def chunk_size(length: int, key_dim: int, value_dim: int, itemsize: int) -> int | None:
    """Returns the tokens of a chunk, or None where not even the shortest fits into VMEM.

    A leaf doubled some times, 128 tokens at most: as many as exact running sums allow. While the
    backward step of one head would take more VMEM than its share, it is halved.
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

    Twice, since the next step's are fetched meanwhile: the chunk's inputs and gradients, sums in
    two parts with and without the token itself, the state and its gradients at both ends of the
    row. Once: the running gradient and what is formed.
    """
    state = 4 * key_dim * value_dim
    tokens = size * (8 * key_dim + 3 * value_dim) * itemsize  # q, k, read, write, v, do; gradients
    tokens += 4 * size * 6 * key_dim
    formed = 4 * size * (16 * size + 24 * key_dim + 8 * value_dim) + 3 * state
    return block * (2 * (tokens + 3 * state) + state + formed)


def plan_for(length: int, heads: int, key_dim: int, value_dim: int, itemsize: int) -> Plan | None:
    """Returns how to cut up rows of `length` tokens, or None where they cannot fit."""
    key_dim, value_dim = (-(-x // LANES) * LANES for x in (key_dim, value_dim))
    size = chunk_size(length, key_dim, value_dim, itemsize)
    if size is None:
        return None
    # Two heads a step: what one eliminates row by row can run beside the other's products.
    two = not heads % 2 and vmem_bytes(size, 2, key_dim, value_dim, itemsize) <= BUDGET
    return Plan(
        size, heads, heads, 2 if two else 1, key_dim, value_dim, decay='vector', strict=True
    )
