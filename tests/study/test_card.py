"""Method cards and the table of verdicts: numbers from studies, prose from people, none stale."""

import dataclasses
import importlib.util
import math
import pathlib
import re
import tomllib

import pytest

from effjax.core.errors import StudyError
from effjax.study import card, markdown, report
from effjax.study.records import Interval, Ratio

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROW = {
    'title': 'Gated <ffn>', 'paper': 'arXiv 1', 'base': 'configs/lm.py', 'tests': ['tests/a.py'],
    'config': ['model.block=parallel', 'model.mixer.kv_heads=1'], 'verdict': 'not measured',
}  # fmt: skip
FOLDER = 'experiments/ffn'


def catalogue(**studies):
    """Three methods; `palm=[...]` names the studies of one."""
    names = ('palm', 'simplified_block', 'albert')
    rows = {name: {**ROW, 'studies': studies.get(name, [])} for name in names}
    return {name.replace('_', '-'): row for name, row in rows.items()}


MEASURED = catalogue(palm=[FOLDER], simplified_block=[f'{FOLDER}/study.py'])


def tool():
    spec = importlib.util.spec_from_file_location('verdicts', ROOT / 'tools' / 'verdicts.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_are_current():
    stale = [
        str(path.relative_to(ROOT))
        for path, text in tool().pages().items()
        if not path.is_file() or path.read_text(encoding='utf-8') != text
    ]
    assert not stale, f'run: python tools/verdicts.py   ({", ".join(stale)})'


def test_every_method_is_in_the_table_and_says_so_where_it_is_not_measured():
    page = (ROOT / 'docs' / 'verdicts.md').read_text()
    for method, row in card.catalogue().items():
        assert f'\n| {method} | ' in page
        line = next(line for line in page.splitlines() if line.startswith(f'| {method} |'))
        assert ('not measured' in line) == (not row['studies'])


def test_a_card_of_an_unmeasured_method():
    text = card.render('palm', {}, methods=MEASURED)
    assert text.startswith('**Verdict.** not measured. <!--')
    assert '\n# Gated <ffn>\n' in text
    assert '--config=configs/lm.py\n--config.model.block=parallel\n--config.model.mixer' in text
    assert 'Saving at equal quality: **not measured**.' in text
    for word in ('What', 'Paper', 'Config', 'Cost', 'Tests'):
        assert f'**{word}.**' in text
    assert card.render('palm', {}, text, MEASURED) == text


def test_a_card_of_a_measured_method(make_analysis):
    text = card.render('palm', {FOLDER: make_analysis()}, methods=MEASURED)
    first = text.splitlines()[0]
    assert first.startswith('**Verdict.** swiglu saves 12.7 % (9.6 to 15.8) of the model FLOPs')
    assert '(10.0M parameters, 32.8M tokens of Python source; NVIDIA H200). <!--' in first
    assert f'](../../{FOLDER}/results/report.md)' in text
    for words in ('12.7 % (9.6 to 15.8 %)', '1.15x (1.11x to 1.19x)', 'source charged', '| 3 |'):
        assert words in text
    assert 'parallel-block' not in text  # another method's arm
    other = card.render('simplified-block', {FOLDER: make_analysis()}, methods=MEASURED)
    assert 'is untuned: its best' in other
    assert 'swiglu' not in other


def test_prose_survives_and_numbers_follow(make_analysis):
    study = make_analysis()
    text = card.render('palm', {}, methods=MEASURED)
    edited = text.replace('**What.** Gated <ffn>.', '**What.** My own words.\n\nA paragraph.')
    edited += '\nWritten after the numbers.\n'
    once = card.render('palm', {FOLDER: study}, edited, MEASURED)
    assert 'My own words.\n\nA paragraph.\n' in once
    assert 'Written after the numbers.' in once
    assert 'not measured' not in once
    assert once.count('**Verdict.**') == once.count(card.BEGIN) == once.count(card.END) == 1
    assert card.render('palm', {FOLDER: study}, once, MEASURED) == once
    back = card.render('palm', {}, once, MEASURED)
    assert 'My own words.' in back
    assert '12.7 %' not in back


def test_a_card_of_before_that_ended_in_its_verdict():
    old = '# Title\n\n**What.** Words.\n\n**Tests.** `tests/a.py`.\n\n**Verdict.** not yet.\n'
    text = card.render('palm', {}, old, MEASURED)
    assert text.startswith('**Verdict.** not measured.')
    assert text.count('**Verdict.**') == 1
    assert '# Title\n\n**What.** Words.\n\n**Tests.** `tests/a.py`.\n\n<!--' in text


def test_several_studies_of_one_method(make_analysis):
    studies = {
        FOLDER: make_analysis(),
        'experiments/large': make_analysis(name='large', scale='124M parameters', device=''),
    }
    text = card.verdict('palm', studies, MEASURED)
    assert text.count('swiglu saves 12.7 %') == 2
    assert '(124M parameters; several kinds of device)' in text
    page = card.verdicts_page(studies, MEASURED, ['palm'])
    rows = [line for line in page.splitlines() if line.startswith('| palm |')]
    assert len(rows) == 2
    assert '[card](methods/palm.md), [study](../experiments/large/results/report.md)' in rows[1]


def test_the_table(make_analysis):
    study = make_analysis(charged=False)
    page = card.verdicts_page({FOLDER: study}, MEASURED, ['palm', 'simplified-block'])
    assert '2 of 3 methods are measured.' in page
    rows = [line.strip('| ').split(' | ') for line in page.splitlines() if line.startswith('|')]
    assert rows[2][:6] == [
        'palm', 'win: 12.7 % (1.15x) of model FLOPs', '9.6 to 15.8 % (1.11x to 1.19x), n = 3',
        'NVIDIA H200', '10.0M parameters, 32.8M tokens of Python source', '2026-11-03',
    ]  # fmt: skip
    assert rows[3][1:3] == [
        'inconclusive: at most 0.0 % (at most 1.00x) of model FLOPs (untuned: parallel-block)',
        'outside the budgets run, n = 2',
    ]  # fmt: skip
    untried = {arm: {**row, 'tuning': None} for arm, row in study.arms.items()}
    page = card.verdicts_page({FOLDER: dataclasses.replace(study, arms=untried)}, MEASURED, [])
    assert '| palm | win: 12.7 % (1.15x) of model FLOPs (nothing tuned) |' in page
    untried['gelu'] = study.arms['gelu']
    page = card.verdicts_page({FOLDER: dataclasses.replace(study, arms=untried)}, MEASURED, [])
    assert '| palm | win: 12.7 % (1.15x) of model FLOPs (untuned: swiglu) |' in page
    assert rows[4] == ['albert', 'not measured', '–', '–', '–', '–', 'no card']
    (charged,) = [
        line
        for line in card.verdicts_page({FOLDER: make_analysis()}, MEASURED, []).splitlines()
        if line.startswith('| palm |')
    ]
    assert 'source free 12.7 % (1.15x), source charged 3.0 % (1.03x) of model FLOPs' in charged
    assert 'source charged -1.0 to 7.0 % (0.99x to 1.08x)' in charged


def test_what_could_not_be_told_reads_so(make_analysis):
    study = make_analysis(charged=False)
    refused = dataclasses.replace(
        study.comparisons[0], verdict='refused', at_equal_quality={}, sentence='Refused: data wait.'
    )
    study = dataclasses.replace(study, comparisons=[refused])
    page = card.verdicts_page({FOLDER: study}, MEASURED, [])
    assert '| palm | refused: cannot tell of model FLOPs | –, n = 3 |' in page


def test_published_results_are_small_and_complete(make_analysis, tmp_path):
    study = make_analysis()
    path = card.publish(study, tmp_path / FOLDER)
    assert path == tmp_path / FOLDER / 'results' / 'analysis.json'
    (again,) = card.stored(tmp_path).values()
    assert list(card.stored(tmp_path)) == [FOLDER]
    assert again.comparisons == study.comparisons
    assert [c.error for c in again.cells] == [c.error for c in study.cells]
    assert not any(c.curve for c in again.cells)
    assert path.stat().st_size < 100_000
    assert (path.parent / 'report.md').read_text() == markdown.render(again)


def test_the_catalogue_gets_its_verdicts_and_keeps_the_rest():
    text = "# Head.\n\n[a]\ntitle = 'verdict = no'\nverdict = 'old'\n\n[b-c]\nverdict = 'kept'\n"
    new = card.with_verdicts(text, {'a': "it's ± 4 %", 'b-c': 'kept'})
    assert tomllib.loads(new)['a']['verdict'] == "it's ± 4 %"
    assert new == text.replace("'old'", '"it\'s ± 4 %"')
    assert card.with_verdicts(text, {'a': 'new'}) == text.replace('old', 'new')


def test_the_tool_makes_all_of_it(make_analysis, tmp_path):
    (tmp_path / 'effjax').mkdir()
    (tmp_path / 'docs' / 'methods').mkdir(parents=True)
    # Studies of other methods are not in this copy.
    toml = re.sub(r'studies = \[.*\]', 'studies = []', card.CATALOGUE.read_text())
    toml = re.sub(r'(?s)(\[palm\].*?)studies = \[\]', rf"\1studies = ['{FOLDER}']", toml)
    (tmp_path / 'effjax' / 'methods.toml').write_text(toml)
    readme = tmp_path / 'docs' / 'methods' / 'README.md'
    readme.write_text(f'# Methods\n\n{card.BEGIN}\nold\n{card.END}\n\nAfter.\n')
    study = make_analysis()
    study.arms['parallel-block']['method'] = ''
    card.publish(study, tmp_path / FOLDER)
    pages = {str(p.relative_to(tmp_path)): t for p, t in tool().pages(['albert'], tmp_path).items()}
    assert sorted(pages) == [
        'docs/methods/README.md', 'docs/methods/albert.md', 'docs/methods/palm.md',
        'docs/verdicts.md', 'effjax/methods.toml', f'{FOLDER}/results/report.md',
    ]  # fmt: skip
    found = tomllib.loads(pages['effjax/methods.toml'])['palm']['verdict']
    assert found.startswith('swiglu saves 12.7 %')
    assert pages['docs/methods/palm.md'].startswith(f'**Verdict.** {found}.')
    assert 'win: source free 12.7 % (1.15x)' in pages['docs/verdicts.md']
    assert '| [palm](palm.md) | Mixer and feed-forward part' in pages['docs/methods/README.md']
    assert pages['docs/methods/README.md'].endswith('\n\nAfter.\n'.lstrip('\n'))
    for path, text in pages.items():
        (tmp_path / path).write_text(text)
    again = tool().pages([], tmp_path)
    assert {str(p.relative_to(tmp_path)): t for p, t in again.items()} == pages


# ---- bad input -----------------------------------------------------------------------------------


def test_unknown_method():
    with pytest.raises(StudyError, match=r"^no method 'plam'\. Did you mean 'palm'\?$"):
        card.render('plam', {}, methods=MEASURED)


@pytest.mark.parametrize('text', [f'# T\n{card.BEGIN}\n', f'# T\n{card.END}\n{card.BEGIN}\n'])
def test_a_marker_lost(text):
    with pytest.raises(StudyError, match=r'^docs/methods/palm\.md needs the lines .* put them'):
        card.render('palm', {}, text, MEASURED)


def test_a_card_without_a_heading():
    with pytest.raises(StudyError, match=r'no heading; add a line \"# Title\"\.$'):
        card.title('no heading here')


def test_catalogue_and_studies_must_name_each_other(make_analysis):
    studies = {FOLDER: make_analysis()}
    card.check(MEASURED, studies)
    with pytest.raises(StudyError, match=r"^experiments/ffn measured the method 'palm'; add"):
        card.check(catalogue(), studies)
    with pytest.raises(StudyError, match=r"row 'palm' lists 'experiments/ffn', which has no"):
        card.check(MEASURED, {})
    with pytest.raises(StudyError, match=r"row 'albert' lists .* but no arm of that study names"):
        card.check({**MEASURED, **catalogue(albert=[FOLDER]), 'palm': MEASURED['palm'],
                    'simplified-block': MEASURED['simplified-block']}, studies)  # fmt: skip
    studies[FOLDER].arms['swiglu']['method'] = 'plam'
    with pytest.raises(StudyError, match=r"arm 'swiglu' names .* Did you mean 'palm'\?$"):
        card.check(MEASURED, studies)


@pytest.mark.parametrize('text', ['{', '[]', '{"arms": {}}', '{"arms": {}, "comparisons": [{}]}'])
def test_a_file_that_holds_no_analysis(text, tmp_path):
    path = tmp_path / FOLDER / card.RESULTS
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(StudyError, match=r'analysis\.json holds no analysis of this version \('):
        card.stored(tmp_path)


def test_numbers_that_are_not_finite_are_stored_as_unknown(make_analysis, tmp_path):
    study = make_analysis(margin=math.inf)
    odd = dataclasses.replace(
        study.comparisons[0], detectable=math.nan,
        difference=Interval(0.1, math.nan, math.inf, math.nan, 2),
        at_equal_quality={'model_flops': Ratio(0.9, math.nan, math.nan, 2), 'tokens': None},
    )  # fmt: skip
    study = dataclasses.replace(study, comparisons=[odd])
    path = card.publish(study, tmp_path / FOLDER)
    assert not re.search(r'\b(NaN|Infinity)\b', path.read_text())
    report_ = (path.parent / 'report.md').read_text()
    assert '+0.1000 (no interval) | 3 | not known | 10.0 % | 1.11x |' in report_
    assert not re.search(r'\b(nan|inf|None)\b', report_)
    report.write(card.stored(tmp_path)[FOLDER], tmp_path)
    assert '| source free not known, ' in card.verdicts_page(card.stored(tmp_path), MEASURED, [])
