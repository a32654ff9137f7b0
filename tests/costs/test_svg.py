"""Plots: round ticks, right decimals, and well-formed SVG whatever the data."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from effjax.costs.svg import (
    Row,
    Series,
    interval_plot,
    labels,
    line_plot,
    log_ticks,
    smooth,
    standalone,
    thin,
    ticks,
)

SVG = '{http://www.w3.org/2000/svg}'


@pytest.mark.parametrize(
    ('low', 'high', 'most', 'expected'),
    [
        (0, 10, 6, ['0', '2', '4', '6', '8', '10']),
        (0.1, 0.31, 4, ['0.1', '0.2', '0.3']),
        (1.83, 1.91, 5, ['1.84', '1.86', '1.88', '1.90']),
        (0, 3e-3, 4, ['0.000', '0.001', '0.002', '0.003']),
        (0, 3e-4, 4, ['0', '0.0001', '0.0002', '0.0003']),
        (0, 4.1e6, 5, ['0', '1e6', '2e6', '3e6', '4e6']),
        (-2, 2, 5, ['-2', '-1', '0', '1', '2']),
        (0, 25_000, 6, ['0', '5,000', '10,000', '15,000', '20,000', '25,000']),
    ],
)
def test_ticks_and_labels(low, high, most, expected):
    assert labels(ticks(low, high, most)) == expected


def test_ticks_lie_inside_and_are_few():
    for n in range(-9, 10):
        for mantissa in (1.0, 1.37, 2.5, 6.4, 9.99):
            low, high = 3.3 * 10.0**n, (3.3 + mantissa) * 10.0**n
            for most in (2, 4, 7):
                values = ticks(low, high, most)
                assert len(values) <= most
                assert all(low * (1 - 1e-9) <= v <= high * (1 + 1e-9) for v in values)
            assert len(ticks(low, high, 6)) >= 2


def test_log_ticks():
    assert log_ticks(1, 10_000) == [1, 10, 100, 1000, 10_000]
    assert log_ticks(3, 90) == [5, 10, 20, 50]
    assert len(log_ticks(1e-3, 1e15)) <= 10
    assert log_ticks(1, 1e4)[0] == 1


def test_smooth_is_a_mean_without_bias_at_the_start():
    assert smooth([4.0] * 5, 10) == pytest.approx([4.0] * 5)
    assert smooth([1.0, math.nan, 3.0], 1) == [1.0, 1.0, 3.0]
    assert math.isnan(smooth([math.nan], 3)[0])


def test_thin_keeps_the_mean_and_the_end():
    x, y = thin(range(1, 1001), range(1, 1001), 100)
    assert len(x) == 100
    assert (x[-1], sum(y) / 100) == (1000, 500.5)
    assert thin([1], [2]) == ([1], [2])


def plot(series, **options):
    text = line_plot(series, title='a < b & c', x_label='steps', **options)
    return ET.fromstring(text), text


def drawn(root):
    """Coordinates of the first line."""
    path = root.find(f'{SVG}g/{SVG}path').get('d')
    return [tuple(map(float, pair.split())) for pair in path.strip('M').split('L')]


def test_lines_stand_where_the_axes_say():
    root, _ = plot([Series('one', [0, 50, 100], [1.0, 2.0, 3.0])], width=400, height=300)
    (x0, y0), (x1, y1), (x2, y2) = drawn(root)
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y0 > y2  # upwards is less in SVG
    at = {t.text: float(t.get('x')) for t in root.iter(f'{SVG}text') if t.text and t.get('x')}
    assert at['0'] == pytest.approx(x0)
    assert at['100'] == pytest.approx(x2)


def test_log_axis_spaces_decades_evenly_and_leaves_out_zero():
    root, _ = plot([Series('one', [0, 1, 10, 100], [9, 1.0, 2.0, 3.0])], log_x=True)
    xs = [x for x, _ in drawn(root)]
    assert len(xs) == 3
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1)  # coordinates have one decimal


def test_y_max_cuts_and_clips():
    root, text = plot([Series('one', range(100), [100.0] + [1.0] * 99)], y_max=2.0)
    assert root.find(f'{SVG}clipPath') is not None
    assert 'clip-path="url(#' in text
    assert '100.0' not in [t.text for t in root.iter(f'{SVG}text')]


def test_marks_legend_and_rule():
    series = [
        Series('valid', [1, 2], [1.0, 0.5], 1, 'points'),
        Series('', [1, 2], [1.0, 0.5], 0, 'faint'),
        Series('gzip <-9>', [], [0.8], 5, 'rule'),
    ]
    root, text = plot(series)
    assert len(root.findall(f'{SVG}g/{SVG}circle')) == 2
    assert 'valid: 0.5 at 2' in text
    assert 'gzip &lt;-9&gt;' in text
    assert 'a &lt; b &amp; c' in text


@pytest.mark.parametrize(
    'series',
    [
        [],
        [Series('none', [], [])],
        [Series('nan', [1, 2], [math.nan, math.inf])],
        [Series('only a rule', [], [1.0], kind='rule')],
    ],
)
def test_no_data_says_so(series):
    root, _ = plot(series)
    assert 'no data' in [t.text for t in root.iter(f'{SVG}text')]


@pytest.mark.parametrize(
    'series',
    [
        [Series('one point', [5], [2.0])],
        [Series('flat', [1, 2, 3], [0.0, 0.0, 0.0])],
        [Series('flat and tiny', [1, 2], [1e-30, 1e-30])],
        [Series('huge', [1e24, 3e24], [1e200, 2e200])],
        [Series('gap', [1, 2, 3], [1.0, math.nan, 2.0])],
        [Series('negative', [-3, -1], [-5.0, -2.0])],
    ],
)
@pytest.mark.parametrize('log_x', [False, True])
def test_any_data_gives_finite_coordinates(series, log_x):
    _, text = plot(series, log_x=log_x)
    assert not re.search(
        r'\b(nan|inf)\b', re.sub(r'<title>.*?</title>|aria-label="[^"]*"', '', text)
    )


def test_a_long_legend_wraps():
    many = [Series(f'a rather long name {i}', [1, 2], [i, i + 1.0], i) for i in range(6)]
    root, _ = plot(many)
    heights = {t.get('y') for t in root.iter(f'{SVG}text') if (t.text or '').startswith('a rather')}
    assert len(heights) > 1


def test_a_name_wider_than_the_plot_is_shortened():
    root, _ = plot([Series('arm ' * 40 + 'end', [1, 2], [1, 2])])
    (name,) = (t.text for t in root.iter(f'{SVG}text') if (t.text or '').startswith('arm'))
    assert len(name) < 60
    assert '…' in name
    assert name.endswith('end')


def test_marks_alone_have_no_line_and_keep_off_the_frame():
    root, _ = plot([Series('runs', [60, 100], [2.0, 1.0], 1, 'dots')], width=400)
    assert root.find(f'{SVG}g/{SVG}path') is None
    at = [float(c.get('cx')) for c in root.findall(f'{SVG}g/{SVG}circle')]
    assert at[0] > 66 + 3
    assert at[1] < 400 - 16 - 3


def test_a_front_rings_its_points_and_joins_them_with_dashes():
    root, _ = plot([Series('best', [1, 2, 3], [3.0, 2.0, 1.0], 5, 'front')])
    rings = [c for c in root.findall(f'{SVG}g/{SVG}circle') if 'ring' in c.get('class')]
    assert len(rings) == 3
    assert root.find(f'{SVG}g/{SVG}path').get('class') == 'rule c5'
    assert drawn(root)[0] == (float(rings[0].get('cx')), float(rings[0].get('cy')))


def intervals(rows, **options):
    text = interval_plot(rows, title='a < b', x_label='difference', **options)
    return ET.fromstring(text), text


def test_an_interval_stands_around_its_mean_and_the_zero_line_between():
    root, text = intervals(
        [Row('one & two', [-0.3, -0.1], -0.2, -0.4, 0.0), Row('far', [0.4], 0.4, 0.1, 0.7, 1)],
        margin=0.05,
    )
    left, middle, right = (float(c.get('cx')) for c in list(root.iter(f'{SVG}circle'))[:3])
    assert left < right < middle  # two values, then the mean between them
    assert right == pytest.approx((left + middle) / 2, abs=0.1)
    bars = [p for p in root.iter(f'{SVG}path') if 'bar' in p.get('class')]
    assert [p.get('class') for p in bars] == ['bar c0', 'bar c1']
    band = root.find(f'{SVG}rect')
    zero = next(float(t.get('x')) for t in root.iter(f'{SVG}text') if float_or_none(t.text) == 0)
    assert float(band.get('x')) + float(band.get('width')) / 2 == pytest.approx(zero, abs=0.1)
    assert 'one &amp; two' in text


def float_or_none(text):
    try:
        return float(text)
    except ValueError:
        return None


def test_intervals_without_a_mean_or_without_data():
    root, text = intervals([Row('failed', []), Row('one', [0.1, math.nan], 0.1, math.nan, None)])
    assert not [p for p in root.iter(f'{SVG}path') if 'bar' in p.get('class')]
    assert not re.search(r'\b(nan|inf)\b', text)
    for rows in ([], [Row('failed', [])]):
        assert 'no data' in intervals(rows)[1]
    assert 'no data' not in intervals([Row('same twice', [0.0, 0.0], 0.0, 0.0, 0.0)])[1]


def test_standalone_is_a_file():
    root = ET.fromstring(
        standalone(line_plot([Series('a', [1, 2], [1, 2])], title='t', x_label='x'))
    )
    assert root.find(f'{SVG}style').text
    assert root.find(f'{SVG}rect').get('fill') == '#ffffff'


def test_plots_are_deterministic():
    series = [Series('a', [1, 2, 3], [3.0, 2.0, 1.5], 2, 'points')]
    assert plot(series)[1] == plot(series)[1]
