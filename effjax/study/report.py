"""The report of a study: one HTML page that needs nothing from elsewhere, plots included."""

import dataclasses
import html
import math
import pathlib
from collections.abc import Mapping, Sequence

from effjax.costs import page
from effjax.costs.svg import Row, Series, interval_plot, line_plot
from effjax.study import tables
from effjax.study.records import Analysis, Cell
from effjax.training.files import write_text_atomic

FILE = 'report.html'
# What the metric is plotted against: cost column -> (words, unit) of the label.
_AXES = {
    'steps': ('steps', ''),
    'tokens': ('', 'token'),
    'model_flops': ('model', 'FLOP'),
    'hardware_flops': ('hardware', 'FLOP'),
    'seconds': ('training time', 's'),
    'reference_seconds': ('reference time', 's'),
    'joules': ('energy', 'J'),
}
_ALWAYS = ('steps', 'tokens', 'model_flops', 'hardware_flops', 'seconds')


def write(analysis: Analysis, folder: str | pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into a folder and returns its path.

    Raises:
      OSError: the folder is missing or unwritable.
    """
    path = pathlib.Path(folder) / FILE
    write_text_atomic(path, page.document(f'{analysis.name} – effjax study', _page(analysis)))
    return path


def _page(study: Analysis) -> list[str]:
    against = f'{study.name}: {study.scale}, on {tables.hardware(study)}, {study.date}'
    return [
        f'<h1>{"<br>".join(map(html.escape, tables.finding(study)))}</h1>',
        f'<p class="soft">{html.escape(against)}</p>',
        *(f'<div class="warn">{html.escape(note)}</div>' for note in tables.notes(study)),
        page.results(_results(tables.verdicts(study))),
        page.plots([_differences(study), _budgets(study), _pareto(study)]),
        '<p class="soft">Each point is a run of its own, its schedule decayed to zero at its own '
        f'budget. The band around 0 is the margin of equivalence, ± {tables.plain(study.margin)}. '
        'A ring marks a run that no other beats on both metric and cost.</p>',
        *_section('At equal quality', tables.at_equal_quality(study)),
        '<h2>The metric against each cost</h2>',
        *_curves(study),
        *_section('Final metric against budget', tables.budgets(study)),
        *_section('Cost', tables.costs(study)),
        *_section('Tuning', tables.tuning(study)),
        *_section('Seeds', tables.seeds(study)),
        *_failures(study),
        f'<details><summary>All {len(study.cells)} runs</summary>{_table(tables.runs(study))}'
        '</details>',
        *_section('Study', tables.design(study)),
        *_section('Environment', tables.environment(study)),
        *_commands(study),
    ]


def _results(table: tables.Table) -> list[tuple[str, str, list[list[str]]]]:
    """Turns the verdicts' rows into boxes, which a phone shows without scrolling."""
    return [
        (row[1], row[0], [[name, cell] for name, cell in zip(table.head[2:], row[2:], strict=True)])
        for row in table.rows
    ]


def _section(title: str, table: tables.Table) -> list[str]:
    return [f'<h2>{html.escape(title)}</h2>', _table(table)]


def _table(table: tables.Table) -> str:
    if not table.rows:
        return '<p class="soft">nothing to show</p>'
    return page.table(table.rows, head=table.head, numbers=table.numbers)


def _failures(study: Analysis) -> list[str]:
    table = tables.failures(study)
    if not table.rows:
        return []
    return _section('Runs that did not end well', table)


def _commands(study: Analysis) -> list[str]:
    out = ['<h2>Commands</h2>']
    for name, lines in tables.commands(study):
        text = html.escape('\n'.join(lines))
        out.append(f'<p class="soft">{html.escape(name)}</p><pre>{text}</pre>')
    return out


# ---- plots --------------------------------------------------------------------------------------


def _colours(study: Analysis) -> dict[str, int]:
    return {arm: i for i, arm in enumerate(tables.arms(study))}


def _differences(study: Analysis) -> str:
    """Each seed's paired difference, and the mean with its interval."""
    colours = _colours(study)
    rows = []
    for c in study.comparisons:
        values = [
            other - base
            for _, base, other in c.pairs
            if base is not None and other is not None and math.isfinite(other - base)
        ]
        d = c.difference
        row = Row(f'{c.arm} - {c.baseline}', values, colour=colours.get(c.arm, 0))
        if d:
            row = dataclasses.replace(row, mean=d.mean, low=d.low, high=d.high)
        rows.append(row)
    better = '← better' if study.lower_is_better else 'better →'
    return interval_plot(
        rows, title='Paired differences, 95 % interval', margin=_number(study.margin),
        x_label=f'difference in {study.metric} ({better})',
    )  # fmt: skip


def _budgets(study: Analysis) -> str:
    """The final metric against the share of the budget: where lines cross a level is the saving."""
    series: list[Series] = []
    for arm, colour in _colours(study).items():
        cells = tables.final(study, arm)
        x, y = [100 * c.fraction for c in cells], [_value(c) for c in cells]
        series.append(Series('', x, y, colour, 'dots'))
        means = _means(x, y)
        series.append(Series(arm, list(means), list(means.values()), colour, 'line'))
        if arm == study.baseline and means:
            name = f'{arm} at {max(means):g} %'
            series.append(Series(name, [], [means[max(means)]], colour, 'rule'))
    return line_plot(
        series, title='Final metric against budget', y_label=study.metric,
        x_label=f'share of the budget of {tables.words(study.axis)} (%)',
    )  # fmt: skip


def _pareto(study: Analysis) -> str:
    """All final runs: metric against cost on the study's axis, the ones no other beats marked."""
    series, points = [], []
    for arm, colour in _colours(study).items():
        cells = [c for c in tables.final(study, arm) if tables.known(c.costs.get(study.axis))]
        own = [(_cost(c, study.axis), _value(c)) for c in cells]
        series.append(Series(arm, [p[0] for p in own], [p[1] for p in own], colour, 'dots'))
        points += own
    best = front(points, study.lower_is_better)
    ring = Series('no run is better', [p[0] for p in best], [p[1] for p in best], 5, 'front')
    shown, label = _in_unit([ring, *series], study.axis)
    title = f'Pareto: metric against {tables.words(study.axis)}'
    return line_plot(shown, title=title, x_label=label, y_label=study.metric)


def front(
    points: Sequence[tuple[float, float]], lower_is_better: bool
) -> list[tuple[float, float]]:
    """Returns the (cost, metric) points that no other beats, ascending in cost.

    A point is beaten by one that costs no more and is no worse, and better in one of the two.
    """
    sign = 1.0 if lower_is_better else -1.0
    out: list[tuple[float, float]] = []
    for cost, metric in sorted(set(points), key=lambda p: (p[0], sign * p[1])):
        if not out or sign * metric < sign * out[-1][1]:
            out.append((cost, metric))
    return out


def _curves(study: Analysis) -> list[str]:
    """The metric during the runs at the full budget, against every cost that is known."""
    cells = [c for c in tables.full(study) if c.curve]
    if not cells:
        return ['<p class="soft">The evaluations during the runs are not stored with this study; '
                'its report in the folder where it ran shows them.</p>']  # fmt: skip
    drawn, missing = [], []
    for axis in _AXES:
        if any(tables.known(row.get(axis)) for c in cells for row in c.curve):
            drawn.append(axis)
        elif axis in _ALWAYS:
            missing.append(tables.words(axis))
    out = [
        page.plots_with_log_switch(
            [_curve(study, cells, axis, log_x=False) for axis in drawn],
            [_curve(study, cells, axis, log_x=True) for axis in drawn],
        ),
        '<p class="soft">Runs at the full budget: pale lines are seeds, strong ones their mean. '
        'Learning rates have decayed at the ends only.</p>',
    ]
    if missing:
        out.append(f'<p class="soft">Not known here, so not drawn: {", ".join(missing)}.</p>')
    return out


def _curve(study: Analysis, cells: Sequence[Cell], axis: str, log_x: bool) -> str:
    series: list[Series] = []
    for arm, colour in _colours(study).items():
        own = [c for c in cells if c.arm == arm]
        for cell in own:
            series.append(Series('', _column(cell, axis), _column(cell, 'value'), colour, 'faint'))
        x, y = _mean_curve([c for c in own if c.status == 'done'], axis)
        series.append(Series(arm, x, y, colour))
    shown, label = _in_unit(series, axis)
    return line_plot(
        shown, title=f'Against {tables.words(axis)}', x_label=label, y_label=study.metric,
        log_x=log_x, y_max=_without_start(shown) if study.lower_is_better else None,
    )  # fmt: skip


def _mean_curve(cells: Sequence[Cell], axis: str) -> tuple[list[float], list[float]]:
    """Returns the mean over seeds at the steps that all of them evaluated."""
    by_step = [{row.get('steps'): row for row in c.curve} for c in cells]
    shared = [s for s in by_step[0] if all(s in rows for rows in by_step)] if by_step else []
    x, y = [], []
    for step in shared:
        at = [_number(rows[step].get(axis)) for rows in by_step]
        values = [_number(rows[step].get('value')) for rows in by_step]
        x.append(math.fsum(at) / len(at))
        y.append(math.fsum(values) / len(values))
    return x, y


def _without_start(series: Sequence[Series]) -> float | None:
    """Returns where to cut the y axis so that the first evaluations do not squash the later."""
    # A diverged run may end anywhere: the means alone, of runs that ended well, set the range.
    means = [s for s in series if s.kind == 'line' and len(s.y) > 4]
    later = [y for s in means for y in s.y[len(s.y) // 5 :] if math.isfinite(y)]
    return max(later) + 0.15 * (max(later) - min(later)) if later else None


def _in_unit(series: Sequence[Series], axis: str) -> tuple[list[Series], str]:
    shown, label = page.in_unit(series, *_AXES.get(axis, (tables.words(axis), '')))
    return shown, label.strip()


def _means(x: Sequence[float], y: Sequence[float]) -> Mapping[float, float]:
    """Returns x -> mean y, ascending in x."""
    return {
        at: math.fsum(values) / len(values)
        for at in sorted(set(x))
        if (values := [b for a, b in zip(x, y, strict=True) if a == at])
    }


def _column(cell: Cell, key: str) -> list[float]:
    return [_number(row.get(key)) for row in cell.curve]


def _value(cell: Cell) -> float:
    return _number(cell.value)


def _cost(cell: Cell, axis: str) -> float:
    return _number(cell.costs.get(axis))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
