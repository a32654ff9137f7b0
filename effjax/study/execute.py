"""Runs what is missing of a study: here one group after another, or in processes of their own.

A run that fails or diverges is noted and shown, never dropped; a kill at any moment loses at most
what the run's own checkpoints do not hold, and the same command goes on.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from effjax.core.errors import EffjaxError, StudyError, TrainingError
from effjax.study import stopping, store
from effjax.study.plan import Group, Job
from effjax.study.stopping import Stopped

PREALLOCATE = 'XLA_PYTHON_CLIENT_PREALLOCATE'
WORKER = ('-m', 'effjax.study.worker')
STOP_SECONDS = 300.0  # that a run may take to save; its last checkpoint is what then remains
FAILURES = 3  # runs (groups, where runs share a step) that fail alike in a row, and no more
CLOSE_SECONDS = 60.0  # that an idle process may take to end


class Runner:
    """Runs groups of jobs in a study's folder.

    Args:
      out: the study's folder.
      code: digest of the code that runs.
      batched: whether a group shares one compiled step.
      devices: one entry a worker, the value of CUDA_VISIBLE_DEVICES that it gets ('' leaves the
        environment alone); a single entry '' runs in this process.
      any_code: accept stored results of another code version.
      retry_failed: run again what failed or diverged.
      inputs: arm -> digests of what its config reads (`preflight.Facts`); arms that are not
        named are not checked.
      say: takes a line for the user.
    """

    def __init__(
        self,
        out: pathlib.Path,
        code: str,
        *,
        batched: bool = False,
        devices: Sequence[str] = ('',),
        any_code: bool = False,
        retry_failed: bool = False,
        inputs: Mapping[str, Mapping[str, str]] | None = None,
        say: Callable[[str], None] = print,
    ):
        self.out, self.code, self.batched = out, code, batched
        self.devices, self.say = list(devices), say
        self._any_code, self._retry = any_code, retry_failed
        self.inputs = {arm: dict(found) for arm, found in (inputs or {}).items()}
        self._stopping = threading.Event()
        self._alike: tuple[str, ...] = ()  # the error of the last runs, as often as it came
        self._counting = threading.Lock()

    def missing(self, group: Group) -> list[Job]:
        """Returns the jobs of a group that still have to run.

        Raises:
          StudyError: a stored result of another config, other data or another code version.
        """
        again = ('missing', 'running', *(('failed', 'diverged') if self._retry else ()))
        return [job for job in group.jobs if self._status(job) in again]

    def _status(self, job: Job) -> str:
        made = self.inputs.get(job.arm)
        return store.status(job, self.out, self.code, any_code=self._any_code, inputs=made)

    def discard_stale(self, group: Group) -> None:
        """Deletes runs of a group that are another config's, data's or code version's.

        Only for runs that nothing is concluded from.
        """
        for job in group.jobs:
            try:
                self._status(job)
            except StudyError:
                shutil.rmtree(self.out / job.folder)

    def run(self, groups: Sequence[Group]) -> None:
        """Runs all that is missing of some groups, one after another or side by side.

        Raises:
          StudyError: a stored result of another config, other data or another code version, or
            runs that all fail alike.
          Stopped: a signal came.
        """
        todo = [(group.name, jobs) for group in groups if (jobs := self.missing(group))]
        units = [
            (name, part)
            for name, jobs in todo
            for part in ([jobs] if self.batched else _each(jobs))
        ]
        if self.devices == ['']:
            for i, (name, jobs) in enumerate(units, 1):
                stopping.check()
                self.say(f'[{i}/{len(units)}] {_describe(name, jobs)}')
                run_jobs(jobs, self.out, self.code, batched=self.batched, inputs=self.inputs)
                self._report(jobs)
        elif units:
            self._side_by_side(units)

    # ---- processes -------------------------------------------------------------------------

    def _side_by_side(self, units: list[tuple[str, list[Job]]]) -> None:
        free = queue.SimpleQueue[_Process]()
        processes = [_Process(device) for device in self.devices[: len(units)]]
        for process in processes:
            free.put(process)

        def work(index: int, name: str, jobs: list[Job]) -> None:
            process = free.get()
            try:
                if not self._stopping.is_set():
                    where = f' on device {process.device}' if process.device else ''
                    self.say(f'[{index}/{len(units)}] {_describe(name, jobs)}{where}')
                    self._hand_over(process, jobs)
            finally:
                free.put(process)

        try:
            with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
                futures = [pool.submit(work, i, *unit) for i, unit in enumerate(units, 1)]
                try:
                    _wait(futures)
                except BaseException:
                    self._stopping.set()
                    for process in processes:
                        process.stop()
                    raise
        finally:
            for process in processes:
                process.close()

    def _hand_over(self, process: '_Process', jobs: list[Job]) -> None:
        """Lets a process run jobs; a process that dies of them is noted as their failure."""
        order = {
            'out': self.out.as_posix(),
            'code': self.code,
            'batched': self.batched,
            'inputs': self.inputs,
            'workers': len(self.devices),
            'jobs': [vars(job) for job in jobs],
        }
        answer = process.ask(order)
        if answer == 'stopped' or self._stopping.is_set():
            raise Stopped('stopped by a signal; the same command goes on.')
        if answer != 'done':
            said = process.said()
            for job in jobs:
                if store.status(job, self.out, self.code, any_code=True) in ('running', 'missing'):
                    store.fail(job, self.out, self.code, answer, said)
        self._report(jobs)

    def _report(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            note = store.note(job, self.out)
            if note['remark']:
                self.say(f'    seed {job.seed}: {note["remark"]}')
            if note['status'] != 'done':
                self.say(f'    seed {job.seed} {note["status"]}: {note["error"]}')
        self._count(store.note(jobs[-1], self.out))

    def _count(self, note: Mapping[str, Any]) -> None:
        """Stops a study whose runs fail alike, one after another: the next ones would too."""
        # Numbers (steps, bytes, addresses) and folders may differ.
        error = re.sub(r'\d+|\(traceback in .*', '', note['error'])
        failed = note['status'] == 'failed'
        with self._counting:
            self._alike = (*(self._alike if error in self._alike else ()), error) if failed else ()
            if len(self._alike) < FAILURES:
                return
        raise StudyError(
            f'{FAILURES} times in a row runs failed alike: {note["error"].rstrip(".")}; mend that '
            'and give the same command with --retry_failed, or as it is to go on without them.'
        )


def run_jobs(
    jobs: Sequence[Job],
    out: pathlib.Path,
    code: str,
    *,
    batched: bool,
    inputs: Mapping[str, Mapping[str, str]] | None = None,
    workers: int = 1,
) -> None:
    """Runs jobs in this process and notes how each ended.

    Args:
      jobs: runs of one group.
      out: the study's folder.
      code: digest of the code that runs.
      batched: whether they share one compiled step.
      inputs: arm -> digests of what its config reads.
      workers: processes that run jobs side by side.

    Raises:
      Stopped: a signal came.
    """
    share_programs()
    for job in jobs:
        store.begin(job, out, code, (inputs or {}).get(job.arm), workers)
    with _quiet():
        if batched and len(jobs) > 1:
            _run_batched(jobs, out, code)
        else:
            for job in jobs:
                _run_one(job, out, code)
    for job in jobs:
        shutil.rmtree(out / job.folder / 'checkpoints', ignore_errors=True)


def share_programs() -> None:
    """Keeps compiled programs in the cache folder: the runs of an arm compile once between them.

    A run's compile seconds are then those of finding its program, except for the first.
    """
    import jax

    from effjax.data import cache

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update('jax_compilation_cache_dir', (cache.root() / 'xla').as_posix())
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


def _run_one(job: Job, out: pathlib.Path, code: str) -> None:
    from effjax.training.session import train

    try:
        summary, stopped_by = train(job.trained, out / job.folder)
    except Exception as error:
        stopping.check()  # what a signal broke is no failure
        _failed(job, out, code, error)
        return
    if not stopped_by or summary.get('complete'):
        store.end(job, out, code, 'done')
    stopping.check(stopped_by)


def _run_batched(jobs: Sequence[Job], out: pathlib.Path, code: str) -> None:
    from effjax.training.batched import run_batched

    jobs = [dataclasses.replace(job, config=_on_one_device(job.config)) for job in jobs]
    try:
        summaries = run_batched([j.trained for j in jobs], [out / j.folder for j in jobs])
    except Exception as error:
        stopping.check()
        if _out_of_memory(error):
            summaries = []
        else:
            for job in jobs:
                _failed(job, out, code, error)
            return
    if not summaries:  # outside of `except`: the error's frames hold the group's arrays
        _run_apart(jobs, out, code)
        return
    for job, summary in zip(jobs, summaries, strict=True):
        if not summary.get('stopped_by'):
            state = 'done' if summary['complete'] else 'diverged'
            store.end(job, out, code, state, summary.get('error', ''))
    stopping.check(next((s['stopped_by'] for s in summaries if s.get('stopped_by')), None))


def _run_apart(jobs: Sequence[Job], out: pathlib.Path, code: str) -> None:
    """Runs one by one, on their one device, jobs whose group did not fit into its memory."""
    gc.collect()
    for job in jobs:
        store.remark(job, out, f'a group of {len(jobs)} did not fit into memory: run by itself')
        _run_one(job, out, code)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)


def _on_one_device(config: dict[str, Any]) -> dict[str, Any]:
    """Lanes share one device; an axis that takes all there are takes that one."""
    return {**config, 'mesh': {axis: max(size, 1) for axis, size in config['mesh'].items()}}


def _failed(job: Job, out: pathlib.Path, code: str, error: Exception) -> None:
    """Notes the error that ended a run; where it is no divergence, keeps its traceback too."""
    text = ' '.join(str(error).split())
    if isinstance(error, TrainingError):
        store.end(job, out, code, 'diverged', text)
        return
    told = text if isinstance(error, EffjaxError) else f'{type(error).__name__}: {text[:300]}'
    store.fail(job, out, code, told, ''.join(traceback.format_exception(error)))


def _describe(name: str, jobs: Sequence[Job]) -> str:
    seeds = sorted({job.seed for job in jobs})
    values = sorted({f'{v:g}' for job in jobs for v in job.settings.values()}, key=float)
    key = next((k for job in jobs for k in job.settings), '')
    shown = [f'seed{"s" if len(seeds) > 1 else ""} {", ".join(map(str, seeds))}']
    if jobs[0].phase == 'tune':
        shown = [f'{key} {", ".join(values)}']
    return f'{name}: {"; ".join(shown)}'


def _wait(futures: Iterable[concurrent.futures.Future[None]]) -> None:
    """Waits for all, or for the first that fails; looks for signals that went unheard."""
    left = set(futures)
    while left:
        done, left = concurrent.futures.wait(left, 1.0, concurrent.futures.FIRST_COMPLETED)
        for future in done:
            future.result()
        stopping.check()


def _each(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    return ([job] for job in jobs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps a run's own lines off the study's output; they stand in its folder."""
    with open(os.devnull, 'w') as sink, contextlib.redirect_stderr(sink):
        yield


