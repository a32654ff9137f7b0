"""Numbers as people read them, and HTML that escapes what it is given."""

import pytest

from effjax.costs import page, svg


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (None, '–'), (0, '0'), (7, '7'), (999, '999'), (1000, '1.000 k'), (124_439_808, '124.4 M'),
        (0.0123456, '0.01235'), (3.14e23, '314.0 Z'), (999_960, '1.000 M'), (-2500, '-2.500 k'),
    ],
)  # fmt: skip
def test_si(value, text):
    assert page.si(value) == text


def test_si_with_a_unit():
    assert page.si(61.8e12, 'FLOP') == '61.80 TFLOP'
    assert page.si(5, 'J') == '5 J'


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (0.0, '0'), (1.23456, '1.235'), (9.99996, '10.00'), (12345.6, '12,346'),
        (1e-9, '1.000e-09'),
        (0.00123456, '0.001235'), (1e9, '1.000e+09'), (-3.14159, '-3.142'),
    ],
)  # fmt: skip
def test_significant(value, text):
    assert page.significant(value) == text


@pytest.mark.parametrize(
    ('value', 'text'),
    [(None, '–'), (0, '0 bytes'), (1023, '1023 bytes'), (1536, '1.50 KiB'), (2**31, '2.00 GiB'),
     (3 * 2**40, '3.00 TiB')],
)  # fmt: skip
def test_size(value, text):
    assert page.size(value) == text


@pytest.mark.parametrize(
    ('value', 'text'),
    [(None, '–'), (0.314, '0.31 s'), (59.9, '59.9 s'), (59.97, '1 min 00 s'), (252, '4 min 12 s'),
     (3600, '1 h 00 min'), (11_100, '3 h 05 min'), (3_600_000, '1,000 h 00 min')],
)  # fmt: skip
def test_duration(value, text):
    assert page.duration(value) == text


def test_other_numbers():
    assert page.integer(124_439_808) == '124,439,808'
    assert page.integer(None) == '–'
    assert page.percent(1, 8) == '12.5 %'
    assert page.percent(1, 0) == '–'
    assert page.scale(5e13) == (1e12, 'T')


def test_tables_and_pages_escape():
    table = page.table(
        [['<b>', '1'], ['all', '1']], head=['part', 'n'], caption='a & b', total=True
    )
    assert '&lt;b&gt;' in table
    assert 'a &amp; b' in table
    assert '<tr class="sum"><td>all</td><td class=n>1</td></tr>' in table
    assert 'class=n' not in page.table([['device', 'cpu']], numbers=False)
    document = page.document('<title>', ['<p>x</p>'])
    assert '<title>&lt;title&gt;</title>' in document
    for outside in ('http://', 'https://', '<script', '<link', 'src='):
        assert outside not in document


def test_x_in_a_readable_unit_and_the_label_that_names_it():
    def label(biggest, *unit):
        (scaled,), text = page.in_unit([svg.Series('a', [0.0, biggest], [1, 2])], 'cost', *unit)
        return round(scaled.x[1], 6), text

    assert label(2.5e15, 'FLOP') == (2.5, 'cost PFLOPs')
    assert label(7200.0, 's') == (120.0, 'cost (minutes)')
    assert label(4000.0, 'J') == (4.0, 'cost kJ')
    assert label(4000.0) == (4000.0, 'cost')


def test_results_escape_what_they_are_given():
    text = page.results([('win', 'a < b', [['n', '<3>']])])
    assert '<b>win</b>' in text
    assert 'a &lt; b' in text
    assert '<td>&lt;3&gt;</td>' in text
