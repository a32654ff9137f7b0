"""From finished runs to findings: winners of the tuning, paired differences, verdicts, ratios.

Pure functions of a study and its cells; what is refused is refused here, in words.
"""

import ast
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from effjax.study import stats, words
from effjax.study.records import COSTS, Analysis, Cell, Comparison, Ratio, Tuning
from effjax.study.spec import AXES, Arm, Study

MOST_WAIT = 0.05  # share of training time spent waiting for data, above which time says nothing
UNEQUAL = 0.01  # difference of what two arms spent of an equal budget, from which on it is told
_CLOCKED = ('seconds', 'joules')
# What runs must share if their times are to be compared: key of the environment -> how it is said.
_SAME = {
    'device': 'on different devices',
    'devices': 'on different numbers of devices',
    'jax': 'with different versions of jax',
    'xla_flags': 'with different XLA flags',
}


def tune(study: Study, arm: Arm, cells: Sequence[Cell]) -> Tuning | None:
    """Returns the winner of an arm's grid, None where no value ended well or nothing is tuned.

    Of equally good values the smallest wins. A neighbour that diverged shows that the winner lies
    inside the grid; one that failed or has not run shows nothing, and leaves the arm untuned.

    Args:
      study: the study.
      arm: whose grid.
      cells: all cells; those of other arms and phases are left out.
    """
    grid = study.grid_of(arm)
    if not grid:
        return None
    mine = [c for c in cells if c.arm == arm.name and c.phase == 'tune']
    tried = [[c for c in mine if c.settings.get(study.tune_key) == value] for value in grid]
    values: list[float | None] = []
    for runs in tried:
        whole = [c.value for c in runs if c.value is not None]
        values.append(statistics.mean(whole) if whole and len(whole) == len(runs) else None)
    ended = {i: v for i, v in enumerate(values) if v is not None}
    if not ended:
        return None
    best = (min if study.minimised else max)(ended, key=lambda i: ended[i])  # the first of equals
    edge = best in (0, len(grid) - 1)
    reason = (
        f'its best {study.tune_key}, {grid[best]:g}, is at the edge of its grid' if edge else ''
    )
    for i in (best - 1, best + 1):
        if not reason and values[i] is None:
            reason = _no_evidence(study.tune_key, grid[best], grid[i], tried[i])
    return Tuning(
        key=study.tune_key,
        grid=list(grid),
        values=values,
        chosen=grid[best],
        edge=edge,
        reason=reason,
    )


def _no_evidence(key: str, best: float, beside: float, runs: Sequence[Cell]) -> str:
    """Returns why a value beside the winner does not bound it, '' where it diverged."""
    if any(c.status == 'diverged' for c in runs):
        return ''
    failed = next((c for c in runs if c.status == 'failed'), None)
    told = f'failed: {failed.error.rstrip(".")}' if failed else 'has not been run'
    return f'its best {key}, {best:g}, lies beside {beside:g}, which {told}'


def analyse(
    study: Study,
    cells: Sequence[Cell],
    *,
    code: str,
    commands: Sequence[str] = (),
    scale: str = '',
    sources: Mapping[str, Mapping[str, float | None]] | None = None,
    notes: Sequence[str] = (),
) -> Analysis:
    """Returns a study's findings.

    Args:
      study: the study.
      cells: its runs, those not run yet included.
      code: digest of the code version, or several joined by '+'.
      commands: what makes the study again.
      scale: the workload in words.
      sources: arm, the baseline too -> costs of the source model that it reuses.
      notes: sentences on the study as a whole.
    """
    final = [c for c in cells if c.phase == 'final']
    devices = sorted({str(c.environment['device']) for c in final if 'device' in c.environment})
    tunings = {arm.name: tune(study, arm, cells) for arm in study.arms}
    arms = {
        arm.name: {
            'method': arm.method,
            'changes': [*([f'config={arm.config}'] if arm.config else []), *arm.overrides],
            'tuning': tunings[arm.name],
            'commands': [],
        }
        for arm in study.arms
    }
    general = [*notes, *_general(study, final)]
    return Analysis(
        name=study.name,
        question=study.question,
        metric=study.metric,
        lower_is_better=study.minimised,
        margin=study.margin,
        axis=study.axis,
        budget=study.budget,
        fractions=list(study.fractions),
        seeds=list(study.seeds),
        baseline=study.baseline.name,
        arms=arms,
        comparisons=[_compare(study, arm, final, tunings, sources or {}) for arm in study.arms[1:]],
        cells=list(cells),
        device=devices[0] if len(devices) == 1 else '',
        date=max((str(c.environment.get('finished', ''))[:10] for c in final), default=''),
        code=code,
        scale=study.scale or scale,
        commands=list(commands),
        notes=general,
    )


