"""What a study's reports show, as plain tables: HTML, Markdown and method cards print the same.

Every number comes from the `Analysis`. What is not known reads 'not known', never 0, and a run that
did not end well keeps its place with its message.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from effjax.costs import page
from effjax.study.records import COSTS, Analysis, Cell, Comparison, Interval, Ratio, Tuning

UNKNOWN = 'not known'
UNTOLD = 'cannot tell'
NOT_MEASURED = 'not measured'
SAVINGS, SPEEDUP = 'savings = 1 - Cm/Cb', 'speed-up = Cb/Cm'

# Cost column -> (words, unit): '' counts, 's' seconds, 'bytes' in binary units, else SI prefixes.
_COLUMNS = {
    'steps': ('steps', ''),
    'tokens': ('tokens', ''),
    'tokens_computed': ('tokens computed on', ''),
    'examples': ('examples', ''),
    'model_flops': ('model FLOPs', 'FLOP'),
    'hardware_flops': ('hardware FLOPs', 'FLOP'),
    'optimizer_flops': ('optimizer FLOPs', 'FLOP'),
    'reference_seconds': ('reference time', 's'),
    'seconds': ('training time', 's'),
    'data_seconds': ('waiting for data', 's'),
    'compile_seconds': ('compilation', 's'),
    'eval_seconds': ('evaluation', 's'),
    'device_seconds': ('device time', 's'),
    'joules': ('energy', 'J'),
    'params': ('parameters', ''),
    'peak_bytes': ('peak memory', 'bytes'),
}
_STATUS = {'missing': 'not run yet'}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
      head: names of the columns; [] for pairs of a name and a text.
      rows: cells as plain text.
      numbers: the other columns are numbers; else text.
    """

    head: list[str]
    rows: list[list[str]]
    numbers: bool = True


# ---- tables -------------------------------------------------------------------------------------


def verdicts(study: Analysis) -> Table:
    """Returns what was found for each arm at the full budget."""
    rows = [
        [
            f'{c.arm} against {c.baseline}',
            c.verdict,
            interval(c.difference),
            str(pairs_done(c)),
            plain(c.detectable),
            with_interval(savings, savings_interval, c.at_equal_quality.get(study.axis)),
            with_interval(speedup, speedup_interval, c.at_equal_quality.get(study.axis)),
        ]
        for c in study.comparisons
    ]
    head = ['arm', 'verdict', f'difference in {study.metric} (95 % interval)', 'n',
            'smallest detectable', f'savings of {words(study.axis)}', 'speed-up']  # fmt: skip
    return Table(head, rows)


def at_equal_quality(study: Analysis) -> Table:
    """Returns savings and speed-up on every axis; two pairs of columns where a source is reused."""
    charged = any(c.source_charged for c in study.comparisons)
    head = ['arm', 'cost']
    for column in ('source free', 'source charged') if charged else ('',):
        head += [f'{name}, {column}' if column else name for name in (SAVINGS, SPEEDUP)]
    rows = []
    for c in study.comparisons:
        for axis in dict.fromkeys((*c.at_equal_quality, *c.source_charged)):
            ratio = c.at_equal_quality.get(axis)
            row = [c.arm, words(axis), *_both(ratio)]
            if charged:
                row += _both(c.source_charged.get(axis)) if c.source_charged else ['no source'] * 2
            rows.append([*row, UNKNOWN if ratio is None else str(ratio.n)])
    return Table([*head, 'n'], rows)


def budgets(study: Analysis) -> Table:
    """Returns each arm's mean metric at each share of the budget, and how many seeds ended well."""
    rows = []
    for share in sorted(study.fractions):
        row = [f'{100 * share:g} %']
        for arm in arms(study):
            at = [c.value for c in final(study, arm) if math.isclose(c.fraction, share)]
            ended = [v for v in at if v is not None]
            mean = value(math.fsum(ended) / len(ended)) if ended else UNKNOWN
            row.append(f'{mean} (n = {len(ended)})' if ended else UNKNOWN)
        rows.append(row)
    return Table([f'share of the budget, {study.metric}', *arms(study)], rows)


def costs(study: Analysis) -> Table:
    """Returns every ledger column: mean at the full budget of each arm, and over the baseline's."""
    head = ['at the full budget, mean', study.baseline]
    for c in study.comparisons:
        head += [c.arm, f'{c.arm} / {c.baseline}']
    rows = []
    for column in COSTS:
        row = [words(column), cost(column, mean_cost(study, study.baseline, column))]
        for c in study.comparisons:
            row.append(cost(column, mean_cost(study, c.arm, column)))
            row.append(_times(_spent(study, c, column)))
        rows.append(row)
    return Table(head, rows)


