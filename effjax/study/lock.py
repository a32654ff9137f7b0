"""One process works in a study's folder at a time: a lock file, void once its holder is dead.

The file names host and process. On the same host the process is looked up, so that a kill leaves
nothing that lasts. From another host, which may share the disk, it cannot be: the holder touches
the file again and again, and a file not touched for `STALE` seconds is a dead one's.
"""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import threading
import time
from collections.abc import Iterator
from typing import Any

from effjax.core.errors import StudyError

FILE = 'lock.json'
BEAT = 20.0  # seconds between two touches
STALE = 300.0  # seconds without one, after which another host takes over


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Holds a study's folder, made where it is missing, for the length of a block.

    Raises:
      StudyError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, me = folder / FILE, _me()
    _take(file, me)
    done = threading.Event()
    beat = threading.Thread(target=_touch, args=(file, done), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        if _read(file) == me:
            file.unlink(missing_ok=True)


def _take(file: pathlib.Path, me: dict[str, Any]) -> None:
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        _take_over(file, me)
        return
    with os.fdopen(handle, 'w') as opened:
        json.dump(me, opened)


def _take_over(file: pathlib.Path, me: dict[str, Any]) -> None:
    """Takes the lock of a dead process."""
    holder = _read(file)
    if _alive(file, holder):
        raise _refusal(file, holder)
    mine = file.with_name(f'.{file.name}.{me["host"]}.{me["pid"]}')
    mine.write_text(json.dumps(me))
    mine.replace(file)
    time.sleep(0.5)  # of several that saw it dead at the same moment the last one has it
    if _read(file) != me:
        raise _refusal(file, _read(file))


def _refusal(file: pathlib.Path, holder: dict[str, Any] | None) -> StudyError:
    who = 'another process'
    if holder:
        who = f'process {holder["pid"]} on {holder["host"]} (since {holder["since"]})'
    away = ''
    if holder and not _same_host(holder):
        away = f' (if it is gone for good, wait {STALE / 60:.0f} minutes or delete {file})'
    return StudyError(
        f'{file.parent} is in use by {who}; wait until it ends or stop it{away}, or give another '
        '--out.'
    )


def _alive(file: pathlib.Path, holder: dict[str, Any] | None) -> bool:
    if holder is None or not _same_host(holder):  # nothing in it: it is being written just now
        return _age(file) < (STALE if holder else 10.0)
    try:
        os.kill(holder['pid'], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, alive
    return _began(holder['pid']) == holder['began']  # numbers are given to new processes again


def _age(file: pathlib.Path) -> float:
    """Returns the seconds since a file was touched, by the clock of its own disk."""
    probe = file.with_name(f'.{file.name}.{os.getpid()}.age')
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # it ended just now: who asks again finds it free
    finally:
        probe.unlink(missing_ok=True)


def _touch(file: pathlib.Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)


def _me() -> dict[str, Any]:
    pid, now = os.getpid(), datetime.datetime.now(datetime.UTC)
    return {
        'host': platform.node(),
        'space': _space(),
        'pid': pid,
        'began': _began(pid),
        'since': now.isoformat(timespec='seconds'),
    }


def _same_host(holder: dict[str, Any]) -> bool:
    return (holder['host'], holder['space']) == (platform.node(), _space())


def _space() -> str:
    """Names the process numbers' name space: containers of one host name have their own."""
    try:
        return os.readlink('/proc/self/ns/pid')
    except OSError:
        return ''


def _began(pid: int) -> str:
    """Returns when a process began, in its system's own count; '' where nothing tells."""
    try:
        told = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return ''
    return 'ended' if told[0] == 'Z' else told[19]  # Z: dead, and nobody has asked of what


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {*found} >= {*_me()} else None
