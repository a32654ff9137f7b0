"""Method cards and the table of verdicts, made from the catalogue and the studies' stored results.

A study's results stand in `experiments/<study>/results/analysis.json` (`publish` writes them), and
`effjax/methods.toml` says which studies measured a method: all numbers in the documents come from
these two, and `python tools/verdicts.py` writes them. What a person wrote in a card stays.
"""

import dataclasses
import json
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core.errors import StudyError
from effjax.core.registry import suggest
from effjax.study import markdown, tables
from effjax.study.commands import shown
from effjax.study.records import Analysis, Comparison, Ratio, analysis_from_json, to_json
from effjax.training.files import plain, write_json_atomic, write_text_atomic

CATALOGUE = pathlib.Path(__file__).resolve().parents[1] / 'methods.toml'
RESULTS = 'results/analysis.json'
REPORT = 'results/report.md'
BEGIN, END = '<!-- measured: begin, by tools/verdicts.py -->', '<!-- measured: end -->'
_BY = '<!-- by tools/verdicts.py -->'
_LINE = re.compile(r'^\*\*Verdict\.\*\*.*\n?', re.MULTILINE)
_NONE = '–'

# The studies of the repository: folder of a study, relative to the root -> its analysis.
Studies = Mapping[str, Analysis]


def publish(analysis: Analysis, folder: str | pathlib.Path) -> pathlib.Path:
    """Writes a study's results into its folder, small enough to commit, and the report beside them.

    The evaluations during runs are left out; all runs, failed ones too, and their ends are kept.
    Of paths the names stay, without the folders of this machine.

    Args:
      analysis: of the study.
      folder: `experiments/<study>`.

    Returns:
      The path of `results/analysis.json`.

    Raises:
      OSError: the folder is unwritable.
    """
    path = pathlib.Path(folder) / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dataclasses.replace(cell, curve=[]) for cell in analysis.cells]
    saved = shown(plain(to_json(dataclasses.replace(analysis, cells=cells))))
    write_json_atomic(path, saved)
    # From what is stored, so that the report can be made again from it and is then the same.
    report = markdown.render(analysis_from_json(saved))
    write_text_atomic(pathlib.Path(folder) / REPORT, report)
    return path


def stored(root: str | pathlib.Path) -> dict[str, Analysis]:
    """Returns the published studies under `root/experiments`, by folder relative to `root`.

    Raises:
      StudyError: a file that holds no analysis.
    """
    root = pathlib.Path(root)
    out = {}
    for path in sorted((root / 'experiments').rglob(RESULTS)):
        try:
            analysis = analysis_from_json(json.loads(path.read_text(encoding='utf-8')))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(
                f'{path} holds no analysis of this version ({error}); run the study again with '
                '--report_only.'
            ) from error
        out[path.parents[1].relative_to(root).as_posix()] = analysis
    return out


def catalogue(file: str | pathlib.Path = CATALOGUE) -> dict[str, dict[str, Any]]:
    """Returns id -> row of `effjax/methods.toml`."""
    return tomllib.loads(pathlib.Path(file).read_text(encoding='utf-8'))


def check(methods: Mapping[str, Mapping[str, Any]], analyses: Studies) -> None:
    """Checks that catalogue and studies name each other.

    Raises:
      StudyError: a study of a method that does not list it, a method that lists a study without
        results, or one that has no arm of that method.
    """
    for folder, study in analyses.items():
        for arm, row in study.arms.items():
            method = row.get('method')
            if method and method not in methods:
                raise StudyError(
                    f'{folder}: arm {arm!r} names the method {method!r}, which effjax/methods.toml '
                    'does not have.' + suggest(method, methods)
                )
            listed = [_folder(path) for path in methods[method]['studies']] if method else []
            if method and arm != study.baseline and folder not in listed:
                raise StudyError(
                    f'{folder} measured the method {method!r}; add {folder!r} to the studies of '
                    'its row in effjax/methods.toml.'
                )
    for method, fields in methods.items():
        for path in fields['studies']:
            folder = _folder(path)
            if folder not in analyses:
                raise StudyError(
                    f'effjax/methods.toml: row {method!r} lists {path!r}, which has no {RESULTS}; '
                    'run the study and publish it, or take it off the list.'
                )
            if all(row.get('method') != method for row in analyses[folder].arms.values()):
                raise StudyError(
                    f'effjax/methods.toml: row {method!r} lists {path!r}, but no arm of that study '
                    f'names the method; set method={method!r} in the arm, or take it off the list.'
                )


