"""What a crossover measurement says: where each mixer begins to win, a table by length, plots."""

from collections.abc import Mapping, Sequence
from typing import Any

from effjax.costs import page, svg
from effjax.study import crossover, markdown
from effjax.study.crossover import Point
from effjax.study.tables import Table

CPU = (
    'Measured on a CPU: which mixer wins, and from where on, does not carry over to an '
    'accelerator; FLOPs and state do.'
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table of numbers."""
    return markdown.table(Table(list(head), [list(row) for row in rows]))


def verdicts(points: Sequence[Point], against: str) -> list[str]:
    """Returns, for every other mixer, from which length on it wins in time and in memory."""
    out = []
    for mixer in dict.fromkeys(p.mixer for p in points):
        if mixer == against:
            continue
        _, faster = crossover.crossing(points, mixer, against)
        _, smaller = crossover.crossing(points, mixer, against, 'peak_bytes')
        out.append(f'- **{mixer}** takes less time than {against} {faster}.')
        out.append(f'- **{mixer}** takes less memory than {against} {smaller}.')
    return out


def render(wanted: Mapping[str, Any], points: Sequence[Point], against: str) -> str:
    """Returns the page.

    Args:
      wanted: the measurement's conditions.
      points: what was measured.
      against: label of the mixer that others are compared with.
    """
    kind = 'causal' if wanted['causal'] else 'bidirectional'
    out = [
        f'# From which length on a mixer beats {against}',
        '',
        f'One {kind} layer of width {wanted["width"]}, {wanted["dtype"]}, forward and backward, '
        f'{wanted["tokens"]:,} tokens a step, on {wanted["device"]} (jax {wanted["jax"]}); medians '
        f'of up to {wanted["steps"]} steps in turns.',
        '',
        *([f'> {CPU}', ''] if wanted['backend'] == 'cpu' else []),
        *verdicts(points, against),
    ]
    for title, cell in (
        ('Forward and backward, ms', _time),
        ('Forward alone, ms', lambda p: _milli(p.forward_seconds)),
        ('Memory of the step', lambda p: page.size(p.peak_bytes)),
        ('Model FLOPs of the step', lambda p: page.si(p.flops)),
        ('Decoding state of one row', lambda p: page.size(p.state_bytes)),
    ):
        out += ['', f'## {title}', '', _by_length(points, cell)]
    ran = {p.mixer: p.ran for p in points if p.ran}
    if ran:
        out += ['', '## What ran', '', *(f'- {mixer}: {names}' for mixer, names in ran.items())]
    failed = [p for p in points if p.error]
    if failed:
        out += ['', '## What did not run', '']
        out += [f'- {p.mixer} at {p.length:,} tokens: {p.error}' for p in failed]
    return '\n'.join(out) + '\n'


def plots(points: Sequence[Point], against: str) -> dict[str, str]:
    """Returns name -> SVG file: time and memory relative to one mixer, and the decoding state."""
    mixers = list(dict.fromkeys(p.mixer for p in points))
    out = {}
    for name, value, title in (
        ('time', 'seconds', f'Time of forward and backward, {against} = 1'),
        ('memory', 'peak_bytes', f'Memory of the step, {against} = 1'),
    ):
        series = []
        for i, mixer in enumerate(mixers):
            found = crossover.ratio(points, mixer, against, value)
            xs = sorted(found)
            series.append(svg.Series(mixer, xs, [found[x] for x in xs], colour=i))
        out[name] = svg.standalone(
            svg.line_plot(
                series, title=title, x_label='tokens in a row', log_x=True, y_zero=True,
                width=720, height=420,
            )
        )  # fmt: skip
    series = []
    for i, mixer in enumerate(mixers):
        found = {
            p.length: p.state_bytes / 2**20 for p in points if p.mixer == mixer and p.state_bytes
        }
        xs = sorted(found)
        series.append(svg.Series(mixer, xs, [found[x] for x in xs], colour=i))
    out['state'] = svg.standalone(
        svg.line_plot(
            series, title='Decoding state of one row, MiB', x_label='tokens in a row', log_x=True,
            y_zero=True, width=720, height=420,
        )
    )  # fmt: skip
    return out


def _by_length(points: Sequence[Point], cell: Any) -> str:
    mixers = list(dict.fromkeys(p.mixer for p in points))
    lengths = sorted({p.length for p in points})
    at = {(p.mixer, p.length): p for p in points}
    rows = []
    for length in lengths:
        found = [at.get((mixer, length)) for mixer in mixers]
        rows.append([f'{length:,}', *('-' if p is None else cell(p) for p in found)])
    return _table(['tokens', *mixers], rows)


def _time(point: Point) -> str:
    if point.seconds is None:
        return 'no memory' if point.error else '-'
    return f'{_milli(point.seconds)} ±{50 * (point.spread or 0.0):.0f} %'


def _milli(seconds: float | None) -> str:
    return '-' if seconds is None else page.significant(1e3 * seconds, 3)
