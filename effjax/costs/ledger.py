"""`Ledger`: what a run has computed, part by part and stage by stage, saved in the checkpoint.

Model FLOPs follow the model's own `Cost`s (docs/costs.md): a training step is three times the
forward pass, anything that only runs forward is once. All FLOPs and counts are Python integers, so
that sums are exact at any size and a restored ledger goes on with the very same numbers.

Three things stay apart from the budget: the optimizer's arithmetic, evaluation, and work that was
lost to a kill and done again (`wasted`).
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from effjax.core.cost import Cost

UNITS = (
    'steps', 'tokens', 'examples', 'model_flops', 'hardware_flops', 'seconds', 'reference_seconds',
    'joules',
)  # fmt: skip
_COUNTS = ('steps', 'examples', 'tokens', 'tokens_computed', 'optimizer_flops')
_EVAL = 'eval'
# What the ledger of another run counts towards this one's budget.
OF_SOURCE = (
    'tokens', 'examples', 'tokens_computed', 'optimizer_flops', 'model_flops', 'hardware_flops',
    'reference_seconds',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one call of a compiled step costs; known before it runs.

    Attributes:
      parts: part of the model -> model FLOPs charged (backward pass included, where there is one).
      hardware_flops: FLOPs executed (`effjax.costs.walk`), None where they are not known.
      optimizer_flops: arithmetic of the optimizer, a line of its own.
      examples: rows or images.
      tokens: tokens seen.
      tokens_computed: positions computed on: dropped tokens excluded, padding included.
      reference_seconds: time on a reference machine by a calibration table, None without one.
    """

    parts: Mapping[str, float]
    hardware_flops: float | None = None
    optimizer_flops: float = 0.0
    examples: int = 0
    tokens: int = 0
    tokens_computed: int = 0
    reference_seconds: float | None = None

    @property
    def model_flops(self) -> int:
        """Model FLOPs of all parts."""
        return sum(round(flops) for flops in self.parts.values())

    @classmethod
    def train(cls, costs: Mapping[str, Cost], **rest: Any) -> 'StepCost':
        """Returns the cost of a training step: forward and backward, 3 x each part's forward."""
        return cls({part: cost.train_flops for part, cost in costs.items()}, **rest)

    @classmethod
    def forward(cls, costs: Mapping[str, Cost], **rest: Any) -> 'StepCost':
        """Returns the cost of a pass without gradients."""
        return cls({part: cost.model_flops for part, cost in costs.items()}, **rest)


