"""The recall sweep as a table of published, ours and their difference, and a plot against state."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.costs import svg
from effjax.study import facts
from experiments.recall.cells import LENGTHS, MIXERS, VARIANTS, WIDTHS, Cell

_NAMES = [*MIXERS, *VARIANTS]
# mixer -> method of the catalogue whose card says what was found
METHODS = {
    'attention': 'self-attention', 'h3': 'h3', 'rwkv4': 'rwkv', 'hyena': 'hyena',
    'retnet': 'retnet', 'mamba': 'mamba', 'mamba2': 'mamba2', 'gla': 'gla',
    'gated_deltanet': 'gated-deltanet', 'rwkv7': 'rwkv7', 'based': 'based',
    'window': 'sparse-attention', 'linear_attention': 'linear-attention',
}  # fmt: skip
NEAR = 0.05  # a larger difference from a published cell has to be explained


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns published | ours | difference, a line a mixer and length, as Markdown."""
    found = {Cell(r['mixer'], r['length'], r['width']): r for r in rows}
    head = ['mixer', 'N', *(f'd = {d}' for d in WIDTHS)]
    out = [f'| {" | ".join(head)} |', f'| --- | ---: |{" ---: |" * len(WIDTHS)}']
    for mixer in _NAMES:
        for length in LENGTHS:
            cells = [Cell(mixer, length, d) for d in WIDTHS]
            if any(c in found for c in cells):
                shown = [_cell(c, found.get(c)) for c in cells]
                out.append(f'| {mixer} | {length} | {" | ".join(shown)} |')
    return '\n'.join(out)


def far(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the cells that differ from the published ones by more than `NEAR`, in words."""
    out = []
    for row in rows:
        cell = Cell(row['mixer'], row['length'], row['width'])
        if cell.published is not None and abs(row['accuracy'] - cell.published) > NEAR:
            unsure = '' if cell.sure else ' (its marker is half hidden in the figure)'
            out.append(
                f'{cell.mixer}, N = {cell.length}, d = {cell.width}: {row["accuracy"]:.2f} against '
                f'{cell.published:.2f}{unsure}'
            )
    return out


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns accuracy against decoding state in bytes, over all cells, as an SVG file."""
    series = []
    for i, mixer in enumerate(_NAMES):
        mine = sorted(
            (r['state_bytes'], r['accuracy'])
            for r in rows
            if r['mixer'] == mixer and r['state_bytes']
        )
        if mine:
            x, y = zip(*mine, strict=True)
            series.append(svg.Series(mixer, x, y, colour=i, kind='dots'))
    return svg.standalone(
        svg.line_plot(
            series, title='MQAR: accuracy against decoding state', x_label='state of a row, bytes',
            log_x=True, y_zero=True, width=720, height=460,
        )
    )  # fmt: skip


def write(rows: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> str:
    """Writes results.md and state.svg into a folder and returns the page."""
    rows = sorted(rows, key=lambda r: (_NAMES.index(r['mixer']), r['length'], r['width']))
    devices = ', '.join(sorted({r['device'] for r in rows}))
    total = len(MIXERS) * len(LENGTHS) * len(WIDTHS)
    out = [
        '# MQAR by the protocol of Zoology',
        '',
        f'{sum(r["mixer"] in MIXERS for r in rows)} of {total} cells, on {devices}. Accuracy on '
        '3,000 held-out rows, the best of four learning rates: ours, then the published figure and '
        'the difference (`~`: read off a marker that another one half hides).',
        '',
        table(rows),
    ]
    differing = far(rows)
    if differing:
        out += ['', f'Further than {NEAR} from the published cell:', '']
        out += [f'- {line}' for line in differing]
    out += ['', '## Learning rates', '', _rates(rows), '']
    text = '\n'.join(out)
    (folder / 'results.md').write_text(text)
    (folder / 'state.svg').write_text(plot(rows))
    dates = max((r.get('date', '') for r in rows), default='')
    facts.write(folder, 'Recall, MQAR by the protocol of Zoology', devices, dates, lines(rows))
    return text


def lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns method -> its accuracies at each length, for its card."""
    out = {}
    for mixer, method in METHODS.items():
        mine = {(r['length'], r['width']): r for r in rows if r['mixer'] == mixer}
        parts = []
        for length in LENGTHS:
            widths = [d for d in WIDTHS if (length, d) in mine]
            if widths:
                found = ' / '.join(f'{mine[length, d]["accuracy"]:.2f}' for d in widths)
                at = f'N = {length}, d = {" / ".join(map(str, widths))}'
                known = [Cell(mixer, length, d).published for d in widths]
                published = ' / '.join(f'{p:.2f}' for p in known if p is not None)
                parts.append(f'{found} at {at}' + (f' (published {published})' * bool(published)))
        if parts:
            out[method] = f'accuracy {"; ".join(parts)}'
    return out


def _cell(cell: Cell, row: Mapping[str, Any] | None) -> str:
    published = cell.published
    if row is None:
        return 'not run' if published is None else f'not run / {published:.2f}'
    ours = f'{row["accuracy"]:.2f}'
    if published is None:
        return ours
    mark = '' if cell.sure else '~'
    return f'{ours} / {mark}{published:.2f} / {row["accuracy"] - published:+.2f}'


def _rates(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0]['by_rate'])
    out = [
        f'| mixer | N | d | {" | ".join(names)} | steps |',
        f'| --- | ---: | ---: |{" ---: |" * (len(names) + 1)}',
    ]
    for r in rows:
        values = [
            'diverged' if n in r['diverged'] else f'{r["by_rate"][n]:.3f}' for n in r['by_rate']
        ]
        steps = f'{r["steps"]:,} of {r["of_steps"]:,}'
        out.append(
            f'| {r["mixer"]} | {r["length"]} | {r["width"]} | {" | ".join(values)} | {steps} |'
        )
    return '\n'.join(out)