def tuning(study: Analysis) -> Table:
    """Returns how each arm's settings were chosen, and whether the grid held the best one."""
    rows = []
    for arm in arms(study):
        tuned: Tuning | None = study.arms[arm].get('tuning')
        if tuned is None:
            rows.append([arm, 'nothing', '', '', 'not tuned: its own settings'])
            continue
        tried = '; '.join(
            f'{x:g}: {"did not end well" if y is None else value(y)}'
            for x, y in zip(tuned.grid, tuned.values, strict=True)
        )
        state = f'untuned: {tuned.reason}' if tuned.reason else 'tuned'
        if tuned.edge:
            state = 'untuned: the winner is at the edge of its grid'
        rows.append([arm, tuned.key, tried, f'{tuned.chosen:g}', state])
    return Table(['arm', 'key', f'tried: {study.metric}', 'chosen', 'result'], rows, False)


def seeds(study: Analysis) -> Table:
    """Returns each seed's metric at the full budget, and its paired difference."""
    head = ['seed', study.baseline]
    for c in study.comparisons:
        head += [c.arm, f'{c.arm} - {c.baseline}']
    cells = {(cell.arm, cell.seed): cell for cell in full(study)}
    rows = []
    for seed in study.seeds:
        base = cells.get((study.baseline, seed))
        row = [str(seed), _outcome(base)]
        for c in study.comparisons:
            other = cells.get((c.arm, seed))
            row += [_outcome(other), _difference(base, other)]
        rows.append(row)
    return Table(head, rows)


def runs(study: Analysis) -> Table:
    """Returns every run, tuning and failed ones too."""
    columns = list(dict.fromkeys(('steps', study.axis, 'seconds')))
    rows = []
    for cell in study.cells:
        share = f'{100 * cell.fraction:g} %'
        status = _STATUS.get(cell.status, cell.status)
        row = [cell.arm, cell.phase, str(cell.seed), share, _settings(cell), status]
        rows.append(
            [*row, value(cell.value)] + [cost(column, cell.costs.get(column)) for column in columns]
        )
    head = ['arm', 'phase', 'seed', 'budget', 'settings', 'status', study.metric]
    return Table(head + [words(column) for column in columns], rows)


def failures(study: Analysis) -> Table:
    """Returns the runs that did not end well, with their messages; no rows where all did."""
    rows = [
        [
            cell.arm,
            f'{cell.phase}, seed {cell.seed}, {100 * cell.fraction:g} % of the budget',
            _STATUS.get(cell.status, cell.status),
            ' '.join(cell.error.split()) or 'no message',
        ]
        for cell in study.cells
        if cell.status != 'done'
    ]
    return Table(['arm', 'run', 'status', 'message'], rows, False)


def environment(study: Analysis) -> Table:
    """Returns device, versions and flags; all values where runs differ. When is no environment."""
    seen: dict[str, dict[str, None]] = {}
    for cell in study.cells:
        for key, found in cell.environment.items():
            if found not in ('', None) and key != 'finished':
                seen.setdefault(key, {})[str(found)] = None
    rows = [[key, '; '.join(values)] for key, values in seen.items()]
    rows += [['code version', study.code or UNKNOWN]]
    return Table([], rows, False)


def design(study: Analysis) -> Table:
    """Returns the study's question and rules."""
    better = 'lower' if study.lower_is_better else 'higher'
    budget = cost(study.axis, study.budget)
    rows = [
        ['question', study.question],
        ['metric', f'{study.metric} ({better} is better)'],
        ['equivalent within', f'± {plain(study.margin)}'],
        ['budget', f'{budget} of {words(study.axis)}'],
        ['shares of the budget', ', '.join(f'{100 * f:g} %' for f in study.fractions)],
        ['seeds', ', '.join(map(str, study.seeds))],
        *(
            [f'arm {arm}', ', '.join(study.arms[arm].get('changes') or ['no changes'])]
            for arm in arms(study)
        ),
        ['scale', study.scale or UNKNOWN],
        ['device', hardware(study)],
        ['date', study.date or UNKNOWN],
    ]
    return Table([], rows, False)


def commands(study: Analysis) -> list[tuple[str, list[str]]]:
    """Returns (what it makes, exact commands): of the whole study, then of each arm."""
    out = [('the study', list(study.commands))]
    out += [(f'arm {arm}', list(study.arms[arm].get('commands') or [])) for arm in arms(study)]
    return [(name, lines) for name, lines in out if lines]


