"""A self-contained HTML page: style, tables and numbers as people read them. No script."""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

from effjax.costs import svg

_STYLE = """
:root{color-scheme:light dark;--ink:#1d252c;--soft:#5b6670;--ground:#fff;--card:#f5f7f9;
--edge:#dde3e8;--warn:#8a4b00;--warnground:#fff4e0;--shade:#1d252c44}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9aa6b2;--ground:#14181c;
--card:#1c2228;--edge:#303941;--warn:#ffc56b;--warnground:#33270f;--shade:#000a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1160px;padding:28px 22px 60px;background:var(--ground);
color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:25px;margin:0 0 2px;overflow-wrap:anywhere}
@media(max-width:600px){h1{font-size:20px}body{padding:20px 16px 40px}}
h2{font-size:18px;margin:36px 0 10px}
.soft{color:var(--soft)}p{margin:6px 0}
.cards{display:flex;flex-wrap:wrap;gap:10px;margin:18px 0}
.card{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:9px 15px;
min-width:128px}
.card b{display:block;font-size:20px;font-weight:600;font-variant-numeric:tabular-nums}
.results{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));gap:10px;
margin:18px 0}
.results .card{min-width:0}.results table{margin:6px 0 0}.results tr:last-child td{border:0}
.results td,.results td:first-child{padding:3px 10px 3px 0;white-space:normal;
overflow-wrap:break-word}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(345px,100%),1fr));gap:14px;
margin:10px 0 14px}
.plots svg{width:100%;height:auto;border:1px solid var(--edge);border-radius:8px;padding:8px}
.tables{columns:340px 3;column-gap:30px}.tables>div{break-inside:avoid;padding-bottom:6px}
table{border-collapse:collapse;width:100%;margin:8px 0 16px}
.wide{overflow-x:auto;background:linear-gradient(90deg,var(--ground) 40%,transparent) 0 0,
linear-gradient(270deg,var(--ground) 40%,transparent) 100% 0,
linear-gradient(90deg,var(--shade),transparent) 0 0,
linear-gradient(270deg,var(--shade),transparent) 100% 0;background-repeat:no-repeat;
background-size:44px 100%,44px 100%,16px 100%,16px 100%;
background-attachment:local,local,scroll,scroll}
caption{text-align:left;font-weight:600;padding:4px 0}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--edge);
vertical-align:top;overflow-wrap:anywhere}
td:first-child{white-space:nowrap}th{color:var(--soft);font-weight:500}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th,th.n{white-space:normal;overflow-wrap:normal;vertical-align:bottom}
.text td{min-width:7.5em;overflow-wrap:break-word}
.text td:nth-child(3),.text td:last-child{min-width:12em}
tr.sum td{font-weight:600}
pre{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:12px 14px;
overflow-x:auto;font:13px/1.45 ui-monospace,monospace;white-space:pre-wrap}
.warn{background:var(--warnground);color:var(--warn);border-radius:8px;padding:9px 14px;
margin:10px 0}
summary{cursor:pointer;color:var(--soft)}
label{cursor:pointer;color:var(--soft)}
.log{display:none}#logx:checked~.lin{display:none}#logx:checked~.log{display:grid}
"""

_PREFIXES = ('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y')


def document(title: str, body: Iterable[str]) -> str:
    """Returns a whole page that needs nothing from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{html.escape(title)}</title><style>{_STYLE}{svg.STYLE}</style></head>\n<body>\n'
        + '\n'.join(body)
        + '\n</body></html>\n'
    )


def table(
    rows: Sequence[Sequence[str]],
    *,
    head: Sequence[str] = (),
    caption: str = '',
    total: bool = False,
    numbers: bool = True,
) -> str:
    """Returns a table whose first column names the rows.

    Args:
      rows: cells as plain text, escaped here.
      head: names of the columns.
      caption: shown above.
      total: the last row is a sum, set bold.
      numbers: the other columns are numbers, aligned to the right; else text.
    """
    several = not numbers and any(len(row) > 2 for row in rows)
    out = [f'<div class="wide"><table{" class=text" if several else ""}>']
    if caption:
        out.append(f'<caption>{html.escape(caption)}</caption>')
    if head:
        out.append(f'<tr>{_cells(head, "th", numbers)}</tr>')
    for i, row in enumerate(rows):
        kind = ' class="sum"' if total and i == len(rows) - 1 else ''
        out.append(f'<tr{kind}>{_cells(row, "td", numbers)}</tr>')
    return ''.join([*out, '</table></div>'])


def cards(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns a row of headline numbers, (value, what it is)."""
    inner = ''.join(
        f'<div class="card"><b>{html.escape(value)}</b><span class="soft">{html.escape(name)}'
        '</span></div>'
        for value, name in pairs
    )
    return f'<div class="cards">{inner}</div>'


