"""Plots as SVG text: axes, ticks, legend, light and dark; no library and no script.

`line_plot` (lines, marks, fronts) and `interval_plot` (means with intervals, one a row) return an
`<svg>` element for a page that includes `STYLE` once; `standalone` makes a file of it. Colours come
from classes, since an inline SVG follows the page's colour scheme.
"""

import dataclasses
import html
import itertools
import math
import re
import zlib
from collections.abc import Sequence

# Okabe and Ito's palette, told apart by the colour-blind; lighter on dark ground.
_LIGHT = ('#0072b2', '#d55e00', '#009e73', '#aa4499', '#b8860b', '#56606b')
_DARK = ('#5ab4f0', '#ff8f50', '#36c99f', '#e39bd0', '#f0c050', '#a8b3bf')


def _colours(palette: Sequence[str]) -> str:
    return ''.join(
        f'.plot .c{i}{{stroke:{c}}}.plot .f{i}{{fill:{c}}}' for i, c in enumerate(palette)
    )


STYLE = (
    '.plot text{font:12px system-ui,sans-serif;fill:#4a5560}'
    '.plot .title{font-size:14px;font-weight:600;fill:#1d252c}'
    '.plot .grid{stroke:#e4e8ec;stroke-width:1}.plot .frame{stroke:#9aa5b0;fill:none}'
    '.plot .line{fill:none;stroke-width:1.8;stroke-linejoin:round}'
    '.plot .faint{fill:none;stroke-width:1;opacity:.3}'
    '.plot .rule{fill:none;stroke-width:1.4;stroke-dasharray:6 4}'
    '.plot .ring{fill:none;stroke-width:1.6}.plot .dot{opacity:.75}'
    '.plot .bar{fill:none;stroke-width:2.4}.plot .band{fill:#e8edf2;stroke:none}'
    + _colours(_LIGHT)
    + '@media(prefers-color-scheme:dark){.plot text{fill:#a9b4bf}.plot .title{fill:#e6ebf0}'
    '.plot .grid{stroke:#2a323a}.plot .frame{stroke:#5a6570}'
    '.plot .band{fill:#232b33}' + _colours(_DARK) + '}'
)

