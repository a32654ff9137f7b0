"""`Ledger`: what a run has computed, part by part and stage by stage, saved in the checkpoint.

Model FLOPs follow the model's own `Cost`s (docs/costs.md): a training step is three times the
forward pass, anything that only runs forward is once. All FLOPs and counts are Python integers, so
that sums are exact at any size and a restored ledger goes on with the very same numbers.

Three things stay apart from the budget: the optimizer's arithmetic, evaluation, and work that was
lost to a kill and done again (`wasted`).
"""

import copy
from collections.abc import Mapping
from typing import Any

from effjax.core.cost import Cost

UNITS = ('steps', 'tokens', 'examples', 'model_flops', 'seconds')
_COUNTS = ('steps', 'skipped', 'examples', 'tokens', 'tokens_computed')


class Ledger:
    """Counts of one run. Immutable history: entries are only ever added to."""

    def __init__(self) -> None:
        self._stages: list[dict[str, Any]] = []
        self._eval = _passes()
        self._wasted = {'steps': 0, 'tokens': 0, 'model_flops': 0, 'hardware_flops': 0}
        self._wasted_seconds = 0.0

    def add_step(
        self,
        costs: Mapping[str, Cost],
        *,
        tokens: int,
        examples: int,
        stage: int = 0,
        tokens_computed: int | None = None,
        hardware_flops: float | None = None,
        optimizer_flops: float = 0.0,
        skipped: bool = False,
    ) -> None:
        """Charges one training step: forward and backward.

        Args:
          costs: part -> cost of the forward pass over the step's whole batch.
          tokens: tokens seen: targets that the step trained on, padding excluded.
          examples: rows (or images) of the step.
          stage: index of the stage that the step belongs to.
          tokens_computed: positions computed on: padding included, dropped tokens excluded.
            None: as `tokens`.
          hardware_flops: FLOPs executed (`effjax.costs.walk`), None where they are not known.
          optimizer_flops: arithmetic of the optimizer, a line of its own.
          skipped: the update was thrown away (overflow of fp16); it is charged all the same.
        """
        entry = self._stage(stage)
        entry['steps'] += 1
        entry['skipped'] += int(skipped)
        entry['examples'] += int(examples)
        entry['tokens'] += int(tokens)
        entry['tokens_computed'] += int(tokens if tokens_computed is None else tokens_computed)
        for part, cost in costs.items():
            parts = entry['parts']
            parts[part] = parts.get(part, 0) + round(cost.train_flops)
        entry['hardware_flops'] = _plus(entry['hardware_flops'], hardware_flops)
        entry['optimizer_flops'] += round(optimizer_flops)

    def add_forward(
        self,
        costs: Mapping[str, Cost],
        *,
        purpose: str,
        tokens: int = 0,
        examples: int = 0,
        stage: int = 0,
        hardware_flops: float | None = None,
    ) -> None:
        """Charges a pass without gradients: a teacher, a probe, a scoring pass, an evaluation.

        Everything but the purpose 'eval' counts towards the budget and the run's model FLOPs.
        Tokens and examples of such passes are kept with the purpose; nothing was trained on them.
        """
        entry = self._eval
        if purpose != 'eval':
            entry = self._stage(stage)['forward'].setdefault(purpose, _passes())
        entry['passes'] += 1
        entry['tokens'] += int(tokens)
        entry['examples'] += int(examples)
        entry['model_flops'] += sum(round(cost.model_flops) for cost in costs.values())
        entry['hardware_flops'] = _plus(entry['hardware_flops'], hardware_flops)

    def add_waste(
        self,
        *,
        steps: int,
        tokens: int = 0,
        model_flops: float = 0,
        hardware_flops: float | None = 0,
        seconds: float = 0.0,
    ) -> None:
        """Books work that a kill made the run repeat; it is no progress."""
        self._wasted['steps'] += int(steps)
        self._wasted['tokens'] += int(tokens)
        self._wasted['model_flops'] += round(model_flops)
        self._wasted['hardware_flops'] += round(hardware_flops or 0)
        self._wasted_seconds += float(seconds)

    def add_waste_since(self, last: Mapping[str, Any], *, seconds: float = 0.0) -> bool:
        """Books what lies between this restored ledger and the last line a killed run wrote.

        Args:
          last: the last complete line of metrics.jsonl: `step`, `tokens`, `model_flops`,
            `hardware_flops`, `seconds`, all cumulative.
          seconds: the restored clock's training seconds.

        Returns:
          True where something was lost.
        """
        lost = int(last.get('step', 0)) - self.steps
        if lost <= 0:
            return False
        hardware = self.hardware_flops
        self.add_waste(
            steps=lost,
            tokens=max(0, int(last.get('tokens', 0)) - self.tokens),
            model_flops=max(0, last.get('model_flops', 0) - self.model_flops),
            hardware_flops=max(0, (last.get('hardware_flops') or 0) - (hardware or 0)),
            seconds=max(0.0, float(last.get('seconds', 0.0)) - seconds),
        )
        return True

    @property
    def steps(self) -> int:
        """Training steps done."""
        return self._sum('steps')

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self._sum('tokens')

    @property
    def examples(self) -> int:
        """Examples trained on."""
        return self._sum('examples')

    @property
    def model_flops(self) -> int:
        """Model FLOPs charged to the budget: training steps and charged forward passes."""
        return sum(_stage_flops(entry) for entry in self._stages)

    @property
    def hardware_flops(self) -> int | None:
        """FLOPs executed for the budget, or None where some were not known."""
        return _hardware(self._stages)

    def progress(
        self, extent: tuple[str, float], *, seconds: float = 0.0, stage: int | None = None
    ) -> float:
        """Returns how much of an extent is done, in [0, 1], as a float64.

        Args:
          extent: (unit, amount) as `core.config.extent` gives it.
          seconds: training seconds so far; needed for the unit 'seconds' only.
          stage: count this stage alone; None counts the run.

        Raises:
          ValueError: an unknown unit.
        """
        unit, amount = extent
        if unit == 'seconds':
            done: float = seconds
        elif unit in UNITS:
            done = self._done(unit, stage)
        else:
            raise ValueError(f'unknown unit {unit!r} of progress; known: {", ".join(UNITS)}.')
        return min(1.0, done / amount)

    def totals(self) -> dict[str, Any]:
        """Returns the sums that summary.json shows, with `parts`, `forward` and `stages`."""
        out: dict[str, Any] = {key: self._sum(key) for key in _COUNTS}
        out['model_flops'] = self.model_flops
        out['hardware_flops'] = self.hardware_flops
        out['optimizer_flops'] = self._sum('optimizer_flops')
        out['parts'] = _merge(entry['parts'] for entry in self._stages)
        out['forward'] = _merge(
            {name: passes['model_flops'] for name, passes in entry['forward'].items()}
            for entry in self._stages
        )
        out['eval'] = dict(self._eval)
        out['wasted'] = {**self._wasted, 'seconds': self._wasted_seconds}
        out['stages'] = [
            {**{key: entry[key] for key in _COUNTS}, 'model_flops': _stage_flops(entry),
             'hardware_flops': _hardware([entry])}
            for entry in self._stages
        ]  # fmt: skip
        return out

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, as JSON can hold it; `from_dict` restores it exactly."""
        return copy.deepcopy({
            'stages': self._stages,
            'eval': self._eval,
            'wasted': self._wasted,
            'wasted_seconds': self._wasted_seconds,
        })  # fmt: skip

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> 'Ledger':
        """Returns the ledger that `to_dict` saved."""
        ledger = cls()
        saved = copy.deepcopy(dict(saved))
        ledger._stages = saved['stages']
        ledger._eval = saved['eval']
        ledger._wasted = saved['wasted']
        ledger._wasted_seconds = saved['wasted_seconds']
        return ledger

    def _stage(self, stage: int) -> dict[str, Any]:
        while len(self._stages) <= stage:
            counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
            self._stages.append({
                **counts, 'parts': {}, 'hardware_flops': 0, 'optimizer_flops': 0, 'forward': {},
            })  # fmt: skip
        return self._stages[stage]

    def _sum(self, key: str) -> int:
        return sum(entry[key] for entry in self._stages)

    def _done(self, unit: str, stage: int | None) -> int:
        if stage is None:
            return self.model_flops if unit == 'model_flops' else self._sum(unit)
        if stage >= len(self._stages):
            return 0
        entry = self._stages[stage]
        return _stage_flops(entry) if unit == 'model_flops' else entry[unit]


def _passes() -> dict[str, Any]:
    return {'passes': 0, 'tokens': 0, 'examples': 0, 'model_flops': 0, 'hardware_flops': 0}


def _plus(sum_: int | None, more: float | None) -> int | None:
    """Adds; None (not known) stays None, so that a sum is never silently too small."""
    return None if sum_ is None or more is None else sum_ + round(more)


def _stage_flops(entry: Mapping[str, Any]) -> int:
    extra = sum(passes['model_flops'] for passes in entry['forward'].values())
    return sum(entry['parts'].values()) + extra


def _hardware(stages: list[dict[str, Any]]) -> int | None:
    out: int | None = 0
    for entry in stages:
        out = _plus(out, entry['hardware_flops'])
        for passes in entry['forward'].values():
            out = _plus(out, passes['hardware_flops'])
    return out


def _merge(tables: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for table in tables:
        for key, value in table.items():
            out[key] = out.get(key, 0) + value
    return out