def noise(cells: Sequence[Cell]) -> float | None:
    """Returns the standard deviation of a metric over runs that differ in seed alone."""
    values = [c.value for c in cells if c.value is not None]
    return statistics.stdev(values) if len(values) > 1 else None


# ---- one arm against the baseline --------------------------------------------------------------


def _compare(
    study: Study,
    arm: Arm,
    final: Sequence[Cell],
    tunings: Mapping[str, Tuning | None],
    sources: Mapping[str, Mapping[str, float | None]],
) -> Comparison:
    base, mine = _full(study.baseline.name, final), _full(arm.name, final)
    pairs = [[float(s), _value(base, s), _value(mine, s)] for s in study.seeds]
    differences = [b - a for _, a, b in pairs if a is not None and b is not None]
    interval = stats.paired_interval(differences) if len(differences) > 1 else None
    spent = {axis: _spent(base, mine, axis) for axis in COSTS}
    notes = _notes(study, arm, final, tunings)
    clocked = _clock_refusal(study, arm, final)
    reason = clocked if study.axis in _CLOCKED else ''
    # Seeds that diverged or failed are no missing data: leaving them out would flatter the rest.
    broken = any(c.status in ('failed', 'diverged') for c in (*base.values(), *mine.values()))
    verdict, ratio = 'failed', None
    detectable = None
    if interval is None or broken:
        reason = _failure(study, arm, final)
    elif reason:
        verdict = 'refused'
    else:
        verdict = stats.verdict(interval, study.margin, study.minimised)
        ratio = _ratio(study, arm, final)
        detectable = stats.minimum_detectable(interval.sd, interval.n) if interval.sd else None
    notes += _short(study, arm, final)
    if interval is not None and interval.n < len(study.seeds) and not broken:
        notes.append(f'{interval.n} of {len(study.seeds)} seeds so far.')
    own = spent.get(study.axis) or 1.0
    if abs(own - 1) > UNEQUAL:
        notes.append(
            f'{arm.name} spent {own:.1%} of the {AXES[study.axis][1]} that {study.baseline.name} '
            'did: a run ends at a whole step; ratios count what was spent.'
        )
    ratios = _on_all_axes(study, ratio, base, mine, clocked)
    source = _Sources.of(sources, study.baseline.name, arm.name)
    charged = source.charged(ratios, base) if source else {}
    return Comparison(
        arm=arm.name,
        baseline=study.baseline.name,
        verdict=verdict,
        sentence=words.sentence(
            arm=arm.name,
            baseline=study.baseline.name,
            verdict=verdict,
            axis=study.axis,
            metric=study.metric,
            difference=interval,
            ratio=ratio,
            margin=study.margin,
            detectable=detectable,
            reason=reason,
            untuned=[n for n in (study.baseline.name, arm.name) if _untuned(study, tunings[n])],
            reused=source is not None,
            charged=charged.get(study.axis),
            extra=source.extra(study.axis, base) if source else None,
        ),
        difference=interval,
        pairs=pairs,
        detectable=detectable,
        at_equal_quality=ratios,
        source_charged=charged,
        spent=spent,
        notes=[*notes, *([f'No ratio of time or energy: {clocked}.'] if clocked else [])],
    )


