"""The clock: every second belongs to one kind, and nothing is lost by saving."""

import json
import random

import pytest

from effjax.costs import KINDS, Clock


class FakeTime:
    """A timer that moves only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def test_nested_blocks_take_their_time_from_the_outer():
    timer = FakeTime()
    clock = Clock(now=timer)
    timer.wait(1)
    with clock('train'):
        timer.wait(2)
        with clock('data'):
            timer.wait(4)
            with clock('checkpoint'):
                timer.wait(8)
        timer.wait(16)
    timer.wait(32)
    assert clock.to_dict() == {
        'compile': 0, 'train': 18, 'eval': 0, 'checkpoint': 8, 'data': 4, 'other': 33,
        'device_seconds': {
            'compile': 0, 'train': 18, 'eval': 0, 'checkpoint': 8, 'data': 4, 'other': 33,
        },
    }  # fmt: skip
    assert clock.seconds() == 63 == timer.now - 100


def test_reading_inside_a_block_counts_up_to_now():
    timer = FakeTime()
    clock = Clock(now=timer, devices=8)
    with clock('train'):
        timer.wait(3)
        assert clock.seconds('train') == 3
        assert clock.device_seconds('train') == 24
        timer.wait(2)
    assert clock.seconds('train') == 5
    assert clock.device_seconds() == 40


def test_an_exception_closes_its_block():
    timer = FakeTime()
    clock = Clock(now=timer)
    with pytest.raises(RuntimeError), clock('eval'):
        timer.wait(1)
        raise RuntimeError
    timer.wait(2)
    assert (clock.seconds('eval'), clock.seconds('other')) == (1, 2)


def test_kinds_add_up_to_the_wall_time_whatever_the_nesting():
    timer, clock = FakeTime(), None
    clock = Clock(now=timer)
    draw = random.Random(0)

    def work(depth):
        timer.wait(draw.random())
        for _ in range(draw.randrange(4) if depth < 5 else 0):
            with clock(draw.choice(KINDS)):
                work(depth + 1)
            timer.wait(draw.random())

    work(0)
    # sums of a few hundred floats in another order
    assert clock.seconds() == pytest.approx(timer.now - 100, rel=1e-12)


def test_saved_and_restored_on_other_devices():
    timer = FakeTime()
    clock = Clock(now=timer, devices=4)
    with clock('train'):
        timer.wait(0.1)
    saved = json.loads(json.dumps(clock.to_dict()))
    timer.wait(1000)  # not running: nobody's time
    again = Clock.from_dict(saved, devices=2, now=timer)
    assert again.to_dict() == saved
    with again('train'):
        timer.wait(10)
    assert again.seconds('train') == saved['train'] + 10
    assert again.device_seconds('train') == saved['device_seconds']['train'] + 20
    assert again.seconds() == pytest.approx(10.1)


def test_a_timer_that_steps_back_takes_nothing_away():
    timer = FakeTime()
    clock = Clock(now=timer)
    with clock('train'):
        timer.wait(5)
        assert clock.seconds('train') == 5
        timer.wait(-3)
        assert clock.seconds('train') == 5


def test_unknown_kind():
    message = "unknown kind of time 'lunch'; known: compile, train"
    with pytest.raises(ValueError, match=message), Clock()('lunch'):
        pass