def notes(study: Analysis) -> list[str]:
    """Returns what a reader must know, each once: failed runs, untuned arms, refusals."""
    bad = [cell for cell in study.cells if cell.status in ('diverged', 'failed')]
    out = list(study.notes) + [note for c in study.comparisons for note in c.notes]
    if bad:
        out.append(f'{len(bad)} of {len(study.cells)} runs did not end well; see below.')
    return list(dict.fromkeys(out))


def finding(study: Analysis) -> list[str]:
    """Returns the finding in words, a sentence an arm."""
    if study.comparisons:
        return [c.sentence.strip().rstrip('.') + '.' for c in study.comparisons]
    return [f'Nothing found yet: {study.name} has no arm to compare with {study.baseline}.']


# ---- parts of a study ---------------------------------------------------------------------------


def arms(study: Analysis) -> list[str]:
    """Returns the arms, the baseline first."""
    return sorted(study.arms, key=lambda arm: arm != study.baseline)


def final(study: Analysis, arm: str) -> list[Cell]:
    """Returns an arm's final runs that have a finite metric and ended well."""
    return [
        cell
        for cell in study.cells
        if cell.arm == arm and cell.phase == 'final' and cell.status == 'done' and known(cell.value)
    ]


def full(study: Analysis) -> list[Cell]:
    """Returns the final runs at the full budget, of every status."""
    most = max(study.fractions, default=1.0)
    return [c for c in study.cells if c.phase == 'final' and math.isclose(c.fraction, most)]


def mean_cost(study: Analysis, arm: str, column: str, seeds: Iterable[int] = ()) -> float | None:
    """Returns the mean over an arm's finished runs at the full budget, None where none is known."""
    chosen = set(seeds)
    found = [
        cell.costs.get(column)
        for cell in full(study)
        if cell.arm == arm and cell.status == 'done' and (not chosen or cell.seed in chosen)
    ]
    numbers = [v for v in found if v is not None and math.isfinite(v)]
    return math.fsum(numbers) / len(numbers) if numbers else None


def pairs_done(comparison: Comparison) -> int:
    """Returns how many pairs ended well."""
    return sum(known(base) and known(other) for _, base, other in comparison.pairs)


def untuned(study: Analysis, comparison: Comparison) -> str:
    """Returns what the tuning of a comparison leaves open: 'untuned: a and b', or ''."""
    sides = (comparison.baseline, comparison.arm)
    tunings: dict[str, Tuning | None] = {n: study.arms.get(n, {}).get('tuning') for n in sides}
    if not any(tunings.values()):
        return 'nothing tuned'
    open_ = [name for name, found in tunings.items() if found is None or found.untuned]
    return f'untuned: {" and ".join(open_)}' if open_ else ''


def hardware(study: Analysis) -> str:
    """Returns where the study ran."""
    return study.device or 'several kinds of device'


# ---- numbers ------------------------------------------------------------------------------------


def words(column: str) -> str:
    """Returns what a cost column is called."""
    return _COLUMNS.get(column, (column.replace('_', ' '), ''))[0]


def unit(column: str) -> str:
    """Returns a cost column's unit: '' for counts, 's', 'FLOP', 'J' or 'bytes'."""
    return _COLUMNS.get(column, ('', ''))[1]


def known(number: float | None) -> bool:
    """Returns whether there is a finite number."""
    return number is not None and math.isfinite(number)


def cost(column: str, amount: float | None) -> str:
    """Returns an amount of a cost column with its unit; 'not known' for None."""
    if amount is None or not math.isfinite(amount):
        return UNKNOWN
    kind = unit(column)
    if kind == 's':
        return page.duration(amount)
    if kind == 'bytes':
        return page.size(amount)
    return page.integer(round(amount)) if not kind and amount < 1e6 else page.si(amount, kind)


def value(number: float | None) -> str:
    """Returns a metric with four decimals, or more where it is small; 'not known' without one."""
    if number is None or not math.isfinite(number):
        return UNKNOWN
    return f'{number:.4f}' if 1e-2 <= abs(number) < 1e4 else page.significant(number, 5)


def plain(number: float | None) -> str:
    """Returns an amount with three significant digits and no trailing zeros."""
    if number is None or not math.isfinite(number):
        return UNKNOWN
    text = page.significant(number, 3)
    return text.rstrip('0').rstrip('.') if '.' in text and 'e' not in text else text


def interval(found: Interval | None) -> str:
    """Returns a mean difference with its bounds; 'no interval' for fewer than two pairs."""
    if found is None:
        return 'no interval: fewer than two pairs'
    if not known(found.mean):
        return UNKNOWN
    if not (known(found.low) and known(found.high)):
        return f'{signed(found.mean)} (no interval)'
    places = _places(max(abs(found.high - found.low) / 2, abs(found.mean) / 100))
    mean, low, high = (signed(v, places) for v in (found.mean, found.low, found.high))
    return f'{mean} ({low} to {high})'