def _full(arm: str, final: Sequence[Cell]) -> dict[int, Cell]:
    """Returns seed -> the arm's run at the full budget."""
    return {c.seed: c for c in final if c.arm == arm and c.fraction == 1.0}


def _value(cells: Mapping[int, Cell], seed: int) -> float | None:
    return cells[seed].value if seed in cells else None


def _ratio(study: Study, arm: Arm, final: Sequence[Cell]) -> Ratio | None:
    """Returns the budget ratio, each side's budgets being shares of what its full runs spent."""
    found = [_curve(study, name, final) for name in (arm.name, study.baseline.name)]
    if len(study.fractions) < 2 or not all(1.0 in side for side in found):
        return None
    return stats.budget_ratio(found[0], found[1], lower_is_better=study.minimised)


def _curve(study: Study, name: str, final: Sequence[Cell]) -> dict[float, dict[int, float]]:
    """Returns share of the spent budget -> seed -> metric of an arm.

    A run ends at the step nearest to its budget, so that its share is what it spent over what the
    full runs spent; the one asked for where that is not known.
    """
    done = [c for c in final if c.arm == name and c.value is not None]
    full = _mean_cost([c for c in done if c.fraction == 1.0], study.axis)
    out: dict[float, dict[int, float]] = {}
    for fraction in sorted({c.fraction for c in done}):
        here = [c for c in done if c.fraction == fraction]
        spent = _mean_cost(here, study.axis)
        share = fraction if fraction == 1.0 or not (full and spent) else spent / full
        if fraction == 1.0 or share < 1.0:  # equal steps at two budgets are one point
            out[share] = {c.seed: c.value for c in here if c.value is not None}
    return out


def _mean_cost(cells: Iterable[Cell], axis: str) -> float | None:
    """Returns the mean of a cost over runs that ended well, None where one does not know it."""
    known = [c.costs.get(axis) for c in cells if c.status == 'done']
    if not known or any(v is None for v in known):
        return None
    return statistics.mean(v for v in known if v is not None)


def _spent(base: Mapping[int, Cell], mine: Mapping[int, Cell], axis: str) -> float | None:
    """Returns mean cost(arm) / mean cost(baseline) at the full budget, None where not known."""
    sides = [_mean_cost(cells.values(), axis) for cells in (base, mine)]
    return None if sides[1] is None or not sides[0] else sides[1] / sides[0]


def _spread(logs: Sequence[float]) -> float:
    """Returns half the 95 % interval of the mean of logarithms; 0 where they are equal or one."""
    if len(logs) < 2:
        return 0.0
    found = stats.paired_interval(logs)
    return (found.high - found.low) / 2


def _on_all_axes(
    study: Study,
    ratio: Ratio | None,
    base: Mapping[int, Cell],
    mine: Mapping[int, Cell],
    clocked: str,
) -> dict[str, Ratio | None]:
    """Returns the ratio on every axis: a run's costs grow together, so one factor converts them.

    The factor is what the arm's full runs spent over what the baseline's did. Its spread over
    seeds (none for FLOPs, some for time) and the ratio's add up as squares of half intervals of
    logarithms, each end by itself (Zou and Donner 2008).
    """
    out: dict[str, Ratio | None] = {}
    for axis in AXES:
        factor = _spent(base, mine, axis)
        hidden = bool(clocked) and axis in _CLOCKED
        if ratio is None or factor is None or not factor or hidden:
            out[axis] = None
            continue
        pairs = [
            (a, b)
            for seed in sorted(base.keys() & mine.keys())
            if (a := base[seed].costs.get(axis)) and (b := mine[seed].costs.get(axis))
        ]
        spread = _spread([math.log(b / a) for a, b in pairs])
        low, high = math.log(ratio.low / ratio.ratio), math.log(ratio.high / ratio.ratio)
        at = ratio.ratio * factor
        out[axis] = dataclasses.replace(
            ratio,
            ratio=at,
            low=at * math.exp(-math.hypot(low, spread)),
            high=at * math.exp(math.hypot(high, spread)),
        )
    return out


