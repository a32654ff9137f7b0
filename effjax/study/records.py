"""What a study stores and what its analysis says: plain records, as JSON can hold them.

A `Cell` is one run of one arm: phase, seed, share of the budget, tuned settings, and what came of
it. An `Analysis` is everything that reports, cards and `docs/verdicts.md` show; it is computed
from cells alone, so that it can be made again at any time.
"""

import dataclasses
from typing import Any

PHASES = ('tune', 'final')
VERDICTS = ('win', 'loss', 'equivalent', 'inconclusive', 'refused', 'failed')

# What a run spent, in the order that tables show it. None is 'not known here', never 0.
COSTS = (
    'steps', 'tokens', 'tokens_computed', 'examples', 'model_flops', 'hardware_flops',
    'optimizer_flops', 'reference_seconds', 'seconds', 'data_seconds', 'compile_seconds',
    'eval_seconds', 'device_seconds', 'joules', 'params', 'peak_bytes',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      arm: name of the arm.
      phase: 'tune' or 'final'.
      seed: of data order, initial values and dropout.
      fraction: share of the study's budget, in (0, 1].
      settings: config key -> value that the tuning grid set, such as {'schedule.peak': 0.001}.
      status: 'done', 'diverged' (loss not finite), 'failed' (an error), 'missing' (not run yet).
      error: the message of a run that did not end well.
      value: the study's metric at the end of the run, None without one.
      costs: `COSTS` -> number or None. 'seconds' is training, waiting for data included;
        'joules' is of whole boards; 'device_seconds' is everything the run held devices for.
      curve: (cost columns and metric) of each evaluation:
        [{'steps', 'tokens', 'model_flops', 'hardware_flops', 'seconds', 'value'}, ...].
      environment: device, versions and flags, as `training.setup.environment` returns them.
      workdir: the run's folder, relative to the study's.
    """

    arm: str
    phase: str
    seed: int
    fraction: float
    settings: dict[str, Any]
    status: str
    error: str = ''
    value: float | None = None
    costs: dict[str, float | None] = dataclasses.field(default_factory=dict)
    curve: list[dict[str, float | None]] = dataclasses.field(default_factory=list)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    workdir: str = ''


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How an arm's settings were chosen.

    Attributes:
      key: the tuned config key.
      grid: values tried, ascending.
      values: the metric at each (mean over tuning seeds), None where a run did not end well.
      chosen: the winner.
      edge: whether the winner is the first or last of the grid.
      reason: why the arm is untuned, in words; '' where it is tuned.
    """

    key: str
    grid: list[float]
    values: list[float | None]
    chosen: float
    edge: bool
    reason: str = ''

    @property
    def untuned(self) -> bool:
        """Whether nothing shows that the best value lies inside the grid."""
        return self.edge or bool(self.reason)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean of n paired differences with its 95 % t interval."""

    mean: float
    low: float
    high: float
    sd: float
    n: int


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Budget that an arm needs, over the budget the baseline needs, for the same metric.

    Attributes:
      ratio, low, high: Cm / Cb with its 95 % interval; savings are 1 - ratio, speed-up 1 / ratio.
      n: seeds behind it.
      bound: '' when measured; 'at most' or 'at least' when the crossing lies outside the budgets
        that were run, and `ratio` is then the nearest budget's.
      low_open, high_open: whether that end of the interval is only where the budgets that were run
        end: the interval goes on beyond it, nobody knows how far.
    """

    ratio: float
    low: float
    high: float
    n: int
    bound: str = ''
    low_open: bool = False
    high_open: bool = False

    @property
    def beyond(self) -> bool:
        """Whether the whole interval lies where `bound` says, not the estimate alone."""
        if self.bound == 'at most':
            return self.high <= 1.001 * self.ratio
        return self.bound == 'at least' and self.low >= 0.999 * self.ratio


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One arm against the baseline.

    Attributes:
      arm, baseline: names.
      verdict: one of `VERDICTS`.
      sentence: the finding in words; the first line of every output.
      difference: metric(arm) - metric(baseline) at the full budget, paired by seed; None where
        fewer than two pairs ended well.
      pairs: [seed, baseline's value, arm's value] at the full budget.
      detectable: the smallest difference that this n finds in 80 % of studies, or None.
      at_equal_quality: axis -> `Ratio` (source free); None where it could not be told.
      source_charged: the same with the cost of a reused source model added; {} without a source.
      spent: axis -> cost(arm) / cost(baseline) at the full budget.
      notes: sentences a reader must know: untuned arms, failed runs, refusals, CPU.
    """

    arm: str
    baseline: str
    verdict: str
    sentence: str
    difference: Interval | None
    pairs: list[list[float | None]]
    detectable: float | None
    at_equal_quality: dict[str, Ratio | None]
    source_charged: dict[str, Ratio | None]
    spent: dict[str, float | None]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A study's findings.

    Attributes:
      name, question, metric, lower_is_better, margin, axis, budget, fractions, seeds: the study's.
      arms: arm -> {'method': catalogue id or '', 'changes': ['a.b=c', ...], 'commands': [...],
        'tuning': Tuning or None}.
      comparisons: one an arm, in order.
      cells: all runs, failed ones too.
      device: where it ran, '' where arms ran on several kinds.
      date: ISO date of the last run.
      code: digest of the code version.
      scale: the workload in words: '10.0M parameters, 35M tokens of stdlib text'.
      commands: exact commands that make the study again.
    """

    name: str
    question: str
    metric: str
    lower_is_better: bool
    margin: float
    axis: str
    budget: float
    fractions: list[float]
    seeds: list[int]
    baseline: str
    arms: dict[str, dict[str, Any]]
    comparisons: list[Comparison]
    cells: list[Cell]
    device: str
    date: str
    code: str
    scale: str
    commands: list[str]
    notes: list[str]


def to_json(record: Any) -> dict[str, Any]:
    """Returns a record as plain dicts, lists and scalars."""
    return dataclasses.asdict(record)


def analysis_from_json(saved: dict[str, Any]) -> Analysis:
    """Returns the `Analysis` that `to_json` saved."""
    arms = {
        name: {**arm, 'tuning': Tuning(**arm['tuning']) if arm.get('tuning') else None}
        for name, arm in saved['arms'].items()
    }
    comparisons = [_comparison(c) for c in saved['comparisons']]
    cells = [Cell(**c) for c in saved['cells']]
    return Analysis(**{**saved, 'arms': arms, 'comparisons': comparisons, 'cells': cells})


def _comparison(saved: dict[str, Any]) -> Comparison:
    difference = Interval(**saved['difference']) if saved['difference'] else None
    ratios = {
        key: {axis: Ratio(**r) if r else None for axis, r in saved[key].items()}
        for key in ('at_equal_quality', 'source_charged')
    }
    return Comparison(**{**saved, 'difference': difference, **ratios})
