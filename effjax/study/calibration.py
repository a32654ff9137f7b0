"""Measures reference time: seconds of a train step by shape, on the devices that are here.

Every config's step is compiled as training compiles it and fed real batches. Steps are timed one
by one, each until its result is there, in turns over the configs (A, B, A, B, ...), so that a
device that warms up or slows down does so for all of them. The warm-up is discarded. What does not
fit into memory together is measured in groups, which take turns by round.
"""

import datetime
import itertools
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import numpy as np

from effjax import parallel
from effjax.core.config import as_dict
from effjax.core.errors import ConfigError, DeviceError, StudyError
from effjax.costs import reference
from effjax.costs.reference import Entry, Table, describe, key_of, shape_of
from effjax.training import setup
from effjax.training.files import write_json_atomic
from effjax.training.runtime import Runtime
from effjax.training.stages import Stage

STEPS, ROUNDS = 30, 2
LEAST = 30  # timed steps behind a median
WARM_UP = 5  # steps before each round, not counted
_BATCHES = 4
_LEARNING_RATE = 1e-4  # an argument of the step: its value costs nothing
_SHARE = 0.85  # of a device's memory; the rest is for what the compiler's plan leaves out

Samples = list[list[float]]  # round -> seconds of single steps


class Case(Protocol):
    """A step to be timed.

    Attributes:
      shape: see `costs.reference.shape_of`.
      held: bytes that it keeps on a device between steps while it is open.
      extra: bytes more that a running step needs.
    """

    shape: dict[str, Any]
    held: int
    extra: int

    def open(self) -> None:
        """Makes the state and the batches."""

    def step(self) -> None:
        """Runs one step and waits for its result."""

    def close(self) -> None:
        """Frees state and batches."""


class TrainStep:
    """The compiled train step of one stage of a config, with its state and batches."""

    def __init__(self, runtime: Runtime, stage: Stage):
        self.shape = shape_of(stage.config)
        self._runtime, self._stage = runtime, stage
        self._state: Any = None
        self._batches: Iterator[Any] = iter(())
        with self._context():
            self._compiled = runtime.compile(stage, self._take(1)[0])
        memory = self._compiled.memory or {}
        self.held = memory.get('arguments', 0)
        self.extra = memory.get('total', 0) - self.held

    def open(self) -> None:
        """Makes the initial state and places a few real batches."""
        with self._context():
            self._state = self._runtime.initial_state(self._stage.index)
            self._batches = itertools.cycle(self._take(_BATCHES))

    def step(self) -> None:
        """Runs one step and waits for its metrics, which are ready when all of it is."""
        batch = next(self._batches)
        self._state, metrics = self._compiled(self._state, batch, _LEARNING_RATE, 0)
        metrics.block_until_ready()

    def close(self) -> None:
        """Frees state and batches."""
        self._state, self._batches = None, iter(())

    def _take(self, count: int) -> list[Any]:
        loader = self._runtime.loader(self._stage, None)
        try:
            return [next(loader)[0] for _ in range(count)]
        finally:
            loader.close()

    @contextmanager
    def _context(self) -> Iterator[None]:
        with (
            _memory_errors(describe(self.shape)),
            parallel.mesh_context(self._runtime.mesh, self._runtime.rules),
        ):
            yield


def measure(
    configs: Sequence[Mapping[str, Any]],
    *,
    steps: int = STEPS,
    rounds: int = ROUNDS,
    timer: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = lambda _: None,
) -> Table:
    """Measures the steps of configs, of all their stages, and returns the checked table.

    Args:
      configs: configs whose form has been checked; they share one mesh.
      steps: timed steps of each config in a round.
      rounds: rounds, at least 2; an entry repeats when the medians of its rounds agree.
      timer: seconds by a steady clock.
      say: takes a line of progress.

    Raises:
      ConfigError: bad configs, too few steps or rounds, or times that are not monotone.
      DataError: missing or empty data.
      DeviceError: a step that does not fit into memory.
      StudyError: times that did not repeat within `costs.reference.TOLERANCE`, twice.
    """
    found = conditions(configs, steps=steps, rounds=rounds)
    cases = list(_prepare(configs, say))
    entries = time_cases(
        cases, steps=steps, rounds=rounds, limit=_memory_limit(), timer=timer, say=say
    )
    made = datetime.date.today().isoformat()
    table = Table(found, made, tuple(entries), 'the measured table')
    table.check()
    return table