class _Process:
    """A Python process with a device of its own that runs orders one after another.

    Args:
      device: the CUDA_VISIBLE_DEVICES that it gets; 'cpu...' leaves the environment alone.
    """

    def __init__(self, device: str):
        self.device = device
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._starting = threading.Lock()  # none is started behind the back of `stop`
        self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115 (closed by close())

    def ask(self, order: dict[str, Any]) -> str:
        """Runs an order; returns 'done', 'stopped', or what the process died of."""
        process = self._started()
        if process is None:
            return 'stopped'
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(order) + '\n')
            process.stdin.flush()
            answer = process.stdout.readline().strip()
        except BrokenPipeError:
            answer = ''
        if answer:
            return answer
        self._process = None
        code = process.wait()
        if code in (-signal.SIGTERM, -signal.SIGINT):
            return 'stopped'  # before or after a run, which would have saved
        last = (self.said().strip().splitlines() or ['it said nothing'])[-1]
        return f'its process ended with exit code {code}: {last}'

    def said(self) -> str:
        """Returns what the processes on this device have written to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def stop(self) -> None:
        """Asks a running order to save and leave; ends it if it does not."""
        with self._starting:
            self._stopped = True
            process = self._process
        if process is not None:
            process.terminate()
            late = threading.Timer(STOP_SECONDS, process.kill)
            late.daemon = True
            late.start()  # who has ended by then cannot be killed: `Popen` knows

    def close(self) -> None:
        """Ends the process, which has no order any more."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.close()

    def _started(self) -> subprocess.Popen[str] | None:
        """Returns the process, started if need be; None once it was asked to stop."""
        with self._starting:
            if self._stopped:
                return None
            if self._process is None:
                self._process = self._start()
            return self._process

    def _start(self) -> subprocess.Popen[str]:
        env = dict(os.environ)
        if not self.device.startswith('cpu'):
            env['CUDA_VISIBLE_DEVICES'] = self.device
        root = pathlib.Path(__file__).parents[2].as_posix()
        env['PYTHONPATH'] = os.pathsep.join(filter(None, [root, env.get('PYTHONPATH', '')]))
        return subprocess.Popen(
            [sys.executable, *WORKER, str(os.getpid())],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C reaches it through `stop` alone, once
        )


def leave_memory_to_workers() -> None:
    """Starts this process's devices without taking their memory, and lets no worker know.

    What the user has said of it in the environment stays, here and for the workers.
    """
    import jax

    if PREALLOCATE not in os.environ:
        os.environ[PREALLOCATE] = 'false'
        jax.devices()  # read now, and never again
        del os.environ[PREALLOCATE]


def worker(order: dict[str, Any]) -> str:
    """Runs an order of `Runner`; returns 'done'.

    Raises:
      Stopped: a signal came.
    """
    jobs = [Job(**job) for job in order['jobs']]
    same = {key: order[key] for key in ('batched', 'inputs', 'workers')}
    run_jobs(jobs, pathlib.Path(order['out']), order['code'], **same)
    return 'done'
