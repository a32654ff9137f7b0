"""The report of a study as Markdown: what the page says, without its plots."""

from collections.abc import Sequence

from effjax.study import tables
from effjax.study.records import Analysis


def render(analysis: Analysis) -> str:
    """Returns the report; its first line is the finding."""
    study = analysis
    out = [' '.join(map(text, tables.finding(study))), '', f'# {text(study.name)}', '']
    about = f'{study.scale}, on {tables.hardware(study)}, {study.date}'
    out += [text(about) + '.', *(f'\n> {text(note)}' for note in tables.notes(study))]
    for title, shown in (
        ('Verdict', tables.verdicts(study)),
        ('At equal quality', tables.at_equal_quality(study)),
        ('Final metric against budget', tables.budgets(study)),
        ('Cost', tables.costs(study)),
        ('Tuning', tables.tuning(study)),
        ('Seeds', tables.seeds(study)),
        ('Runs that did not end well', tables.failures(study)),
        ('Every run', tables.runs(study)),
        ('Study', tables.design(study)),
        ('Environment', tables.environment(study)),
    ):
        if shown.rows:
            out += ['', f'## {title}', '', table(shown)]
    out += ['', '## Commands']
    for name, lines in tables.commands(study):
        out += ['', f'{text(name).capitalize()}:', '', '```', *lines, '```']
    return '\n'.join(out) + '\n'


def table(shown: tables.Table) -> str:
    """Returns a Markdown table; numbers are aligned to the right."""
    width = max(len(row) for row in (shown.head, *shown.rows))
    head = [*shown.head, *[''] * (width - len(shown.head))]
    rule = ['---'] + ['---:' if shown.numbers else '---'] * (width - 1)
    return '\n'.join(_line(row) for row in (head, rule, *shown.rows))


def text(words: str) -> str:
    """Returns words on one line, safe in a table and in running text."""
    joined = ' '.join(words.split())
    for sign in '\\|*_`<':
        joined = joined.replace(sign, f'\\{sign}')
    return joined


def _line(cells: Sequence[str]) -> str:
    return f'| {" | ".join(c if c.strip("-:") == "" else text(c) for c in cells)} |'
