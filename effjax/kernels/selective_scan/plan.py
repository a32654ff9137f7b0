"""How the kernels cut up a call.

Plain Python, as `cost` is.
"""

import dataclasses

LANES = 128  # of a TPU's registers
ROWS = 16  # a tile of bfloat16 has 16 rows, one of float32 8
STATES = {'pallas_tpu': 128, 'pallas_gpu': 32}  # at most, of a channel
CHUNK = 128  # tokens; the maps of a chunk fill the lanes
_STATE = 8192  # elements of a block's states: with 128 tokens' of them 4 MiB of VMEM, 8 at the most

ROWS_SHARED = 128  # states that a warpgroup's backward pass keeps of each channel, twice 64 KiB


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up.

    Attributes:
      size: tokens of a chunk, of which one state each goes to memory.
      width: channels of a block, in whole lanes.
      states: of a channel, filled up to whole registers.
    """

    size: int
    width: int
    states: int


def tpu_plan(length: int, channels: int, states: int) -> Plan:
    """Returns the blocks of a call; tokens, channels and states are filled up to whole ones."""
    size = min(CHUNK, -(-length // ROWS) * ROWS)
    states = -(-states // 8) * 8
    lanes = -(-channels // LANES)
    most = max(1, _STATE // (states * LANES))
    return Plan(size, LANES * next(n for n in range(most, 0, -1) if not lanes % n), states)


def hopper_plan(length: int, channels: int, states: int, rows: int = ROWS_SHARED) -> Plan:
    """The same for Hopper GPUs: 128 channels, and as many tokens as have `rows` states."""
    del length, channels
    states = -(-states // 16) * 16
    return Plan(rows // states, LANES, states)


PLANS = {'pallas_tpu': tpu_plan, 'pallas_gpu': hopper_plan}
