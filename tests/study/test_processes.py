"""The processes of a study: they end when asked, at the latest after a while, and not again."""

import os
import threading
import time

import pytest

from effjax.study import execute

READY = "import sys, time, signal; print('up', file=sys.stderr, flush=True); "


@pytest.fixture
def process(monkeypatch):
    """Returns `make(program) -> _Process` whose process runs a program instead of a worker."""
    made = []

    def make(program: str) -> execute._Process:
        monkeypatch.setattr(execute, 'WORKER', ('-c', program))
        made.append(execute._Process('cpu0'))
        return made[-1]

    yield make
    for each in made:
        if each._process is not None and each._process.poll() is None:
            each._process.kill()


def asked(process: execute._Process) -> tuple[threading.Thread, list[str]]:
    """Gives an order in a thread; returns once the process is up."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(process.ask({})))
    thread.start()
    deadline = time.monotonic() + 60
    while os.fstat(process._errors.fileno()).st_size == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return thread, answers


def test_a_process_that_does_not_stop_is_killed(process, monkeypatch):
    monkeypatch.setattr(execute, 'STOP_SECONDS', 0.2)
    deaf = process(
        'import sys, time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); '
        "print('up', file=sys.stderr, flush=True); time.sleep(600)"
    )
    thread, answers = asked(deaf)
    deaf.stop()
    thread.join(30)
    assert answers == ['its process ended with exit code -9: up']
    deaf.close()


def test_a_process_that_stops_in_time_is_left_alone(process):
    willing = process(READY + 'time.sleep(600)')
    thread, answers = asked(willing)
    willing.stop()
    thread.join(30)
    assert answers == ['stopped']
    willing.close()


def test_an_idle_process_that_does_not_end_is_killed(process, monkeypatch):
    monkeypatch.setattr(execute, 'CLOSE_SECONDS', 0.2)
    stuck = process(READY + "print('done', flush=True); time.sleep(600)")
    thread, answers = asked(stuck)
    thread.join(30)
    assert answers == ['done']
    stuck.close()
    assert stuck._process.poll() == -9


def test_nothing_is_started_after_a_stop(process):
    late = process(READY)
    late.stop()
    assert late.ask({}) == 'stopped'
    assert late._process is None
    late.close()


@pytest.mark.parametrize('said', [None, 'false', 'true'])
def test_workers_get_what_the_user_said_of_memory(process, monkeypatch, said):
    monkeypatch.delenv(execute.PREALLOCATE, raising=False)
    if said is not None:
        monkeypatch.setenv(execute.PREALLOCATE, said)
    seen = []
    monkeypatch.setattr('jax.devices', lambda: seen.append(os.environ[execute.PREALLOCATE]))
    execute.leave_memory_to_workers()
    assert seen == (['false'] if said is None else [])
    echo = process(f"import os; print('it is', os.environ.get({execute.PREALLOCATE!r}))")
    assert echo.ask({}) == f'it is {said}'
    echo.close()