def results(found: Iterable[tuple[str, str, Sequence[Sequence[str]]]]) -> str:
    """Returns a box for each result: (word, what it is about, rows of name and text)."""
    out = []
    for word, about, rows in found:
        lines = ''.join(f'<tr>{_cells(row, "td", False)}</tr>' for row in rows)
        out.append(
            f'<div class="card"><b>{html.escape(word)}</b><span class="soft">'
            f'{html.escape(about)}</span><table>{lines}</table></div>'
        )
    return f'<div class="results">{"".join(out)}</div>'


def plots_with_log_switch(linear: Sequence[str], logarithmic: Sequence[str]) -> str:
    """Returns plots with a check box, in plain CSS, that makes their x axes logarithmic."""
    return (
        '<div><input type="checkbox" id="logx"> <label for="logx">logarithmic x axis</label>'
        f'<div class="plots lin">{"".join(linear)}</div>'
        f'<div class="plots log">{"".join(logarithmic)}</div></div>'
    )


def plots(drawn: Sequence[str]) -> str:
    """Returns plots side by side."""
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ''


def scale(biggest: float) -> tuple[float, str]:
    """Returns the (divisor, SI prefix) that brings a number to 1..1000."""
    power = 0
    while biggest >= 999.95 and power < len(_PREFIXES) - 1:
        biggest /= 1000
        power += 1
    return 1000.0**power, _PREFIXES[power]


_TIMES = ((3600.0, 'hours'), (60.0, 'minutes'), (1.0, 'seconds'))


def in_unit(
    series: Sequence[svg.Series], words: str, unit: str = ''
) -> tuple[list[svg.Series], str]:
    """Returns series with x in a readable unit, and the axis label that names it.

    Args:
      series: what will be drawn; x in `unit`.
      words: what x is.
      unit: 's' for seconds, another for SI prefixes before it ('FLOP'), '' for plain numbers.
    """
    biggest = max((x for s in series for x in s.x if math.isfinite(x)), default=0.0)
    divisor, prefix = scale(biggest)
    label = f'{words} {prefix}{unit}' + ('' if unit == 'J' else 's')
    if unit == 's':
        divisor, name = next((d, n) for d, n in _TIMES if biggest >= 3 * d or d == 1)
        label = f'{words} ({name})'
    elif not unit:
        divisor, label = 1.0, words
    scaled = [dataclasses.replace(s, x=[x / divisor for x in s.x]) for s in series]
    return scaled, label


def si(value: float | None, unit: str = '', digits: int = 4) -> str:
    """Returns a number with an SI prefix: 3.142 PFLOP; a dash for None."""
    if value is None:
        return '–'
    divisor, prefix = scale(abs(value))
    text = significant(value / divisor, digits)
    if not divisor > 1 and float(value).is_integer():
        text = f'{value:.0f}'
    return f'{text} {prefix}{unit}'.strip()


def significant(value: float, digits: int = 4) -> str:
    """Returns a number with so many significant digits, with an exponent only where it must."""
    if value == 0:
        return '0'
    exponent = math.floor(math.log10(abs(float(f'{value:.{digits - 1}e}'))))
    if not -5 < exponent < 7:
        return f'{value:.{digits - 1}e}'
    return f'{value:,.{max(0, digits - 1 - exponent)}f}'


def integer(value: float | None) -> str:
    """Returns a count with separators: 124,439,808; a dash for None."""
    return '–' if value is None else f'{int(value):,}'


def size(value: float | None) -> str:
    """Returns bytes in binary units: 1.50 GiB; a dash for None."""
    if value is None:
        return '–'
    for unit in ('bytes', 'KiB', 'MiB', 'GiB'):
        if abs(value) < 1024:
            return f'{value:.0f} bytes' if unit == 'bytes' else f'{value:.2f} {unit}'
        value /= 1024
    return f'{value:.2f} TiB'


def duration(seconds: float | None) -> str:
    """Returns seconds as people say them: 0.42 s, 4 min 12 s, 3 h 05 min; a dash for None."""
    if seconds is None:
        return '–'
    if seconds < 59.95:
        return f'{seconds:.2f} s' if seconds < 10 else f'{seconds:.1f} s'
    whole = round(seconds)
    if whole < 3600:
        return f'{whole // 60} min {whole % 60:02d} s'
    minutes = round(seconds / 60)
    return f'{minutes // 60:,} h {minutes % 60:02d} min'


def percent(part: float, whole: float) -> str:
    """Returns a share with one decimal: 12.3 %; a dash where there is no whole."""
    return f'{100 * part / whole:.1f} %' if whole else '–'


def _cells(cells: Sequence[str], tag: str, numbers: bool) -> str:
    return ''.join(
        f'<{tag}{" class=n" if i and numbers else ""}>{html.escape(cell)}</{tag}>'
        for i, cell in enumerate(cells)
    )
