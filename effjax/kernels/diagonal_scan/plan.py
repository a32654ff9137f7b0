"""How the kernels cut up a call.

Plain Python, as `cost` is.
"""

import dataclasses

LANES = 128  # of a TPU's registers, and threads of a warpgroup
ROWS = 16  # a tile of bfloat16 has 16 rows, one of float32 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rows are cut up.

    Attributes:
      size: tokens of a block, in whole tiles of 16.
      width: channels of a block, in whole lanes.
    """

    size: int
    width: int


# The longest blocks. On a TPU the backward pass holds five in float32, each twice: 5 MiB of VMEM,
# and twice that for complex numbers.
TPU = Plan(256, 512)
# On a GPU a channel a thread, so that there are as many warpgroups as possible: 128 for 8 rows of
# 2048 channels, where an H200 has 132 multiprocessors. With fewer, some have nothing to do; each of
# the others then moves a few times what is its share when all are busy.
GPU = Plan(16, 128)
# A warpgroup alone takes as long for its row as 128 of them side by side, where a parallel prefix
# gets faster with fewer channels. On an H200 it is faster with 16, real or complex, and by those
# times the kernels are from about 30 on.
FEWEST = 32
BLOCKS = {'pallas_tpu': TPU, 'pallas_gpu': GPU}
SHARED = 110 * 1024  # bytes of shared memory of a warpgroup's ring: two fit a multiprocessor


def plan_for(length: int, channels: int, most: Plan) -> Plan:
    """Returns blocks of about equal length, as few as the longest blocks allow.

    What a row and its channels lack to whole blocks is filled up, by less than 16 tokens a block
    and by less than 128 channels.
    """
    blocks = -(-length // most.size)
    size = -(-length // blocks)
    lanes = -(-channels // LANES)
    width = next(n for n in range(most.width // LANES, 0, -1) if not lanes % n)
    return Plan(-(-size // ROWS) * ROWS, width * LANES)


def stages_for(fetched: int, written: int) -> int:
    """Returns how many blocks a GPU's warpgroup has on their way at a time, at least 2.

    Args:
      fetched: bytes of one step's inputs.
      written: bytes of its results, which are held twice.
    """
    return max(2, min(8, (SHARED - 2 * written) // fetched))
