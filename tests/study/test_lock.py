"""The lock of a study's folder: one process at a time, and a dead one holds nothing."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from effjax.core.errors import StudyError
from effjax.study import lock


def write(folder, **changes):
    (folder / lock.FILE).write_text(json.dumps({**lock._me(), **changes}))


def age(folder, seconds):
    then = time.time() - seconds
    os.utime(folder / lock.FILE, (then, then))


def test_one_process_at_a_time(tmp_path):
    with lock.held(tmp_path):
        with pytest.raises(StudyError) as refused, lock.held(tmp_path):
            pytest.fail('both hold it')
        said = str(refused.value)
        assert said.startswith(f'{tmp_path} is in use by process {os.getpid()} on ')
        assert said.endswith('); wait until it ends or stop it, or give another --out.')
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), lock.held(tmp_path):
        raise KeyError
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize('how', ['gone', 'zombie', 'another of its number', 'half written'])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, how):
    child = subprocess.Popen([sys.executable, '-c', ''])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and still known
    began = lock._began(child.pid)
    if how == 'gone':
        child.wait()
    write(tmp_path, pid=child.pid, began='7' if began == 'ended' else began)
    if how == 'another of its number':
        write(tmp_path, began='7')
    if how == 'half written':
        (tmp_path / lock.FILE).write_text('{"host": ')
        with (
            pytest.raises(StudyError, match='in use by another process; wait'),
            lock.held(tmp_path),
        ):
            pytest.fail('it may be written this moment')
        age(tmp_path, 11)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())['pid'] == os.getpid()
    child.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('key', ['host', 'space'])
def test_another_hosts_lock_holds_as_long_as_it_is_touched(tmp_path, key):
    write(tmp_path, **{key: 'elsewhere'}, pid=1 << 30)
    age(tmp_path, lock.STALE - 30)
    message = r'process 1073741824 on .*\(if it is gone for good, wait 5 minutes or delete .*lock'
    with pytest.raises(StudyError, match=message), lock.held(tmp_path):
        pytest.fail('both hold it')
    age(tmp_path, lock.STALE + 30)
    with lock.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'BEAT', 0.05)
    with lock.held(tmp_path):
        age(tmp_path, 1000)
        deadline = time.monotonic() + 20
        while lock._age(tmp_path / lock.FILE) > 500:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_of_several_that_find_it_dead_one_takes_it(tmp_path, monkeypatch):
    write(tmp_path, began='7')
    held, out, gate = [], [], threading.Barrier(4)
    # Threads share a process: each is told apart as processes are, by its number.
    monkeypatch.setattr(lock.os, 'getpid', threading.get_native_id)

    def take():
        me = lock._me()
        gate.wait()
        try:
            lock._take(tmp_path / lock.FILE, me)
            held.append(me['pid'])
        except StudyError:
            out.append(me['pid'])

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(out) == 3