@dataclasses.dataclass(frozen=True)
class _Sources:
    """What the source models of a comparison cost; `{}` for a side that reuses none.

    Attributes:
      base, mine: cost column -> amount, of the baseline's and of the arm's source.
    """

    base: Mapping[str, float | None]
    mine: Mapping[str, float | None]

    @classmethod
    def of(
        cls, sources: Mapping[str, Mapping[str, float | None]], baseline: str, arm: str
    ) -> '_Sources | None':
        """Returns the sources of two arms, None where neither has one."""
        found = cls(sources.get(baseline, {}), sources.get(arm, {}))
        return found if found.base or found.mine else None

    def extra(self, axis: str, base: Mapping[int, Cell]) -> float | None:
        """Returns what the arm's source cost more, over what a run of the baseline spent."""
        shares = self._shares(axis, base)
        return None if shares is None else shares[1] - shares[0]

    def charged(
        self, ratios: Mapping[str, Ratio | None], base: Mapping[int, Cell]
    ) -> dict[str, Ratio | None]:
        """Returns axis -> (Cm + the arm's source) / (Cb + the baseline's source).

        Cb is what the baseline spent at the full budget.
        """
        return {axis: self._charged(axis, ratio, base) for axis, ratio in ratios.items()}

    def _charged(self, axis: str, ratio: Ratio | None, base: Mapping[int, Cell]) -> Ratio | None:
        shares = self._shares(axis, base)
        if ratio is None or shares is None:
            return None

        def paid(value: float, scale: float = 1.0) -> float:
            return (value + scale * shares[1]) / (1 + scale * shares[0])

        # What the baseline spent is known but for its spread over seeds.
        known = [v for c in base.values() if c.status == 'done' and (v := c.costs.get(axis))]
        spread = math.exp(_spread([math.log(v) for v in known]))
        slack = abs(paid(ratio.ratio, spread) - paid(ratio.ratio, 1 / spread)) / 2
        at = paid(ratio.ratio)
        return dataclasses.replace(
            ratio,
            ratio=at,
            low=at - math.hypot(at - paid(ratio.low), slack),
            high=at + math.hypot(paid(ratio.high) - at, slack),
        )

    def _shares(self, axis: str, base: Mapping[int, Cell]) -> tuple[float, float] | None:
        """Returns both sources' costs over what a run of the baseline spent, None if not known."""
        spent = _mean_cost(base.values(), axis)
        own = [side.get(axis) if side else 0.0 for side in (self.base, self.mine)]
        if not spent or own[0] is None or own[1] is None:
            return None
        return own[0] / spent, own[1] / spent


# ---- what a reader must know -------------------------------------------------------------------


def _clock_refusal(study: Study, arm: Arm, final: Sequence[Cell]) -> str:
    """Returns why time and energy of two arms' runs cannot be compared, '' if they can.

    Every budget counts: a ratio is read off all of them.
    """
    sides = (study.baseline.name, arm.name)
    cells = [c for c in final if c.arm in sides and c.status == 'done']
    for key, words_ in _SAME.items():
        found = sorted({str(c.environment.get(key)) for c in cells})
        if len(found) > 1:
            return f'the runs were made {words_} ({", ".join(v or "none" for v in found)})'
    if any(c.environment.get('batched') for c in cells):
        return 'several runs shared one compiled step, so that none has a time of its own'
    if any(c.environment.get('workers', 1) > 1 and _on_cpu(c) for c in cells):
        return "runs side by side shared a CPU's cores, so that none has a time of its own"
    waits = [
        (c.costs.get('data_seconds') or 0.0) / seconds
        for c in cells
        if (seconds := c.costs.get('seconds'))
    ]
    if waits and max(waits) > MOST_WAIT:
        return (
            f'a run waited for its data for {max(waits):.0%} of its training time (at most '
            f'{MOST_WAIT:.0%}), so that its time measures the loader'
        )
    return ''


