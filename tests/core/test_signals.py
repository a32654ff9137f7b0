"""Signals: the first is a request, the second leaves at once, and handlers are put back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from effjax.core import signals
from effjax.core.signals import Stop, requested


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


def test_a_request_reaches_the_stop_around_it():
    assert requested() is None
    with Stop() as outer:
        with pytest.raises(KeyError), Stop() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert requested() == inner.requested == 'SIGTERM' and outer.requested is None
            raise KeyError
        assert requested() == outer.requested == 'SIGTERM'
        with Stop() as late:
            assert late.requested == 'SIGTERM'
    assert requested() is None


_WAIT = """
import time
from effjax.core.signals import Stop
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