_LEFT, _RIGHT, _BOTTOM = 66, 16, 44
_CHAR = 6.6  # width of a character at 12 px, on average


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
      name: for the legend; '' leaves it out.
      x, y: equally many numbers; points that are not finite are left out.
      colour: index into the palette (taken modulo its length).
      kind: 'line', 'faint' (thin and pale, for raw data), 'points' (a line with a mark at each
        point), 'dots' (marks alone), 'front' (a dashed line with an open ring at each point, to
        stand around the marks it joins) or 'rule' (a dashed horizontal line at y[0] across the
        plot).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    kind: str = 'line'


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of an `interval_plot`.

    Attributes:
      name: stands above the row.
      values: single values, each a mark; those that are not finite are left out.
      mean, low, high: of the bar; None draws none.
      colour: index into the palette.
    """

    name: str
    values: Sequence[float]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    colour: int = 0


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One axis: data range, pixels it is drawn on, and whether it is logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    spacing: float = 58.0  # pixels between ticks, at least

    def at(self, value: float) -> float:
        """Returns the pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(max(value, 1e-300)), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns (value, label) of each tick."""
        if self.log:
            values = log_ticks(self.low, self.high)
            return [(v, f'{v:,.0f}' if 1 <= v < 1e5 else _short(v)) for v in values]
        most = max(3, int(abs(self.end - self.start) / self.spacing) + 1)
        values = ticks(self.low, self.high, most)
        return list(zip(values, labels(values), strict=True))


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str = '',
    log_x: bool = False,
    y_max: float | None = None,
    y_zero: bool = False,
    width: int = 400,
    height: int = 290,
) -> str:
    """Draws lines over shared axes.

    Args:
      series: what to draw, later ones on top.
      title: shown above.
      x_label: with the unit.
      y_label: with the unit.
      log_x: logarithmic x axis; points at x <= 0 are left out.
      y_max: upper end of the y axis; lines above it leave the frame. None fits the data.
      y_zero: the y axis begins at 0.
      width, height: in pixels.

    Returns:
      An `<svg>` element as text.
    """
    series = [_clean(s, log_x) for s in series]
    series = [s for s in series if len(s.y)]
    legend, top = _legend(series, width)
    out = _head(title, width, height)
    if not any(s.kind != 'rule' for s in series):
        return ''.join([*out, _no_data(width, height), '</svg>'])
    x_axis = _Axis(*_x_range(series, log_x), _LEFT, width - _RIGHT, log_x)
    y_axis = _Axis(*_y_range(series, y_max, y_zero), height - _BOTTOM, top, spacing=27.0)
    out += [*legend, *_frame(x_axis, y_axis, x_label, y_label)]
    clip = f'clip{zlib.crc32("".join(out + legend).encode()):x}{"log" if log_x else ""}'
    out.append(
        f'<clipPath id="{clip}"><rect x="{_LEFT}" y="{top}" width="{x_axis.end - _LEFT + 5}" '
        f'height="{y_axis.start - top + 1}"/></clipPath><g clip-path="url(#{clip})">'
    )
    out += [_draw(s, x_axis, y_axis) for s in series]
    return ''.join([*out, '</g></svg>'])


def interval_plot(
    rows: Sequence[Row],
    *,
    title: str,
    x_label: str,
    margin: float = 0.0,
    width: int = 400,
) -> str:
    """Draws values and their mean with its interval, a row each, around a line at 0.

    Args:
      rows: from top to bottom.
      title: shown above.
      x_label: with the unit.
      margin: half the width of a band around 0, in the unit of the values; 0 draws none.
      width: in pixels; the height follows from the rows.

    Returns:
      An `<svg>` element as text.
    """
    height = 34 + 46 * max(1, len(rows)) + _BOTTOM
    margin = margin if math.isfinite(margin) else 0.0
    shown = [v for row in rows for v in (*row.values, row.mean, row.low, row.high)]
    values = [v for v in shown if v is not None and math.isfinite(v)]
    out = _head(title, width, height, 16)
    if not values:
        return ''.join([*out, _no_data(width, height), '</svg>'])
    low, high = min(*values, -margin, 0.0), max(*values, margin, 0.0)
    space = 0.06 * (high - low) or 0.5
    axis = _Axis(low - space, high + space, 16, width - 16, spacing=62.0)
    top, bottom = 30, height - _BOTTOM
    if margin:
        left, right = axis.at(-margin), axis.at(margin)
        out.append(
            f'<rect class="band" x="{left:.1f}" y="{top}" width="{right - left:.1f}" '
            f'height="{bottom - top}"/>'
        )
    for value, label in axis.ticks():
        at = axis.at(value)
        kind = 'frame' if value == 0 else 'grid'
        out.append(f'<path class="{kind}" d="M{at:.1f} {bottom}V{top}"/>')
        out.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    for i, row in enumerate(rows):
        out.append(_draw_row(row, axis, top + 46 * i))
    out.append(f'<path class="frame" d="M{axis.start} {bottom}H{axis.end}"/>')
    out.append(
        f'<text x="{width / 2}" y="{bottom + 36}" text-anchor="middle">'
        f'{html.escape(x_label)}</text></svg>'
    )
    return ''.join(out)


def standalone(svg: str, background: str = '#ffffff') -> str:
    """Returns an SVG file of a plot, light, on a background."""
    style = STYLE.partition('@media')[0]
    head, _, rest = svg.partition('>')
    fill = f'<rect width="100%" height="100%" fill="{background}"/>'
    return f'<?xml version="1.0"?>{head}><style>{style}</style>{fill}{rest}'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Returns at most `most` round values in [low, high], 1, 2 or 5 x 10^n apart."""
    power = math.floor(math.log10((high - low) / most)) - 1
    steps = (m * 10.0**n for n in itertools.count(power) for m in (1, 2, 5))
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    # An integer over a power of ten is the nearest float to the decimal that is meant.
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Returns tick labels with as many decimals as the distance of the ticks needs."""
    biggest = max((abs(v) for v in values), default=0.0)
    if biggest >= 1e6 or 0 < biggest < 1e-3:
        return ['0' if v == 0 else _short(v) for v in values]
    step = min((b - a for a, b in itertools.pairwise(values)), default=biggest or 1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f'{v:,.{decimals}f}' for v in values]


def _short(value: float) -> str:
    return re.sub(r'e\+?(-?)0*', r'e\1', f'{value:.3g}')


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten in [low, high], with 2 and 5 times them where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 7)):
        values = [f * 10.0**n for n in range(first, last + 1) for f in factors]
        values = [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(values) >= 4:
            break
    return values[:: 1 + len(values) // 9]


def smooth(y: Sequence[float], span: int) -> list[float]:
    """Returns the exponential moving average over about `span` points, without start-up bias."""
    keep, mean, weight, out = 1.0 - 2.0 / (max(1, span) + 1), 0.0, 0.0, []
    for value in y:
        if math.isfinite(value):
            mean, weight = keep * mean + value, keep * weight + 1.0
        out.append(mean / weight if weight else math.nan)
    return out


def thin(
    x: Sequence[float], y: Sequence[float], most: int = 400
) -> tuple[list[float], list[float]]:
    """Returns at most `most` points: the mean y of equal runs of neighbours, at their last x."""
    n = len(x)
    if n <= most:
        return list(x), list(y)
    edges = [i * n // most for i in range(most + 1)]
    spans = list(itertools.pairwise(edges))

    means = [math.fsum(y[a:b]) / (b - a) for a, b in spans]
    return [x[b - 1] for _, b in spans], means


def _head(title: str, width: int, height: int, left: int = _LEFT) -> list[str]:
    return [
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{html.escape(title)}">',
        f'<text class="title" x="{left}" y="18">{html.escape(title)}</text>',
    ]


def _no_data(width: int, height: int) -> str:
    return f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">no data</text>'


def _clean(s: Series, log_x: bool) -> Series:
    if s.kind == 'rule':
        return s if s.y and math.isfinite(s.y[0]) else dataclasses.replace(s, y=())
    pairs = [
        (x, y)
        for x, y in zip(s.x, s.y, strict=True)
        if math.isfinite(x) and math.isfinite(y) and not (log_x and x <= 0)
    ]
    return dataclasses.replace(s, x=[p[0] for p in pairs], y=[p[1] for p in pairs])


def _x_range(series: Sequence[Series], log: bool) -> tuple[float, float]:
    values = [v for s in series if s.kind != 'rule' for v in s.x]
    low, high = min(values), max(values)
    if log:
        return (low, high) if high > low else (low / 2, high * 2)
    if high > low and any(s.kind in ('dots', 'front') for s in series):
        space = 0.04 * (high - low)  # marks that stand alone must not be cut by the frame
        return low - space, high + space
    low = 0.0 if 0 <= low < high / 4 else low
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_range(series: Sequence[Series], most: float | None, zero: bool) -> tuple[float, float]:
    values = [v for s in series for v in (s.y[:1] if s.kind == 'rule' else s.y)]
    low, high = min(values), max(values)
    high = high if most is None else min(most, high)
    low = min(low, high)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return (min(0.0, low) if zero else low - margin), high + margin


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> list[str]:
    left, right, bottom, top = x_axis.start, x_axis.end, y_axis.start, y_axis.end
    out = []
    for value, label in x_axis.ticks():
        at = x_axis.at(value)
        out.append(f'<path class="grid" d="M{at:.1f} {bottom}V{top}"/>')
        out.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    for value, label in y_axis.ticks():
        at = y_axis.at(value)
        out.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/>')
        out.append(f'<text x="{left - 7}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    out.append(f'<path class="frame" d="M{left} {top}V{bottom}H{right}"/>')
    middle = (left + right) / 2
    out.append(
        f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    middle = (top + bottom) / 2
    out.append(
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f'{html.escape(y_label)}</text>'
    )
    return out


def _legend(series: Sequence[Series], width: int) -> tuple[list[str], int]:
    """Returns the legend's elements and the pixel at which the frame may begin."""
    out: list[str] = []
    x, y = _LEFT, 38
    named = [s for s in series if s.name]
    if not named:
        return [], 30
    for s in named:
        name = _fit(s.name, width - _RIGHT - _LEFT - 26)
        wide = 26 + _CHAR * len(name) + 14
        if x > _LEFT and x + wide > width - _RIGHT:
            x, y = _LEFT, y + 17
        colour = s.colour % len(_LIGHT)
        kind = 'rule' if s.kind in ('rule', 'front') else 'line'
        if s.kind != 'dots':
            out.append(f'<path class="{kind} c{colour}" d="M{x:.0f} {y - 4}h20"/>')
        if s.kind == 'front':
            out.append(f'<circle class="ring c{colour}" cx="{x + 10:.0f}" cy="{y - 4}" r="5"/>')
        if s.kind in ('points', 'dots'):
            out.append(f'<circle class="f{colour}" cx="{x + 10:.0f}" cy="{y - 4}" r="3"/>')
        out.append(f'<text x="{x + 26:.0f}" y="{y}">{html.escape(name)}</text>')
        x += int(wide)
    return out, y + 12