def _on_cpu(cell: Cell) -> bool:
    return cell.environment.get('backend') == 'cpu'


def _failure(study: Study, arm: Arm, final: Sequence[Cell]) -> str:
    sides = (study.baseline.name, arm.name)
    bad = [c for c in final if c.arm in sides and c.fraction == 1.0 and c.status != 'done']
    if not bad:
        return f'{arm.name} has no runs at the full budget'
    missing = [c for c in bad if c.status == 'missing']
    if len(missing) == len(bad):
        return f'{len(missing)} of its runs have not been made yet'
    told = next(c for c in bad if c.status != 'missing')
    return f'{len(bad)} runs did not end well; {told.arm}, seed {told.seed}: {told.error}'


def _notes(
    study: Study, arm: Arm, final: Sequence[Cell], tunings: Mapping[str, Tuning | None]
) -> list[str]:
    out = []
    for name in (study.baseline.name, arm.name):
        tuning = tunings[name]
        if not study.tune_key:
            continue
        if tuning is None:
            out.append(f'{name} is untuned: no value of its grid ended well.')
        elif tuning.untuned:
            out.append(f'{name} is untuned: {tuning.reason}.')
    out += [
        f'{a.name} sets {study.tune_key} itself, which tuning sets for every arm alike.'
        for a in (study.baseline, arm)
        if study.tune_key and any(_sets(o, study.tune_key) for o in a.overrides)
    ]
    bad = [c for c in final if c.arm in (study.baseline.name, arm.name)]
    for status in ('failed', 'diverged', 'missing'):
        count = sum(c.status == status for c in bad)
        if count:
            words_ = {'missing': 'not run yet'}.get(status, status)
            whose = sorted({c.arm for c in bad if c.status == status})
            out.append(f'{count} of {len(bad)} runs {words_} ({", ".join(whose)}).')
    return out


def _short(study: Study, arm: Arm, final: Sequence[Cell]) -> list[str]:
    """Says which arms ran too few steps, where only running could tell."""
    out = []
    for name in (study.baseline.name, arm.name):
        made = [c.costs.get('steps') for c in final if c.arm == name and c.status == 'done']
        fewest = min((s for s in made if s is not None), default=math.inf)
        if fewest < study.least_steps:
            out.append(
                f'{name} made only {fewest:g} steps in its shortest run (the study asks for '
                f'{study.least_steps}): a larger budget would tell more.'
            )
    return out


def _sets(override: str, key: str) -> bool:
    """Whether 'a.b=c' sets a config key, by itself or within a whole block."""
    name, _, text = override.partition('=')
    if name == key:
        return True
    if not key.startswith(f'{name}.'):
        return False
    try:
        node = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    for part in key.removeprefix(f'{name}.').split('.'):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _untuned(study: Study, tuning: Tuning | None) -> bool:
    return bool(study.tune_key) and (tuning is None or tuning.untuned)


def _general(study: Study, final: Sequence[Cell]) -> list[str]:
    out = []
    backends = {c.environment.get('backend') for c in final if c.environment}
    if 'cpu' in backends:
        out.append(
            'Measured on a CPU: what it says of time does not carry over to an accelerator, and '
            'what it says of FLOPs holds at this small size.'
        )
    if not study.tune_key:
        out.append('Nothing was tuned: each arm ran with the learning rate of its config.')
    if len(study.arms) > 2:
        out.append(
            f'{len(study.arms) - 1} arms against one baseline: each interval is 95 % by itself, '
            'not for all of them together.'
        )
    return out
