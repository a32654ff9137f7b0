"""Signals: the first is a request, the second leaves at once, and handlers are put back."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from effjax.training import signals
from effjax.training.signals import Agreement, Stop, agree


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_first_signal_is_a_request(name, capfd):
    before = signal.getsignal(signal.Signals[name])
    with Stop() as stop:
        assert stop.requested is None
        signal.raise_signal(signal.Signals[name])
        assert stop.requested == name
    assert signal.getsignal(signal.Signals[name]) is before
    assert f'{name}: saving, then leaving.' in capfd.readouterr().err


def test_second_signal_leaves_at_once(monkeypatch, capfd):
    monkeypatch.setattr(signals.os, '_exit', sys.exit)  # ours must go on
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGINT)
    assert left.value.code == 128 + signal.SIGINT
    assert stop.requested == 'SIGTERM'
    assert 'SIGINT: leaving at once.' in capfd.readouterr().err


def test_handlers_come_back_after_an_exception():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), Stop():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_does_nothing_in_another_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with Stop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_one_process_agrees_with_itself():
    assert agree(True) is True and agree(False) is False
    assert Agreement()(True) is True and Agreement()(False) is False


def test_agreement_asks_now_and_then_and_remembers(monkeypatch):
    now, asked = [0.0], []

    def gather(mine):
        asked.append(now[0])
        theirs = np.array([float(now[0] >= 4.0), 0.25])  # the other process wants to stop at 4 s
        return np.stack([mine, theirs])

    monkeypatch.setattr(signals.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, 'process_allgather', gather)
    monkeypatch.setattr(signals.time, 'monotonic', lambda: now[0])
    agreement = Agreement()
    answers = []
    for _ in range(50):  # 0.1 s a call here, 0.25 s there: a question each fourth call
        now[0] += 0.1
        answers.append(agreement(False))
    assert np.allclose(np.diff(asked), 0.4)
    assert answers.index(True) == 40 and all(answers[40:])


_WAIT = """
import time
from effjax.training.signals import Stop
with Stop() as stop:
    print('ready', flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.requested, flush=True)
    time.sleep(60)
"""


@pytest.mark.process
def test_exit_status_of_a_real_process():
    child = subprocess.Popen(
        [sys.executable, '-c', _WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == 'ready\n'
    os.kill(child.pid, signal.SIGTERM)
    assert child.stdout.readline() == 'SIGTERM\n'
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(timeout=10) == 128 + signal.SIGTERM
    child.communicate()