def time_cases(
    cases: Sequence[Case],
    *,
    steps: int,
    rounds: int,
    limit: float | None = None,
    timer: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = lambda _: None,
) -> list[Entry]:
    """Times cases in turns; those that do not repeat are timed once more.

    Args:
      cases: the steps.
      steps: timed steps of each case in a round.
      rounds: rounds.
      limit: bytes of a device that open cases may take together, None where nobody knows.
      timer: seconds by a steady clock.
      say: takes a line of progress.

    Returns:
      An entry for each case.

    Raises:
      StudyError: a case that did not repeat the second time either, with the figures.
    """
    entries = _timed(cases, steps, rounds, limit, timer)
    again = [i for i, e in enumerate(entries) if e.disagreement > reference.TOLERANCE]
    if again:
        say(f'{len(again)} of {len(cases)} did not repeat; measuring them once more')
        retried = _timed([cases[i] for i in again], steps, rounds, limit, timer)
        firsts = [entries[i] for i in again]
        for i, first, second in zip(again, firsts, retried, strict=True):
            if second.disagreement > reference.TOLERANCE:
                raise StudyError(
                    f'{describe(second.shape)} does not repeat within {reference.TOLERANCE:.0%}: '
                    f'medians of rounds were {_milliseconds(first.repeats)} ms, and '
                    f'{_milliseconds(second.repeats)} ms when measured again; stop what else '
                    'runs on this machine, or give more --steps.'
                )
            entries[i] = second
    return entries