def signed(number: float, places: int | None = None) -> str:
    """Returns a difference with its sign; zero has none."""
    places = _places(abs(number) / 100) if places is None else places
    return '0' if number == 0 else f'{number:+.{places}f}'


def savings(ratio: Ratio) -> str:
    """Returns `1 - Cm/Cb` in percent; 'at least' where the crossing lies outside the budgets."""
    return _bounded(ratio, f'{_percent(1 - ratio.ratio)} %')


def savings_interval(ratio: Ratio) -> str:
    """Returns the 95 % bounds of the savings, '' where there are none."""
    if ratio.beyond or not (known(ratio.low) and known(ratio.high)):
        return ''
    down, up = _open_ends(ratio)
    low, high = _percent(1 - ratio.high), _percent(1 - ratio.low)
    return f'{low} %{down} to {high} %{up}' if down else f'{low} to {high} %{up}'


def speedup(ratio: Ratio) -> str:
    """Returns `Cb/Cm`; 'at least' where the crossing lies outside the budgets."""
    return _bounded(ratio, _inverse(ratio.ratio))


def speedup_interval(ratio: Ratio) -> str:
    """Returns the 95 % bounds of the speed-up, '' where there are none."""
    if ratio.beyond or not (known(ratio.low) and known(ratio.high)):
        return ''
    down, up = _open_ends(ratio)
    return f'{_inverse(ratio.high)}{down} to {_inverse(ratio.low)}{up}'


def with_interval(number, bounds, ratio: Ratio | None) -> str:
    """Returns `number(ratio)`, with `bounds(ratio)` in brackets; 'cannot tell' for None."""
    if ratio is None or not known(ratio.ratio):
        return UNTOLD
    inside = bounds(ratio)
    return f'{number(ratio)} ({inside})' if inside else number(ratio)


def _both(ratio: Ratio | None) -> list[str]:
    """Savings and speed-up always stand together: each alone has been taken for the other."""
    return [
        with_interval(savings, savings_interval, ratio),
        with_interval(speedup, speedup_interval, ratio),
    ]


def _bounded(ratio: Ratio, amount: str) -> str:
    # A bound on what an arm needs is the opposite bound on what it saves.
    if ratio.bound and not ratio.beyond:
        return f'about {amount} or {"more" if ratio.bound == "at most" else "less"}'
    return {'at most': 'at least ', 'at least': 'at most '}.get(ratio.bound, '') + amount


def _open_ends(ratio: Ratio) -> tuple[str, str]:
    """Returns what follows the lower and the upper end of a saving or speed-up."""
    return (' or less' if ratio.high_open else ''), (' or more' if ratio.low_open else '')


def _percent(share: float) -> str:
    text = f'{100 * share:.1f}'
    return '0.0' if text == '-0.0' else text


def _inverse(ratio: float) -> str:
    return f'{1 / ratio:.2f}x' if ratio > 0 else 'no bound'


def _times(ratio: float | None) -> str:
    return UNKNOWN if ratio is None or not math.isfinite(ratio) else f'{ratio:.3f}x'


def _places(size: float) -> int:
    """Returns the decimals that show two digits of a number of this size."""
    return 4 if not size else min(9, max(0, 1 - math.floor(math.log10(size))))


def _spent(study: Analysis, comparison: Comparison, column: str) -> float | None:
    """Returns cost over the baseline's: as the analysis has it, else over the seeds of both."""
    if comparison.spent.get(column) is not None:
        return comparison.spent[column]
    done = [cell for cell in full(study) if cell.status == 'done']
    shared = {c.seed for c in done if c.arm == comparison.arm}
    shared &= {c.seed for c in done if c.arm == comparison.baseline}
    if not shared:
        return None
    own = mean_cost(study, comparison.arm, column, shared)
    base = mean_cost(study, comparison.baseline, column, shared)
    return own / base if own is not None and base else None


def _outcome(cell: Cell | None) -> str:
    if cell is None:
        return 'not run yet'
    if cell.status != 'done':
        return _STATUS.get(cell.status, cell.status)
    return value(cell.value)


def _difference(base: Cell | None, other: Cell | None) -> str:
    done = [c.value for c in (base, other) if c and c.status == 'done' and c.value is not None]
    return signed(done[1] - done[0]) if len(done) == 2 else 'no pair'


def _settings(cell: Cell) -> str:
    shown: Sequence[str] = [
        f'{key}={v:g}' if isinstance(v, float) else f'{key}={v}' for key, v in cell.settings.items()
    ]
    return ', '.join(shown)