def verdict(
    method_id: str, analyses: Studies, methods: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """Returns a method's verdict in one line: what studies found, else what the catalogue says.

    Args:
      method_id: a key of `effjax/methods.toml`.
      analyses: the published studies.
      methods: the catalogue; None reads it.
    """
    found = [
        f'{c.sentence.strip().rstrip(".")} ({study.scale}; {tables.hardware(study)})'
        for _, study, c in measured(method_id, analyses)
    ]
    return '; '.join(found) or (catalogue() if methods is None else methods)[method_id]['verdict']


def measured(method_id: str, analyses: Studies) -> list[tuple[str, Analysis, Comparison]]:
    """Returns (folder, study, comparison) of each arm that is this method."""
    return [
        (folder, study, c)
        for folder, study in analyses.items()
        for c in study.comparisons
        if study.arms[c.arm].get('method') == method_id
    ]


def render(
    method_id: str,
    analyses: Studies,
    existing_text: str = '',
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    facts: Sequence[str] = (),
) -> str:
    """Returns a method card: the verdict, what a person wrote, and what was measured.

    Args:
      method_id: a key of `effjax/methods.toml`.
      analyses: the published studies; those without this method are passed over.
      existing_text: the card as it stands; '' makes one from the catalogue's row.
      methods: the catalogue; None reads it.
      facts: lines of what else was measured of it, from `facts.stored`.

    Raises:
      StudyError: an unknown method, or a card with one of its two markers missing.
    """
    methods = catalogue() if methods is None else methods
    if method_id not in methods:
        raise StudyError(f'no method {method_id!r}.' + suggest(method_id, methods))
    prose = _prose(method_id, existing_text) if existing_text.strip() else _new(methods[method_id])
    line = f'**Verdict.** {verdict(method_id, analyses, methods)}. {_BY}'
    return '\n'.join([line, '', prose.strip(), '', *_measured(method_id, analyses, facts), ''])


def verdicts_page(
    analyses: Studies, methods: Mapping[str, Mapping[str, Any]], cards: Sequence[str]
) -> str:
    """Returns docs/verdicts.md: every method of the catalogue, measured ones first.

    Args:
      analyses: the published studies.
      methods: the catalogue.
      cards: ids of the methods that have a card.
    """
    rows: list[list[str]] = []
    blank: list[list[str]] = []
    for method in methods:
        link = f'[card](methods/{method}.md)' if method in cards else 'no card'
        found = [_row(method, *of, link) for of in measured(method, analyses)]
        rows += found
        if not found:
            blank.append([method, tables.NOT_MEASURED, *[_NONE] * 4, link])
    head = ['method', 'saving at equal quality', 'interval', 'hardware', 'scale', 'date', 'card']
    lines = [f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *rows, *blank)]
    count = f'{len(methods) - len(blank)} of {len(methods)} methods are measured.'
    return '\n'.join([_PAGE, count, '', *lines, ''])


_PAGE = f"""# Verdicts

Made by `python tools/verdicts.py` from the results of the studies in `experiments/` and from
`effjax/methods.toml`. {tables.SAVINGS} and {tables.SPEEDUP}, where Cb is what the baseline
spends and Cm what the method needs for the same quality; intervals are 95 %. A row holds for its
hardware and scale and says nothing of others. What an unmeasured method is known to do stands on
its card.
"""


def index(titles: Mapping[str, str], verdicts: Mapping[str, str], existing_text: str) -> str:
    """Returns docs/methods/README.md with its table made anew.

    Args:
      titles: id -> title of each card.
      verdicts: id -> verdict.
      existing_text: the page, with the two markers around its table.

    Raises:
      StudyError: a marker is missing.
    """
    before, after = _around('docs/methods/README.md', existing_text)
    rows = ['| id | technique | verdict |', '|---|---|---|']
    rows += [
        f'| [{name}]({name}.md) | {markdown.text(title)} | {markdown.text(verdicts[name])} |'
        for name, title in titles.items()
    ]
    page = [before.rstrip(), '', BEGIN, '', *rows, '', END, after.strip()]
    return '\n'.join(page).rstrip() + '\n'


def title(card: str) -> str:
    """Returns a card's heading.

    Raises:
      StudyError: it has none.
    """
    for line in card.splitlines():
        if line.startswith('# '):
            return line[2:].strip()
    raise StudyError(f'the card that begins {card[:60]!r} has no heading; add a line "# Title".')