def conditions(
    configs: Sequence[Mapping[str, Any]], *, steps: int = STEPS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Returns under what `measure` would measure: `costs.reference.CONDITIONS` -> value.

    Raises:
      ConfigError: no config, configs of several meshes, or too few steps or rounds.
      DeviceError: a mesh that does not fit the devices, or several processes.
    """
    if not configs:
        raise ConfigError('there is no config to measure; give at least one.')
    if rounds < 2 or steps * rounds < LEAST:
        raise ConfigError(
            f'{rounds} rounds of {steps} steps are too few: a median takes at least {LEAST} steps, '
            'and a repeat at least 2 rounds.'
        )
    plain = [as_dict(c) for c in configs]
    for key in ('mesh', 'sharding'):
        if any(c[key] != plain[0][key] for c in plain):
            raise ConfigError(
                f'the configs differ in config.{key}; a table has one: measure each into a file '
                'of its own.'
            )
    parallel.initialize()
    if jax.process_count() > 1:
        raise DeviceError('calibration runs in one process; start it on one host alone.')
    mesh = parallel.make_mesh(plain[0]['mesh'])
    environment = setup.environment()
    return {
        'device': _device_name(environment['device']),
        'backend': environment['backend'],
        'mesh': {axis: size for axis, size in mesh.shape.items() if size > 1},
        'sharding': plain[0]['sharding'],
        'jax': environment['jax'],
        'xla_flags': environment['xla_flags'],
        'effjax': environment['effjax'],
        'steps': steps,
        'rounds': rounds,
    }


def save(table: Table, path: str | pathlib.Path) -> None:
    """Writes a table, atomically, making its folder.

    Raises:
      ConfigError: the file cannot be written.
    """
    file = pathlib.Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, table.to_json())
    except OSError as e:
        raise ConfigError(f'cannot write the table to {file}: {e.strerror}.') from e


# ---- timing ------------------------------------------------------------------------------------


def _timed(
    cases: Sequence[Case],
    steps: int,
    rounds: int,
    limit: float | None,
    timer: Callable[[], float],
) -> list[Entry]:
    samples: list[Samples] = [[] for _ in cases]
    groups = _groups(cases, limit)
    try:
        for _ in range(rounds):
            for group in groups:
                if len(groups) > 1 or not samples[group[0]]:
                    _open([cases[i] for i in group])
                _round({i: cases[i] for i in group}, samples, steps, timer)
                if len(groups) > 1:
                    _close(cases[i] for i in group)
    finally:
        _close(cases)
    return [_entry(case, of) for case, of in zip(cases, samples, strict=True)]


def _groups(cases: Sequence[Case], limit: float | None) -> list[list[int]]:
    """Returns indices of cases that fit into memory together, largest step included."""
    groups: list[list[int]] = []
    for i in range(len(cases)):
        if groups:
            together = [cases[j] for j in (*groups[-1], i)]
            need = sum(c.held for c in together) + max(c.extra for c in together)
            if limit is None or need <= limit:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def _round(
    cases: Mapping[int, Case],
    samples: Sequence[Samples],
    steps: int,
    timer: Callable[[], float],
) -> None:
    for _ in range(WARM_UP):
        for case in cases.values():
            with _memory_errors(describe(case.shape)):
                case.step()
    for i in cases:
        samples[i].append([])
    for _ in range(steps):
        for i, case in cases.items():
            started = timer()
            case.step()
            samples[i][-1].append(timer() - started)


def _open(cases: Iterable[Case]) -> None:
    for case in cases:
        case.open()


def _close(cases: Iterable[Case]) -> None:
    for case in cases:
        case.close()


def _entry(case: Case, samples: Samples) -> Entry:
    every = [seconds for of_round in samples for seconds in of_round]
    median = statistics.median(every)
    low, high = np.percentile(every, (25, 75))
    repeats = tuple(statistics.median(of_round) for of_round in samples)
    return Entry(case.shape, median, repeats, float(high - low) / median)


def _milliseconds(seconds: Sequence[float]) -> str:
    return ', '.join(f'{1e3 * s:.4g}' for s in seconds)


# ---- preparing ---------------------------------------------------------------------------------


def _prepare(
    configs: Sequence[Mapping[str, Any]], say: Callable[[str], None]
) -> Iterator[TrainStep]:
    """Compiles the step of every stage, each shape once."""
    seen: set[str] = set()
    for config in configs:
        plain = {**as_dict(config), 'reference': ''}  # what is measured is not charged
        setup.check(plain)
        runtime = Runtime(plain)
        for stage in runtime.stages:
            shape = shape_of(stage.config)
            if key_of(shape) in seen:
                continue
            seen.add(key_of(shape))
            say(f'compiling {describe(shape)}')
            yield TrainStep(runtime, stage)


@contextmanager
def _memory_errors(what: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        raise DeviceError(
            f'{what} does not fit into the memory of {jax.devices()[0].device_kind}; leave it out, '
            'or lower its batch.'
        ) from e


def _memory_limit() -> float | None:
    """Returns the bytes of a device that may be planned with, None where nothing says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'bytes_limit' in stats:
        return _SHARE * stats['bytes_limit']
    if jax.default_backend() == 'cpu' and 'SC_PHYS_PAGES' in os.sysconf_names:
        host = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        return 0.5 * host / jax.local_device_count()  # others live on this host too
    return None


def _device_name(kind: str) -> str:
    """Returns what sets this device apart; jax calls every processor 'cpu'."""
    if jax.default_backend() != 'cpu':
        return kind
    try:
        found = re.search(r'model name\s*:\s*(.+)', pathlib.Path('/proc/cpuinfo').read_text())
    except OSError:
        found = None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f'{name}, {os.cpu_count()} cores'
