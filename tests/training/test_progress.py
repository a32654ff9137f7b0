"""Progress: numbers as people write them, a bar on a terminal, few lines elsewhere."""

import io

import pytest

from effjax.training import progress
from effjax.training.progress import NoProgress, Progress, describe, human, make_progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ('value', 'unit', 'text'),
    [
        (1.234e15, 'FLOP', '1.23 PFLOP'),
        (4512.0, 'tok/s', '4.51k tok/s'),
        (1.2e9, 'tok', '1.2B tok'),
        (85.2e6, 'B', '85.2 MB'),
        (999.4, '', '999'),
        (999.6, '', '1k'),  # not 1e+03
        (999_999, 'tok', '1M tok'),
        (0, 'FLOP', '0 FLOP'),
        (192, 's', '3m12s'),
        (59.96, 's', '1m00s'),
        (7.25, 's', '7.2s'),
        (45.4, 's', '45s'),
        (3 * 3600 + 61, 's', '3h01m'),
        (float('nan'), 's', 'nan s'),
        (float('inf'), 'tok/s', 'inf tok/s'),
    ],
)
def test_human(value, unit, text):
    assert human(value, unit) == text


def test_describe_leaves_out_what_is_not_there():
    row = {'step': 120, 'loss': 3.2104, 'tokens_per_second': 4512.0, 'model_flops': 1.234e15}
    assert describe(row) == 'step 120  loss 3.210  4.51k tok/s  1.23 PFLOP'
    assert describe({'step': 1, 'loss': None, 'seconds': 3.0}, 62.0) == 'step 1  3.0s  ETA 1m02s'


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, 'monotonic', lambda: Clock.now)
    return Clock


def test_plain_lines_are_few_and_know_the_time_left(clock):
    stream = io.StringIO()
    bar = Progress('steps', 1000, stream=stream)
    for step in range(501, 1001):  # a resumed run: half of it is already done
        clock.now += 0.1
        bar.update({'step': step, 'loss': 1.0})
    bar.line('eval val: 1.85 bits per byte')
    bar.close()
    bar.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 7  # the first, each tenth after it, the evaluation
    assert lines[1] == ' 60%  step 600  loss 1.000  ETA 40s'
    assert lines[-2:] == ['100%  step 1000  loss 1.000  ETA 0.0s', 'eval val: 1.85 bits per byte']


def test_slow_runs_show_a_line_now_and_then(clock):
    stream = io.StringIO()
    bar = Progress('steps', 1000, stream=stream)
    for step in range(1, 10):
        clock.now += 10.0
        bar.update({'step': step})
    assert [line.split()[2] for line in stream.getvalue().splitlines()] == ['1', '4', '7']


def test_quick_runs_do_not_flood_a_log(clock):
    stream = io.StringIO()
    bar = Progress('tokens', 100.0, stream=stream)
    for step in range(100):
        clock.now += 0.001
        bar.update({'step': step, 'tokens': step})
    bar.close()
    assert len(stream.getvalue().splitlines()) == 2


def test_bar_on_a_terminal(clock):
    stream = Terminal()
    bar = Progress('steps', 10, stream=stream)
    try:
        for step in range(1, 6):
            clock.now += 1.0
            bar.update({'step': step, 'loss': 2.5, 'tokens_per_second': 4512.0})
        bar.line('eval val: loss [1.5]')
        raise KeyError('something else')
    except KeyError:
        bar.close()
    text = stream.getvalue()
    assert '50%' in text and 'loss 2.500' in text and '4.51k tok/s' in text and 'ETA 5.0s' in text
    assert 'eval val: loss [1.5]' in text  # brackets are not markup
    assert text.index('\x1b[?25l') < text.rindex('\x1b[?25h')  # the cursor is back


def test_updates_between_two_frames_cost_nothing(clock):
    stream = Terminal()
    bar = Progress('steps', 1000, stream=stream)
    bar.update({'step': 1})
    before = len(stream.getvalue())
    for step in range(2, 500):
        bar.update({'step': step})
    assert len(stream.getvalue()) == before
    bar.close()
    assert 'step 499' in stream.getvalue()  # the last one is always shown


def test_choice():
    assert isinstance(make_progress(False, 'steps', 10), NoProgress)
    assert isinstance(make_progress(True, 'steps', 10), Progress)
    nothing = NoProgress()
    nothing.update({'step': 1})
    nothing.line('x')
    nothing.close()
