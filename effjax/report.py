"""The report of a run: one HTML page that needs nothing from elsewhere, plots included.

    python -m effjax.report RUN            writes RUN/report.html
    python -m effjax.report RUN RUN ...    writes one page that compares the runs

It reads what a run writes anyway (metrics.jsonl, summary.json, config.json), so it can be made
again at any time, for an unfinished run too.
"""

import argparse
import dataclasses
import functools
import html
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core.errors import DataError, EffjaxError
from effjax.costs import page
from effjax.costs.svg import Series, line_plot, smooth, thin
from effjax.training.files import write_text_atomic

FILE = 'report.html'
# What training is plotted against: column, words, unit for SI prefixes ('' for plain numbers).
_AXES = (('step', 'steps', ''), ('model_flops', 'model', 'FLOP'), ('seconds', 'training time', 's'))
_CURVES = (
    ('lr', 'Learning rate', ''),
    ('tokens_per_second', 'Throughput', 'tokens/s'),
    ('grad_norm', 'Gradient norm', ''),
    ('loss_scale', 'Loss scale', ''),
)
_RAW_FROM = 60  # rows above which a curve is smoothed
_FIRST = ('bits_per_byte', 'accuracy', 'loss')  # metrics to show first, if there are such
_COUNTS = ('examples', 'tokens', 'bytes', 'documents', 'batches')  # no metrics: sizes


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run's folder tells.

    Attributes:
      name: the folder's name.
      rows: metrics, one mapping a step, in order.
      config: the resolved config, {} where missing.
      summary: the summary, {} while the run is unfinished.
      damaged: lines of metrics.jsonl that are not whole.
    """

    name: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    damaged: int = 0

    def column(self, key: str, by: str = 'step') -> tuple[list[float], list[float]]:
        """Returns (x, y) of the rows that have both; null is NaN."""
        rows = [row for row in self.rows if key in row and by in row]
        return [_number(row[by]) for row in rows], [_number(row[key]) for row in rows]

    def evals(self, metric: str, by: str = 'step') -> dict[str, tuple[list[float], list[float]]]:
        """Returns evaluation -> (x, y) of one metric."""
        out: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.rows:
            for name, values in (row.get('eval') or {}).items():
                if metric in values and by in row:
                    x, y = out.setdefault(name, ([], []))
                    x.append(_number(row[by]))
                    y.append(_number(values[metric]))
        return out

    @functools.cached_property
    def metrics(self) -> list[str]:
        """Names of what evaluations measured: the main ones first, sizes last."""
        seen = [m for row in self.rows for v in (row.get('eval') or {}).values() for m in v]
        seen += [m for values in self.final_evals.values() for m in values]
        order = {name: i for i, name in enumerate(_FIRST)} | dict.fromkeys(_COUNTS, 99)
        return sorted(dict.fromkeys(seen), key=lambda name: order.get(name, len(_FIRST)))

    @functools.cached_property
    def final_evals(self) -> dict[str, dict[str, float]]:
        """Evaluation -> metric -> its last value."""
        if self.summary.get('eval'):
            return self.summary['eval']
        out: dict[str, dict[str, float]] = {}
        for row in self.rows:
            out.update(row.get('eval') or {})
        return out

    def last(self, key: str) -> Any:
        """Returns the last row's value, or None."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def total(self, key: str) -> Any:
        """Returns a count of the ledger, from the last row while there is no summary."""
        ledger = self.summary.get('ledger') or {}
        return ledger[key] if key in ledger else self.last(key)


def read(workdir: str | os.PathLike) -> RunData:
    """Reads a run's folder.

    Raises:
      DataError: the folder holds no run.
    """
    folder = pathlib.Path(workdir)
    rows, damaged = _read_rows(folder / 'metrics.jsonl')
    config, summary = _read_json(folder / 'config.json'), _read_json(folder / 'summary.json')
    if not (rows or config or summary):
        raise DataError(
            f'no run in {os.fspath(workdir)!r}: it has none of metrics.jsonl, config.json and '
            'summary.json; give the --workdir of a training run.'
        )
    return RunData(folder.resolve().name, rows, config, summary, damaged)