class Ledger:
    """Counts of one run; they only ever grow."""

    def __init__(self) -> None:
        self._stages: dict[str, dict[str, Any]] = {}
        self._eval = _passes()
        self._skipped = 0
        self._sources: dict[str, dict[str, Any]] = {}
        self._wasted: dict[str, Any] = {
            'steps': 0, 'tokens': 0, 'model_flops': 0, 'hardware_flops': 0, 'seconds': 0.0,
        }  # fmt: skip

    def add_step(self, cost: StepCost, *, stage: str = '') -> None:
        """Charges one training step to a stage (by name), whether or not its update is used."""
        entry = self._stage(stage)
        entry['steps'] += 1
        entry['examples'] += cost.examples
        entry['tokens'] += cost.tokens
        entry['tokens_computed'] += cost.tokens_computed
        entry['optimizer_flops'] += round(cost.optimizer_flops)
        entry['hardware_flops'] = _plus(entry['hardware_flops'], cost.hardware_flops)
        entry['reference_seconds'] = _add(entry['reference_seconds'], cost.reference_seconds)
        for part, flops in cost.parts.items():
            entry['parts'][part] = entry['parts'].get(part, 0) + round(flops)

    def add_skipped(self, steps: int = 1) -> None:
        """Counts steps, already charged, whose update was thrown away (an overflow of fp16)."""
        self._skipped += steps

    def add_forward(self, cost: StepCost, *, purpose: str, stage: str = '') -> None:
        """Charges a pass without gradients: a teacher, a probe, a scoring pass, an evaluation.

        Everything but the purpose 'eval' counts towards the budget and the run's model FLOPs.
        Its tokens and examples stay with the purpose, since nothing was trained on them.
        """
        entry = self._eval
        if purpose != _EVAL:
            entry = self._stage(stage)['forward'].setdefault(purpose, _passes())
        entry['passes'] += 1
        entry['tokens'] += cost.tokens
        entry['examples'] += cost.examples
        entry['model_flops'] += cost.model_flops
        entry['hardware_flops'] = _plus(entry['hardware_flops'], cost.hardware_flops)

    def add_source(
        self, name: str, totals: Mapping[str, Any], *, seconds: float = 0.0, charged: bool
    ) -> None:
        """Books another run whose weights this one uses.

        Args:
          name: what this run calls it, such as 'init_from' or 'teacher'.
          totals: `totals()` of that run's ledger, as far as its checkpoint.
          seconds: its training time, where the budget may count it.
          charged: whether it counts towards this run's budget. Its steps never do: steps are this
            run's own.
        """
        keys = ('steps', *OF_SOURCE)
        self._sources[name] = {
            **{key: totals.get(key) for key in keys}, 'seconds': seconds, 'charged': charged,
        }  # fmt: skip

    @property
    def source_seconds(self) -> float:
        """Training seconds of the sources that are charged."""
        return sum(source['seconds'] for source in self._charged())

    def add_wasted_steps(
        self,
        steps: int,
        *,
        tokens: int = 0,
        model_flops: float = 0,
        hardware_flops: float = 0,
        seconds: float = 0.0,
    ) -> None:
        """Books steps that a kill makes the run repeat; they are no progress."""
        self._wasted['steps'] += steps
        self._wasted['tokens'] += tokens
        self._wasted['model_flops'] += round(model_flops)
        self._wasted['hardware_flops'] += round(hardware_flops)
        self._wasted['seconds'] += seconds

    def add_waste_since(self, last: Mapping[str, Any], *, seconds: float = 0.0) -> int:
        """Books what lies between this restored ledger and the last row a killed run wrote.

        Args:
          last: the last complete row of metrics.jsonl: `step`, `tokens`, `model_flops`,
            `hardware_flops`, `seconds`, all cumulative.
          seconds: the training seconds of the restored clock.

        Returns:
          How many steps were lost.
        """
        lost = max(0, int(last.get('step', 0)) - self.steps)
        if lost:
            self.add_wasted_steps(
                lost,
                tokens=max(0, int(last.get('tokens', 0)) - self.tokens),
                model_flops=max(0, last.get('model_flops', 0) - self.model_flops),
                hardware_flops=max(
                    0, (last.get('hardware_flops') or 0) - (self.hardware_flops or 0)
                ),
                seconds=max(0.0, last.get('seconds', 0.0) - seconds),
            )
        return lost

    @property
    def wasted(self) -> dict[str, Any]:
        """What kills made the run repeat."""
        return dict(self._wasted)

    def take_waste(self, booked: Mapping[str, Any]) -> None:
        """Takes up `wasted` of a ledger that was lost after it booked more than this one."""
        self._wasted = {k: max(have, booked.get(k, 0)) for k, have in self._wasted.items()}

    @property
    def steps(self) -> int:
        """Training steps done."""
        return self._sum('steps')

    def steps_of(self, stage: str) -> int:
        """Returns the training steps done in a stage."""
        return self._stages[stage]['steps'] if stage in self._stages else 0

    @property
    def tokens(self) -> int:
        """Tokens trained on, charged sources included."""
        return self._sum('tokens') + self._from_sources('tokens')

    @property
    def examples(self) -> int:
        """Examples trained on, charged sources included."""
        return self._sum('examples') + self._from_sources('examples')

    @property
    def model_flops(self) -> int:
        """Model FLOPs of the budget: training steps, charged forward passes and sources."""
        own = sum(_model_flops(entry) for entry in self._stages.values())
        return own + self._from_sources('model_flops')

    @property
    def hardware_flops(self) -> int | None:
        """FLOPs executed for the same, or None where some are not known."""
        out = _hardware_flops(self._stages.values())
        for source in self._charged():
            out = _plus(out, source['hardware_flops'])
        return out

    @property
    def computed(self) -> tuple[int, int | None]:
        """(model, hardware) FLOPs as charged, without those that other runs have computed."""
        own = list(self._stages.values())
        return sum(map(_model_flops, own)), _hardware_flops(own)

    @property
    def reference_seconds(self) -> float | None:
        """Seconds on the reference machine, or None where some step was not charged by a table."""
        out: float | None = 0.0
        for entry in self._stages.values():
            out = _add(out, entry['reference_seconds'])
        for source in self._charged():
            out = _add(out, source['reference_seconds'])
        return out if self._stages or self._charged() else None

    def totals(self) -> dict[str, Any]:
        """Returns the sums that summary.json shows, with `parts`, `forward` and `stages`."""
        entries = list(self._stages.values())
        forward = ({k: v['model_flops'] for k, v in e['forward'].items()} for e in entries)
        return {
            **{key: self._sum(key) + self._from_sources(key) for key in _COUNTS},
            'skipped': self._skipped,
            'model_flops': self.model_flops,
            'hardware_flops': self.hardware_flops,
            'reference_seconds': self.reference_seconds,
            'parts': _merge(entry['parts'] for entry in entries),
            'forward': _merge(forward),
            'eval': dict(self._eval),
            'wasted': dict(self._wasted),
            'sources': copy.deepcopy(self._sources),
            'stages': {
                name: {
                    **{key: entry[key] for key in _COUNTS},
                    'model_flops': _model_flops(entry),
                    'hardware_flops': _hardware_flops([entry]),
                }
                for name, entry in self._stages.items()
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, as JSON can hold it; `from_dict` restores it exactly."""
        return copy.deepcopy(
            {
                'stages': self._stages,
                'eval': self._eval,
                'skipped': self._skipped,
                'wasted': self._wasted,
                'sources': self._sources,
            }
        )

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> 'Ledger':
        """Returns the ledger that `to_dict` saved."""
        ledger = cls()
        saved = copy.deepcopy(dict(saved))
        ledger._stages = {  # a ledger saved before reference time existed knows none
            name: {**entry, 'reference_seconds': entry.get('reference_seconds')}
            for name, entry in saved['stages'].items()
        }
        ledger._eval = saved['eval']
        ledger._skipped = saved['skipped']
        ledger._wasted = saved['wasted']
        ledger._sources = saved.get('sources', {})
        return ledger

    def _stage(self, name: str) -> dict[str, Any]:
        if name not in self._stages:
            counts = dict.fromkeys(_COUNTS, 0)
            self._stages[name] = {
                **counts,
                'hardware_flops': 0,
                'reference_seconds': 0.0,
                'parts': {},
                'forward': {},
            }
        return self._stages[name]

    def _sum(self, key: str) -> int:
        return sum(entry[key] for entry in self._stages.values())

    def _charged(self) -> list[dict[str, Any]]:
        return [source for source in self._sources.values() if source['charged']]

    def _from_sources(self, key: str) -> int:
        if key not in OF_SOURCE:
            return 0
        return sum(round(source[key] or 0) for source in self._charged())


def _passes() -> dict[str, Any]:
    return {'passes': 0, 'tokens': 0, 'examples': 0, 'model_flops': 0, 'hardware_flops': 0}


def _plus(total: int | None, more: float | None) -> int | None:
    """Adds; None (not known) stays None, so that a sum is never silently too small."""
    return None if total is None or more is None else total + round(more)


def _add(total: float | None, more: float | None) -> float | None:
    """As `_plus`, for seconds."""
    return None if total is None or more is None else total + more


def _model_flops(entry: Mapping[str, Any]) -> int:
    extra = sum(passes['model_flops'] for passes in entry['forward'].values())
    return sum(entry['parts'].values()) + extra


def _hardware_flops(entries: Iterable[Mapping[str, Any]]) -> int | None:
    out: int | None = 0
    for entry in entries:
        out = _plus(out, entry['hardware_flops'])
        for passes in entry['forward'].values():
            out = _plus(out, passes['hardware_flops'])
    return out


def _merge(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for table in tables:
        for key, value in table.items():
            out[key] = out.get(key, 0) + value
    return out
