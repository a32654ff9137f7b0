"""What a model is told beside its own config: dtypes, execution and the run's sequence length."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.core.policy import Policy

# 'auto' unrolls a segment of at most this many blocks. On an H200 unrolled layers ran 14-18 %
# faster than scanned ones at 24 layers and compiled in 5 s; deeper, compile time and memory tell.
AUTO_UNROLL = 32


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a body runs, never what it computes.

    Attributes:
      layers: 'scan' (one compiled period in a loop), 'unroll', or 'auto': unroll up to
        `AUTO_UNROLL` blocks a segment, else scan.
      remat: what the backward pass recomputes: 'none'; 'dots' saves the results of products
        with weights and recomputes the rest; 'full' saves only the input of each period.
      attention: the implementation of attention; None picks the best.
    """

    layers: str = 'auto'
    remat: str = 'none'
    attention: str | None = None

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> 'Execution':
        """Returns the part of a config's execution block that models read."""
        return cls(layers=block['layers'], remat=block['remat'], attention=block['attention'])

    def unrolls(self, blocks: int) -> bool:
        """Says whether a segment of this many blocks runs unrolled."""
        if self.layers == 'auto':
            return blocks <= AUTO_UNROLL
        return self.layers == 'unroll'


@dataclasses.dataclass(frozen=True)
class Setup:
    """The first argument of every model's constructor.

    Attributes:
      policy: parameter and compute dtypes.
      execution: see `Execution`.
      seq_len: the run's sequence length; a model's longest sequence unless its config says more.
    """

    policy: Policy = dataclasses.field(default_factory=Policy)
    execution: Execution = dataclasses.field(default_factory=Execution)
    seq_len: int = 256