def write(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` into a run's folder and returns its path.

    Raises:
      DataError: the folder holds no run.
    """
    run = read(workdir)
    path = pathlib.Path(workdir) / FILE
    write_text_atomic(path, page.document(f'{run.name} – effjax', _run_page(run)))
    return path


def write_comparison(
    workdirs: Sequence[str | os.PathLike], path: str | os.PathLike
) -> pathlib.Path:
    """Writes a page that compares runs and returns its path.

    Raises:
      DataError: a folder holds no run.
    """
    runs = [read(workdir) for workdir in workdirs]
    path = pathlib.Path(path)
    write_text_atomic(path, page.document('Comparison – effjax', _comparison_page(runs)))
    return path


# ---- one run ------------------------------------------------------------------------------------


def _run_page(run: RunData) -> list[str]:
    draw = functools.partial(_loss_plots, [run])
    return [
        f'<h1>{html.escape(run.config.get("name") or run.name)}</h1>',
        f'<p class="soft">{html.escape(_status(run))}</p>',
        *(f'<div class="warn">{html.escape(w)}</div>' for w in _warnings(run)),
        page.cards(_headlines(run)),
        '<h2>Loss</h2>',
        page.plots_with_log_switch(draw(log_x=False), draw(log_x=True)),
        '<h2>Other curves</h2>',
        page.plots([*_metric_plots([run]), *_curve_plots(run)]),
        '<h2>Quality</h2>',
        *_quality(run),
        '<h2>Cost</h2>',
        f'<div class="tables">{"".join(_cost_tables(run))}</div>',
        f'<p class="soft">{html.escape(_mfu_sentence(run))}</p>',
        *_details(run),
    ]


def _status(run: RunData) -> str:
    steps = run.summary.get('final_step', run.last('step') or 0)
    if not run.summary:
        aim = run.config.get('budget') or ''
        if run.config.get('steps'):
            aim = f'{run.config["steps"]:,} steps'
        return f'unfinished: {steps:,} steps so far' + (f', of {aim}' if aim else '')
    if run.summary.get('error'):
        return f'ended after {steps:,} steps: {run.summary["error"]}'
    if not run.summary.get('complete', True):
        return f'stopped by a signal after {steps:,} steps; the same command resumes it'
    return f'finished after {steps:,} steps'


def _warnings(run: RunData) -> list[str]:
    out = [str(w) for w in run.summary.get('warnings') or []]
    skipped = [row['step'] for row in run.rows if row.get('skipped')]
    if skipped:
        shown = ', '.join(f'{s:,}' for s in skipped[:12]) + (' …' if len(skipped) > 12 else '')
        out.append(f'{len(skipped)} skipped steps (gradient not finite): {shown}')
    wasted = (run.total('wasted') or {}).get('steps', 0)
    if wasted:
        out.append(f'{wasted:,} steps were lost to interruptions and done again')
    if run.damaged:
        out.append(f'{run.damaged} incomplete line(s) of metrics.jsonl left out')
    return out


def _headlines(run: RunData) -> list[tuple[str, str]]:
    out = []
    for name, values in run.final_evals.items():
        for metric in _FIRST:
            if metric in values:
                out.append((_metric(metric, values[metric]), f'{name} {_words(metric)}'))
                break
    if not out and run.rows:
        out.append((_metric('loss', run.last('loss')), 'training loss'))
    out.append((page.si(run.total('tokens')), 'tokens seen'))
    out.append((page.si(run.total('model_flops'), 'FLOP'), 'model FLOPs'))
    out.append((page.duration(_train_seconds(run)), 'training time'))
    if run.summary.get('params'):
        out.append((page.si(run.summary['params']), 'parameters'))
    utilisation = run.summary.get('mfu')
    if utilisation:
        out.append((page.percent(utilisation['mfu'], 1), 'MFU'))
    return out


def _loss_plots(runs: Sequence[RunData], log_x: bool) -> list[str]:
    """Loss against steps, model FLOPs and seconds; of several runs the evaluations if all have."""
    several = len(runs) > 1
    only_evals = several and all(run.evals('loss') for run in runs)
    out = []
    for column, words, unit in _AXES:
        series: list[Series] = []
        for i, run in enumerate(runs):
            own = f'{run.name} ' if several else ''
            if not only_evals:
                series += _training_loss(run, column, f'{own}train', i)
            for j, (name, (x, y)) in enumerate(run.evals('loss', column).items()):
                if not several or j == 0:
                    colour = i if several else j + 1
                    label = own.strip() if only_evals else f'{own}{name}'
                    series.append(Series(label, x, y, colour, 'points'))
        series, label = page.in_unit(series, words, unit)
        kind = 'Evaluation loss' if only_evals else 'Loss'
        out.append(
            line_plot(
                series, title=f'{kind} against {_against(column)}', x_label=label,
                y_label='nats', log_x=log_x, y_max=_without_start(series),
            )
        )  # fmt: skip
    return out


def _training_loss(run: RunData, column: str, name: str, colour: int) -> list[Series]:
    x, y = run.column('loss', column)
    return _smoothed(x, y, f'{name} (smoothed)' if len(x) > _RAW_FROM else name, colour)


def _smoothed(x: list[float], y: list[float], name: str = '', colour: int = 0) -> list[Series]:
    """Returns a curve, or its raw values pale and a moving average where there are many."""
    if len(x) <= _RAW_FROM:
        return [Series(name, x, y, colour)]
    raw = Series('', *thin(x, y), colour, 'faint')
    return [raw, Series(name, *thin(x, smooth(y, max(5, len(y) // 50))), colour)]


def _without_start(series: Sequence[Series]) -> float | None:
    """Returns where to cut the y axis so that the first steps do not squash all later ones."""
    later = [
        y
        for s in series
        for y in (s.y if s.kind == 'points' else s.y[max(1, len(s.y) // 10) :])
        if math.isfinite(y)
    ]
    return max(later) + 0.1 * (max(later) - min(later)) if later else None


def _metric_plots(runs: Sequence[RunData]) -> list[str]:
    """Every evaluation metric but the loss, against steps; gzip's line where it was measured."""
    out = []
    hidden = ('loss', *_COUNTS)
    for metric in dict.fromkeys(m for run in runs for m in run.metrics if m not in hidden):
        series = []
        for i, run in enumerate(runs):
            for j, (name, (x, y)) in enumerate(run.evals(metric).items()):
                if metric == 'accuracy':
                    y = [100 * v for v in y]
                label, colour = (run.name, i) if len(runs) > 1 else (name, j + 1)
                series.append(Series(label, x, y, colour, 'points'))
        gzip = runs[0].summary.get('gzip_bits_per_byte')
        if metric == 'bits_per_byte' and gzip:
            series.append(Series('gzip -9', [], [gzip], 5, 'rule'))
        words, unit = _words(metric).capitalize(), '%' if metric == 'accuracy' else ''
        out.append(line_plot(series, title=words, x_label='steps', y_label=unit))
    return out


def _curve_plots(run: RunData) -> list[str]:
    out = []
    for key, title, unit in _CURVES:
        x, y = run.column(key)
        if not any(math.isfinite(v) for v in y):
            continue
        noisy = key in ('tokens_per_second', 'grad_norm')
        series = _smoothed(x, y) if noisy else [Series('', *thin(x, y))]
        out.append(
            line_plot(series, title=title, x_label='steps', y_label=unit,
                      y_zero=key != 'loss_scale', y_max=_without_start(series))
        )  # fmt: skip
    return out


def _quality(run: RunData) -> list[str]:
    out = []
    evals = run.final_evals
    if evals:
        columns = run.metrics
        rows = [
            [name, *(_metric(c, values.get(c)) for c in columns)] for name, values in evals.items()
        ]
        out.append(page.table(rows, head=['evaluation', *map(_words, columns)]))
    else:
        out.append('<p class="soft">no evaluation yet</p>')
    gzip = run.summary.get('gzip_bits_per_byte')
    if gzip:
        out.append(f'<p>{html.escape(_gzip_sentence(evals, gzip))}</p>')
    if run.summary.get('sample'):
        out.append(f'<h2>Generated sample</h2><pre>{html.escape(run.summary["sample"])}</pre>')
    return out


def _gzip_sentence(evals: Mapping[str, Mapping[str, float]], gzip: float) -> str:
    text = f'gzip -9 takes {gzip:.3f} bits per byte on the held-out files'
    measured = {name: v for name, v in evals.items() if v.get('bits_per_byte')}
    if not measured:
        return f'{text}.'
    # gzip read every held-out file, so compare with the evaluation that covers most of them.
    name = max(measured, key=lambda name: measured[name].get('tokens', 0))
    ratio = measured[name]['bits_per_byte'] / gzip
    word = 'fewer' if ratio < 1 else 'more'
    return f'{text}; the model ({name}) takes {abs(1 - ratio):.1%} {word}.'


# ---- costs --------------------------------------------------------------------------------------


def _cost_tables(run: RunData) -> list[str]:
    ledger = run.summary.get('ledger') or {}
    out = [_parts_table(ledger)] if ledger.get('parts') else []
    out.append(_computed_table(run))
    clock = run.summary.get('clock') or {}
    if clock:
        out.append(_clock_table(clock))
    out.append(_memory_table(run))
    if len(ledger.get('stages') or {}) > 1:
        out.append(_stages_table(ledger['stages']))
    environment = run.summary.get('environment') or {}
    if environment:
        rows = [[str(k), str(v)] for k, v in environment.items() if v not in ('', None)]
        out.append(page.table(rows, caption='Environment', numbers=False))
    return out


def _parts_table(ledger: Mapping[str, Any]) -> str:
    """Model FLOPs by part of the model, and by purpose for passes without gradients."""
    parts = {**ledger['parts'], **(ledger.get('forward') or {})}
    whole = sum(parts.values())
    rows = [[name, page.si(f, 'FLOP'), page.percent(f, whole)] for name, f in parts.items() if f]
    rows.append(['all', page.si(whole, 'FLOP'), page.percent(whole, whole)])
    return page.table(
        rows, head=['part', 'model FLOPs', 'share'], caption='Model FLOPs by part', total=True
    )


def _computed_table(run: RunData) -> str:
    total = run.total
    model, hardware = total('model_flops'), total('hardware_flops')
    rows = [
        ['steps', page.integer(run.summary.get('final_step', run.last('step')))],
        ['examples', page.integer(total('examples'))],
        ['tokens seen', page.integer(total('tokens'))],
        ['tokens computed on', page.integer(total('tokens_computed'))],
        ['model FLOPs', page.si(model, 'FLOP')],
        ['hardware FLOPs', page.si(hardware, 'FLOP') if hardware else 'not known'],
    ]
    if model and hardware:
        rows.append(['hardware / model', f'{hardware / model:.3f}'])
    if total('optimizer_flops'):
        rows.append(['optimizer FLOPs', page.si(total('optimizer_flops'), 'FLOP')])
    evaluated = (total('eval') or {}) if run.summary else {}
    if evaluated.get('model_flops'):
        rows.append(['evaluation FLOPs', page.si(evaluated['model_flops'], 'FLOP')])
    wasted = total('wasted') or {}
    if wasted.get('steps'):
        rows.append(['done again after a kill', page.si(wasted['model_flops'], 'FLOP')])
    return page.table(rows, caption='Computed')


def _clock_table(clock: Mapping[str, Any]) -> str:
    kinds = {k: v for k, v in clock.items() if isinstance(v, int | float)}
    devices = clock.get('device_seconds') or {}
    whole = sum(kinds.values())
    rows = [
        [_KINDS.get(kind, kind), page.duration(s), page.percent(s, whole)]
        for kind, s in kinds.items()
    ]
    rows.append(['all', page.duration(whole), page.percent(whole, whole)])
    if devices and sum(devices.values()) > 1.001 * whole:
        for row, kind in zip(rows, [*kinds, None], strict=True):
            row.append(page.duration(devices[kind] if kind else sum(devices.values())))
    head = ['time', 'wall', 'share', 'device time'][: len(rows[0])]
    return page.table(rows, head=head, caption='Time', total=True)


_KINDS = {'data': 'waiting for data', 'eval': 'evaluation', 'train': 'training'}


def _memory_table(run: RunData) -> str:
    memory = run.summary.get('memory') or {}
    compiled = memory.get('compiled') or {}
    rows = [[f'step, {kind} (compiled)', page.size(v)] for kind, v in compiled.items()]
    rows.append(['device, peak measured', page.size(memory.get('device_peak_bytes'))])
    rows.append(['host, peak resident', page.size(memory.get('host_peak_bytes'))])
    joules = run.summary.get('joules')
    rows.append(['energy', 'no meter' if joules is None else page.si(joules, 'J')])
    tokens = run.total('tokens')
    if joules and tokens:
        rows.append(['energy a token', page.significant(1e3 * joules / tokens, 3) + ' mJ'])
    return page.table(rows, caption='Memory and energy')


def _stages_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name, page.integer(s['steps']), page.si(s['tokens']), page.si(s['model_flops'], 'FLOP')]
        for name, s in stages.items()
    ]
    head = ['stage', 'steps', 'tokens', 'model FLOPs']
    return page.table(rows, head=head, caption='Stages')


def _mfu_sentence(run: RunData) -> str:
    if not run.summary:
        return 'Times, memory and utilisation are known when the run has ended.'
    utilisation = run.summary.get('mfu')
    if not utilisation:
        device = (run.summary.get('environment') or {}).get('device', 'this device')
        return f'No MFU: no peak known for {device}.'
    text = f'MFU {100 * utilisation["mfu"]:.1f} %: {utilisation["convention"]}.'
    if utilisation.get('hfu') is not None:
        text += f' With rematerialisation (hardware FLOPs): {100 * utilisation["hfu"]:.1f} %.'
    return text


def _train_seconds(run: RunData) -> float | None:
    seconds = run.last('seconds')
    if seconds is None:
        return (run.summary.get('clock') or {}).get('train')
    return seconds


# ---- details ------------------------------------------------------------------------------------


def _details(run: RunData) -> list[str]:
    out = []
    for title in ('data', 'execution'):
        if run.summary.get(title):
            out.append(_folded(title.capitalize(), run.summary[title]))
    if run.config:
        out.append(_folded('Config', run.config))
    return out


def _folded(title: str, data: Any) -> str:
    text = data if isinstance(data, str) else json.dumps(data, indent=2, ensure_ascii=False)
    return (
        f'<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>'
    )


# ---- several runs -------------------------------------------------------------------------------


def _comparison_page(runs: Sequence[RunData]) -> list[str]:
    runs = _told_apart(runs)
    seen = dict.fromkeys(m for run in runs for m in run.metrics)
    metrics = [m for m in seen if m not in _COUNTS]
    rows = []
    for run in runs:
        first: Mapping[str, float] = next(iter(run.final_evals.values()), {})
        joules = run.summary.get('joules')
        utilisation = run.summary.get('mfu')
        rows.append([
            run.name,
            page.integer(run.summary.get('final_step', run.last('step'))),
            page.si(run.summary.get('params')),
            *(_metric(m, first.get(m)) for m in metrics),
            page.si(run.total('tokens')),
            page.si(run.total('model_flops'), 'FLOP'),
            page.si(run.total('hardware_flops'), 'FLOP'),
            page.duration(_train_seconds(run)),
            page.si(joules, 'J'),
            page.percent(utilisation['mfu'], 1) if utilisation else 'no peak known',
        ])  # fmt: skip
    head = ['run', 'steps', 'parameters', *map(_words, metrics), 'tokens', 'model FLOPs',
            'hardware FLOPs', 'training time', 'energy', 'MFU']  # fmt: skip
    draw = functools.partial(_loss_plots, runs)
    notes = [f'{run.name}: {_status(run)}' for run in runs if not run.summary]
    return [
        f'<h1>{len(runs)} runs</h1>',
        *(f'<div class="warn">{html.escape(note)}</div>' for note in notes),
        page.table(rows, head=head),
        '<p class="soft">Evaluations are the first of each run. Runs of different budgets are '
        'compared fairly at their ends only: before, learning rates have not decayed.</p>',
        '<h2>Loss</h2>',
        page.plots_with_log_switch(draw(log_x=False), draw(log_x=True)),
        page.plots(_metric_plots(runs)),
    ]


def _told_apart(runs: Sequence[RunData]) -> list[RunData]:
    """Numbers runs whose folders have one name."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f'{run.name} ({names[:i].count(run.name) + 1})')
        if names.count(run.name) > 1
        else run
        for i, run in enumerate(runs)
    ]


# ---- numbers and files --------------------------------------------------------------------------


def _against(column: str) -> str:
    return {'step': 'steps', 'model_flops': 'model FLOPs', 'seconds': 'seconds'}[column]


def _words(metric: str) -> str:
    return metric.replace('_', ' ')


def _metric(name: str, value: Any) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return '–'
    if name == 'accuracy':
        return f'{100 * value:.2f} %'
    if name in _COUNTS:
        return page.integer(value)
    return f'{value:.4f}' if abs(value) < 1000 else page.significant(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _read_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Returns whole rows in order of their steps, the last of each step, and the damaged count."""
    rows: dict[int, dict[str, Any]] = {}
    damaged = 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[int(row['step'])] = row
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return [rows[step] for step in sorted(rows)], damaged


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m effjax.report',
        description="Writes a run's report, or one page that compares several runs.",
    )
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run (its --workdir)')
    parser.add_argument(
        '--output', metavar='FILE', help='page to write when comparing (default: comparison.html)'
    )
    args = parser.parse_args(argv)
    try:
        if len(args.runs) == 1 and not args.output:
            path = write(args.runs[0])
        else:
            path = write_comparison(args.runs, args.output or 'comparison.html')
    except (EffjaxError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == '__main__':
    sys.exit(main())