def with_verdicts(toml: str, verdicts: Mapping[str, str]) -> str:
    """Returns the catalogue's text with each row's verdict set; all else stays as written."""
    out, row = [], ''
    for line in toml.splitlines():
        heading = re.fullmatch(r'\[([\w-]+)\]\s*', line)
        row = heading[1] if heading else row
        stale = line.startswith('verdict = ') and row in verdicts
        if stale and tomllib.loads(line)['verdict'] != verdicts[row]:
            line = f'verdict = {_quoted(verdicts[row])}'
        out.append(line)
    return '\n'.join(out) + '\n'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if "'" in text else f"'{text}'"


def _folder(path: str) -> str:
    """A row may list a study by its folder or by a file in it."""
    pure = pathlib.PurePosixPath(path)
    return (pure.parent if pure.suffix else pure).as_posix()


# ---- cards --------------------------------------------------------------------------------------


def _around(name: str, text: str) -> tuple[str, str]:
    """Returns what stands before and after the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise StudyError(
            f'{name} needs the lines {BEGIN!r} and {END!r} once each, in this order, around what '
            'is made for it; put them back.'
        )
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]


def _prose(method_id: str, text: str) -> str:
    """Returns what a person wrote in a card."""
    if BEGIN in text or END in text:
        before, after = _around(f'docs/methods/{method_id}.md', text)
        text = f'{before.rstrip()}\n\n{after.strip()}'
    return _LINE.sub('', text)


def _new(row: Mapping[str, Any]) -> str:
    config = '\n'.join([f'--config={row["base"]}', *(f'--config.{c}' for c in row['config'])])
    tests = '; '.join(f'`{path}`' for path in row['tests'])
    return (
        f'# {row["title"]}\n\n**What.** {row["title"]}.\n\n**Paper.** {row["paper"]}.\n\n'
        f'**Config.**\n\n```\n{config}\n```\n\n**Cost.** `--dry_run` prints it for this config, '
        f'part by part.\n\n**Tests.** {tests}.'
    )


def _measured(method_id: str, analyses: Studies, facts: Sequence[str]) -> list[str]:
    found = measured(method_id, analyses)
    out = [BEGIN, '', '## Measured', '']
    if not found:
        out += [
            f'Saving at equal quality: **{tables.NOT_MEASURED}**. No study has run it against a '
            'baseline with the same budget.',
            '',
        ]
    for folder in dict.fromkeys(folder for folder, _, _ in found):
        mine = [c for at, _, c in found if at == folder]
        out += _study(folder, dataclasses.replace(analyses[folder], comparisons=mine))
    if facts:
        out += ['Also measured:', '', *facts, '']
    return [*out, END]


def _study(folder: str, study: Analysis) -> list[str]:
    """Returns a study's part of a card; its comparisons are the method's alone."""
    where = f'{study.scale}; {tables.hardware(study)}; {study.date}'
    notes = [note for c in study.comparisons for note in c.notes]
    return [
        f'[{markdown.text(study.name)}](../../{folder}/{REPORT}): {markdown.text(where)}.',
        '',
        *(f'- {markdown.text(line)}' for line in (*tables.finding(study), *notes)),
        '',
        markdown.table(tables.verdicts(study)),
        '',
        markdown.table(tables.at_equal_quality(study)),
        '',
    ]


# ---- the table ----------------------------------------------------------------------------------


def _row(method: str, folder: str, study: Analysis, c: Comparison, link: str) -> list[str]:
    free = c.at_equal_quality.get(study.axis)
    saving, bounds = _saving(free), _bounds(free)
    if c.source_charged:
        charged = c.source_charged.get(study.axis)
        saving = f'source free {saving}, source charged {_saving(charged)}'
        bounds = f'source free {bounds}, source charged {_bounds(charged)}'
    doubt = tables.untuned(study, c)
    found = f'{c.verdict}: {saving} of {tables.words(study.axis)}' + (
        f' ({doubt})' if doubt else ''
    )
    cells = [method, found, f'{bounds}, n = {tables.pairs_done(c)}',
             tables.hardware(study), study.scale, study.date]  # fmt: skip
    return [*map(markdown.text, cells), f'{link}, [study](../{folder}/{REPORT})']


def _saving(ratio: Ratio | None) -> str:
    if ratio is None or not tables.known(ratio.ratio):
        return tables.UNTOLD
    return f'{tables.savings(ratio)} ({tables.speedup(ratio)})'


def _bounds(ratio: Ratio | None) -> str:
    if ratio is None or not tables.known(ratio.ratio):
        return _NONE
    inside = tables.savings_interval(ratio)
    if not inside:
        return 'outside the budgets run' if ratio.bound else tables.UNKNOWN
    return f'{inside} ({tables.speedup_interval(ratio)})'