def _fit(name: str, pixels: float) -> str:
    """Returns a name, shortened in its middle where it is wider than so many pixels."""
    most = int(pixels / _CHAR)
    if len(name) <= most:
        return name
    return f'{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}'


def _draw(s: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    colour = s.colour % len(_LIGHT)
    if s.kind == 'rule':
        at = y_axis.at(s.y[0])
        return f'<path class="rule c{colour}" d="M{x_axis.start} {at:.1f}H{x_axis.end}"/>'
    marks = [(x_axis.at(x), y_axis.at(y)) for x, y in zip(s.x, s.y, strict=True)]
    out = ''
    if s.kind != 'dots':
        path = 'L'.join(f'{x:.1f} {y:.1f}' for x, y in marks)
        name = {'faint': 'faint', 'front': 'rule'}.get(s.kind, 'line')
        out = f'<path class="{name} c{colour}" d="M{path}"/>'
    if s.kind == 'front':
        out += ''.join(
            f'<circle class="ring c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>' for x, y in marks
        )
    if s.kind in ('points', 'dots'):
        kind = f'dot f{colour}' if s.kind == 'dots' else f'f{colour}'
        for (x, y), value, where in zip(marks, s.y, s.x, strict=True):
            out += (
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f'<title>{html.escape(s.name)}: {value:.5g} at {where:.6g}</title></circle>'
            )
    return out


def _draw_row(row: Row, axis: _Axis, top: float) -> str:
    """Returns a row: its name, its marks above, its mean and interval below them."""
    colour = row.colour % len(_LIGHT)
    name = html.escape(_fit(row.name, axis.end - axis.start))
    out = f'<text x="{axis.start}" y="{top + 13}">{name}</text>'
    for value in row.values:
        if math.isfinite(value):
            out += (
                f'<circle class="dot f{colour}" cx="{axis.at(value):.1f}" cy="{top + 23}" r="3.5">'
                f'<title>{html.escape(row.name)}: {value:.5g}</title></circle>'
            )
    ends = (row.mean, row.low, row.high)
    mean, low, high = (axis.at(v) if v is not None and math.isfinite(v) else None for v in ends)
    if low is not None and high is not None:
        out += (
            f'<path class="bar c{colour}" d="M{low:.1f} {top + 36}H{high:.1f}'
            f'M{low:.1f} {top + 31}v10M{high:.1f} {top + 31}v10"/>'
        )
    if mean is not None:
        out += f'<circle class="f{colour}" cx="{mean:.1f}" cy="{top + 36}" r="5"/>'
    return out
