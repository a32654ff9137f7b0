"""How the Hopper kernels cut up a call, and what their blocks of threads take.

Plain Python, as `cost` is.
"""

import dataclasses
from typing import Any

from effjax.kernels.linear_recurrence import hopper_plan
from effjax.kernels.linear_recurrence.hopper_plan import CHUNK, PART, SHARED, Walk, fitted

__all__ = ['CHUNK', 'KEYS', 'PART', 'SHARED', 'Plan', 'plan_for']

KEYS = 128  # widest keys: a chunk has a matrix of K x K


@dataclasses.dataclass(frozen=True)
class Plan(hopper_plan.Plan):
    """That of a linear recurrence whose state goes through a matrix for each chunk.

    Sums of log-decays are those that `read` sees: a token's own is added for its query.
    """

    @property
    def system_bytes(self) -> int:
        """Shared memory of a block of threads that forms what the walks read, without barriers."""
        return 2 * self.size * (7 * self.key_dim + 6 * self.size) + 4 * self.key_dim

    @property
    def gradients_bytes(self) -> int:
        """The same in the last kernel of the backward pass: 26 squares, one of them float32."""
        return 2 * PART**2 * (25 + 2) + 8 * PART

    def system_flops(self, *, save: bool) -> int:
        """FLOPs of one chunk of one head in that kernel; `save`: in the backward pass.

        Each of the 5 doublings after the first has two products, each of three products of halves.
        """
        keys = 2 + 4 * self.levels + 1 + 2 + 3 + save
        squares = 6 * (self.levels - 1) + 2 + save
        return (
            2
            * self.size
            * (self.size * (keys * self.key_dim + squares * self.size) + self.key_dim**2)
        )

    @property
    def forward_flops(self) -> int:
        """FLOPs of one chunk of a row, all heads."""
        walk = self.forward().flops(self.value_dim)
        return self.heads * (walk + self.system_flops(save=False))

    @property
    def solved_flops(self) -> int:
        """FLOPs of one chunk of one head in the kernel that forms what transitions read."""
        return 4 * self.size * self.value_dim * (self.size + self.key_dim)

    @property
    def gradients_flops(self) -> int:
        """The same in the last kernel: twice, a side of queries and keys each.

        Each part of the keys has the pairs' gradients formed anew, from all values.
        """
        parts, keys = self.key_dim // PART, self.size * self.key_dim
        pairs = 4 * parts * self.size * self.value_dim
        inside = keys * (3 * self.levels + 6)
        return 4 * self.size * (pairs + inside + 2 * self.key_dim * self.value_dim)

    @property
    def backward_flops(self) -> int:
        """FLOPs of the backward pass in one chunk of a row, all heads."""
        walk = self.values().flops(self.value_dim)
        around = self.system_flops(save=True) + self.solved_flops + self.gradients_flops
        return self.heads * (walk + around)

    def _walk(self, width: int, **facts: Any) -> Walk:
        return fitted(Walk(width, given=True, across=True, **facts))


def plan_for(heads: int, key_dim: int, value_dim: int) -> Plan | None:
    """Returns how to cut up a call, or None where keys are too wide."""
    key_dim, value_dim = (-(-x // PART) * PART for x in (key_dim, value_dim))
    if key_dim > KEYS:
        return None
    facts: dict[str, bool] = dict.fromkeys(('decays', 'vector', 'strict', 'staged'), True)
    return Plan(key_dim, value_dim, heads, heads, **facts)
