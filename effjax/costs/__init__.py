"""What a run costs: FLOPs, seconds, memory, joules.

  `Ledger`        what was computed: FLOPs per part, tokens, examples, steps, waste; saved.
  `StepCost`      what one compiled step costs, known before it runs; the ledger adds these up.
  `Clock`         where the seconds went: compile, train, eval, checkpoint, data, other; saved.
  `walk`, `walk_jaxpr`   FLOPs that a function really executes (rematerialisation included).
  `peak_flops`, `mfu`    peak of a device, and utilisation with its convention in words.
  `meters`, `EnergyMeter`, `compiled_memory`   memory and energy; None where nothing measures it.
  `reference`     seconds of a step on a named device, by a table that was measured once.
  `formulas`      closed forms: 6ND, device-hours, bytes of a KV cache.
  `svg`           line plots as SVG text, for reports.

The convention of what counts is written in docs/costs.md. Nothing here knows a model family: parts
state their own `core.cost.Cost`. `costs` imports `core` only, and formulas of
`kernels/<op>/cost.py` by name, on look-up (`flops.KERNELS`).
"""

from typing import TYPE_CHECKING, Any

from effjax.costs.clock import KINDS, Clock
from effjax.costs.ledger import Ledger, StepCost
from effjax.costs.meters import EnergyMeter, compiled_memory
from effjax.costs.peaks import mfu, peak_flops

if TYPE_CHECKING:
    from effjax.costs.flops import WalkResult, walk, walk_jaxpr

__all__ = [
    'KINDS', 'Clock', 'EnergyMeter', 'Ledger', 'StepCost', 'WalkResult', 'compiled_memory', 'mfu',
    'peak_flops', 'walk', 'walk_jaxpr',
]  # fmt: skip

_NEEDS_JAX = ('WalkResult', 'walk', 'walk_jaxpr')


def __getattr__(name: str) -> Any:
    if name in _NEEDS_JAX:
        from effjax.costs import flops

        return getattr(flops, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
