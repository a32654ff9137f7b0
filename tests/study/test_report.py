"""The report of a study, as a page and as Markdown: everything is said, and nothing is hidden."""

import dataclasses
import html
import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest

from effjax.study import markdown, records, report, tables
from effjax.study.records import COSTS, Interval, Ratio

CHROMIUM = (
    shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
)


class Text(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects what a reader sees."""

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.count = [], [], {}
        self.feed(page)
        assert not self.open
        self.text = ' '.join(self.words)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        assert tag != 'script'
        assert not {'src', 'href'} & {name for name, _ in attrs}
        if tag not in ('meta', 'input', 'br'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != 'style':
            self.words.append(' '.join(data.split()))


def page_of(study, folder):
    path = report.write(study, folder)
    assert path == folder / 'report.html'
    page = path.read_text(encoding='utf-8')
    assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)', page)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page)
    return Text(page)


@pytest.mark.parametrize('form', ['page', 'markdown'])
def test_everything_is_said(form, make_analysis, tmp_path):
    study = make_analysis()
    if form == 'page':
        text = page_of(study, tmp_path).text
        first = text.removeprefix('ffn_equal_flops – effjax study ')
    else:
        text = markdown.render(study).replace('\\', '')
        first = text
    assert first.startswith('swiglu saves 12.7 % (9.6 to 15.8) of the model FLOPs')
    for words in (
        'parallel-block against gelu: cannot tell at this size', 'win', 'inconclusive', '0.011',
        '12.7 % (9.6 to 15.8 %)', '1.15x (1.11x to 1.19x)', 'at most 0.0 %', 'at most 1.00x',
        'savings = 1 - Cm/Cb, source free', 'speed-up = Cb/Cm, source free', 'source charged',
        '3.0 % (-1.0 to 7.0 %)', '1.03x (0.99x to 1.08x)', 'no source', 'cannot tell',
        'untuned: the winner is at the edge of its grid', '0.003: did not end well',
        'schedule.peak', 'parallel-block is untuned', '2 of 45 runs did not end well', 'no pair',
        'RESOURCE_EXHAUSTED: out of memory | 9.1 GiB',
        'the loss is not finite at step 812; lower schedule.peak or raise warmup.', 'diverged',
        'final, seed 2, 100 % of the budget', 'NVIDIA H200', '--xla_gpu_deterministic_ops=true',
        'a1b2c3d4', '10.0M parameters', '2026-11-03', 'Does a gated feed-forward pay',
        'python -m effjax.compare experiments/ffn_equal_flops/study.py --workdir=runs/ffn',
        '--config.model.ffn.hidden=683', 'model.block=parallel', '60 %, 75 %, 90 %, 100 %',
    ):  # fmt: skip
        assert words in text, words
    for column in COSTS:
        assert tables.words(column) in text
    assert 'nan' not in re.findall(r'\w+', text)


def test_plots_of_the_page(make_analysis, tmp_path):
    study = make_analysis()
    page = page_of(study, tmp_path)
    assert page.count['svg'] == 3 + 2 * 6  # six costs, each also with a logarithmic axis
    for title in ('Paired differences', 'Final metric against budget', 'Against reference time'):
        assert title in page.text
    text = (tmp_path / 'report.html').read_text()
    budget = text.split('>Final metric against budget')[1].split('</svg>')[0]
    assert budget.count('class="dot') == 34  # 3 arms, 3 seeds, 4 budgets; two ended badly


def test_costs_are_means_at_the_full_budget_and_the_unknown_is_never_zero(make_analysis):
    study = make_analysis()
    rows = {row[0]: row[1:] for row in tables.costs(study).rows}
    assert list(rows) == [tables.words(column) for column in COSTS]
    assert rows['steps'] == ['2,000', '1,961', '0.981x', '2,128', '1.064x']
    assert rows['energy'] == ['not known'] * 5
    assert rows['peak memory'][0] == '8.75 GiB'
    # The diverged seed costs nothing known: the mean over its arm and the ratio are of the others.
    assert tables.mean_cost(study, 'gelu', 'seconds') == pytest.approx(0.051 * 2000 + 1)
    assert tables.mean_cost(study, 'parallel-block', 'seconds') == pytest.approx(
        0.051 * 2128 * 0.94 + 0.5
    )
    assert rows['training time'][-1] == f'{(0.051 * 2128 * 0.94 + 0.5) / (0.051 * 2000 + 0.5):.3f}x'


def test_when_a_run_ended_is_no_difference_of_environment(make_analysis):
    study = make_analysis()
    cells = [
        dataclasses.replace(c, environment={**c.environment, 'finished': f'2026-11-03T00:{i:02}'})
        for i, c in enumerate(study.cells)
    ]
    cells[0] = dataclasses.replace(cells[0], environment={**cells[0].environment, 'jax': '0.13.0'})
    rows = dict(tables.environment(dataclasses.replace(study, cells=cells)).rows)
    assert 'finished' not in rows
    assert rows['jax'] == '0.13.0; 0.12.0'


def test_failed_arms_keep_their_place(make_analysis, tmp_path):
    study = make_analysis(bad=False)
    blank = {'status': 'failed', 'error': 'no <memory>', 'value': None, 'curve': []}
    blank['costs'] = dict.fromkeys(COSTS)
    dead = [dataclasses.replace(c, **blank) if c.arm == 'swiglu' else c for c in study.cells]
    gone = dataclasses.replace(
        study.comparisons[0], verdict='failed', sentence='swiglu failed.', difference=None,
        pairs=[[s, 1.9, None] for s in study.seeds], detectable=None, at_equal_quality={},
        source_charged={}, spent={},
    )  # fmt: skip
    study = dataclasses.replace(study, cells=dead, comparisons=[gone, study.comparisons[1]])
    page = page_of(study, tmp_path)
    for words in ('swiglu failed.', 'no <memory>', 'no interval: fewer than two pairs', 'failed'):
        assert words in page.text
    rows = {row[0]: row[1:] for row in tables.costs(study).rows}
    assert rows['steps'][1:3] == ['not known', 'not known']
    assert [row[2:4] for row in tables.seeds(study).rows] == [['failed', 'no pair']] * 3
    assert 'no \\<memory>' in markdown.render(study)


def test_one_seed_no_curves_and_nothing_compared(make_analysis, tmp_path):
    study = make_analysis(seeds=(7,), bad=False)
    cells = [dataclasses.replace(c, curve=[]) for c in study.cells]
    bare = dataclasses.replace(study, cells=cells, comparisons=[], device='', commands=[])
    page = page_of(bare, tmp_path)
    for words in (
        'Nothing found yet: ffn_equal_flops has no arm to compare with gelu.',
        'several kinds of device', 'are not stored with this study', 'no data',
    ):  # fmt: skip
        assert words in page.text
    empty = dataclasses.replace(bare, cells=[], arms={'gelu': {}}, seeds=[], fractions=[])
    assert 'no data' in page_of(empty, tmp_path).text
    assert markdown.render(empty).startswith('Nothing found yet')


def test_a_cost_that_is_not_known_is_named_and_not_drawn(make_analysis, tmp_path):
    study = make_analysis()
    cells = [
        dataclasses.replace(c, curve=[{**row, 'hardware_flops': None} for row in c.curve])
        for c in study.cells
    ]
    page = page_of(dataclasses.replace(study, cells=cells), tmp_path)
    assert 'Not known here, so not drawn: hardware FLOPs.' in page.text
    assert 'Against hardware FLOPs' not in page.text


def test_a_metric_where_higher_is_better(make_analysis, tmp_path):
    study = make_analysis(lower_is_better=False, metric='accuracy', axis='joules')
    text = page_of(study, tmp_path).text
    assert 'better →' in text
    assert 'accuracy (higher is better)' in text
    assert 'Pareto: metric against energy' in text


def test_the_front_keeps_what_no_run_beats():
    points = [(1, 3.0), (2, 2.0), (2, 2.5), (3, 2.0), (4, 1.0), (4, 1.0), (5, 1.5)]
    assert report.front(points, lower_is_better=True) == [(1, 3.0), (2, 2.0), (4, 1.0)]
    assert report.front(points, lower_is_better=False) == [(1, 3.0)]
    assert report.front([], lower_is_better=True) == []


@pytest.mark.parametrize(
    ('ratio', 'savings', 'speedup'),
    [
        (Ratio(0.8, 0.7, 0.9, 3), '20.0 % (10.0 to 30.0 %)', '1.25x (1.11x to 1.43x)'),
        (Ratio(1.25, 1.2, 1.3, 3), '-25.0 % (-30.0 to -20.0 %)', '0.80x (0.77x to 0.83x)'),
        (Ratio(0.6, 0.6, 0.6, 3, 'at most'), 'at least 40.0 %', 'at least 1.67x'),
        (Ratio(1.0, 1.0, 1.0, 3, 'at least'), 'at most 0.0 %', 'at most 1.00x'),
        (
            Ratio(0.6, 0.6, 0.9, 3, 'at most', low_open=True),
            'about 40.0 % or more (10.0 to 40.0 % or more)',
            'about 1.67x or more (1.11x to 1.67x or more)',
        ),
        (
            Ratio(1.25, 1.1, 1.6, 3, high_open=True),
            '-25.0 % (-60.0 % or less to -10.0 %)',
            '0.80x (0.62x or less to 0.91x)',
        ),
        (Ratio(0.5, -0.1, 1.1, 2), '50.0 % (-10.0 to 110.0 %)', '2.00x (0.91x to no bound)'),
        (Ratio(0.5, math.nan, math.nan, 1), '50.0 %', '2.00x'),
        (None, 'cannot tell', 'cannot tell'),
    ],
)
def test_savings_and_speedup(ratio, savings, speedup):
    assert tables.with_interval(tables.savings, tables.savings_interval, ratio) == savings
    assert tables.with_interval(tables.speedup, tables.speedup_interval, ratio) == speedup


@pytest.mark.parametrize(
    ('found', 'text'),
    [
        (Interval(-0.0383, -0.0462, -0.0303, 0.003, 3), '-0.0383 (-0.0462 to -0.0303)'),
        (Interval(0.0, 0.0, 0.0, 0.0, 3), '0 (0 to 0)'),
        (Interval(12.345, 10.0, 14.69, 1.0, 3), '+12.3 (+10.0 to +14.7)'),
        (None, 'no interval: fewer than two pairs'),
    ],
)
def test_intervals(found, text):
    assert tables.interval(found) == text


def test_a_report_is_the_same_from_the_stored_analysis(make_analysis):
    study = make_analysis()
    again = records.analysis_from_json(json.loads(json.dumps(records.to_json(study))))
    assert again == study
    assert markdown.render(again) == markdown.render(study)


# ---- in a browser --------------------------------------------------------------------------------

# Only the copies that a test makes carry a script. The page stands in a frame as wide as a screen
# (a browser's window has a smallest width) and tells the outer page what it measured.
INNER = """<script>addEventListener('load', () => {
  document.querySelector('#logx').checked = LOG;
  document.querySelectorAll('details').forEach(d => d.open = true);
  const root = document.documentElement, outside = [];
  const plots = [...document.querySelectorAll('svg')].filter(p => p.clientWidth);
  for (const plot of plots) {
    const frame = plot.getBoundingClientRect();
    for (const t of plot.querySelectorAll('text')) {
      const box = t.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1) outside.push(t.textContent);
    }
  }
  const seen = {page: root.scrollWidth, window: root.clientWidth, outside, drawn: plots.length};
  parent.postMessage(JSON.stringify(seen), '*');
});</script>"""
OUTER = """<iframe src="inner.html" width="WIDTH" height="900" style="border:0"></iframe><script>
addEventListener('message', e => document.documentElement.dataset.measured = e.data);</script>"""


def measure(page, width, log, folder):
    """Returns what Chromium measured of a page on a screen of some width."""
    (folder / 'inner.html').write_text(page + INNER.replace('LOG', str(log).lower()))
    outer = folder / 'outer.html'
    outer.write_text(OUTER.replace('WIDTH', str(width)))
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--window-size=1600,1000',
               f'--user-data-dir={folder / "profile"}', '--virtual-time-budget=3000',
               '--dump-dom', outer.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    found = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here: widths of the page not measured')
@pytest.mark.parametrize(('width', 'log'), [(390, False), (1280, True)], ids=['phone', 'desktop'])
def test_the_page_fits_a_screen(width, log, make_analysis, tmp_path):
    long = 'an-arm-with-a-name-that-is-much-longer-than-a-name-should-be-and-does-not-end'
    saved = json.dumps(records.to_json(make_analysis())).replace('parallel-block', long)
    path = report.write(records.analysis_from_json(json.loads(saved)), tmp_path)
    measured = measure(path.read_text(), width, log, tmp_path)
    assert measured['window'] == pytest.approx(width, abs=20)  # a scroll bar may take some of it
    assert measured['page'] <= measured['window']
    assert measured['outside'] == []
    assert measured['drawn'] == 3 + 6
    wide = f'<div style="width:{width + 200}px">too wide</div>'
    broken = measure(path.read_text() + wide, width, log, tmp_path)
    assert broken['page'] > broken['window']  # the measure sees what it is for
