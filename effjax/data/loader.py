"""The loader: batches made ahead of time, and how long training waited for them.

One thread makes batches in order and places them on the devices while the step runs. Making a
batch of text is numpy on mapped files, which outruns training by far; where it is not so (images
decoded from files), `workers` processes make them, and the thread only places them. Workers are
started with `spawn`: a script that trains with them must guard its `__main__`.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from effjax.core.errors import DataError
from effjax.data.packing import Batch, Position
from effjax.data.sampler import RowIndex, Sampler


class Loader(Iterator[tuple[Any, Position, float]]):
    """Iterates over (batch, position after it, seconds waited), endlessly.

    The position is that of the batch which the consumer holds, never of those made ahead: a
    checkpoint of it resumes with the very next batch, with any number of workers.
    """

    def __init__(
        self,
        sampler: Sampler,
        position: Position,
        *,
        rows: RowIndex = None,
        put: Callable[[Batch], Any] | None = None,
        prefetch: int = 2,
    ):
        """Starts the thread, and `sampler.workers` processes.

        Args:
          sampler: makes the batches.
          position: of the first batch.
          rows: rows of the global batch that this process reads; None is all.
          put: places a batch on devices, in the thread; None leaves numpy arrays.
          prefetch: batches placed ahead, at least 1.
        """
        self._sampler = sampler
        self._position = position
        self._put = put
        self._prefetch = prefetch
        self._maker = _Workers(sampler, rows) if sampler.workers else _Here(sampler, rows)
        self._ready: deque[tuple[Any, Position]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a process that dies of something else must not wait for its data.
        self._thread = threading.Thread(target=self._fill, name='effjax-loader', daemon=True)
        self._thread.start()

    def __next__(self) -> tuple[Any, Position, float]:
        """Returns the next batch.

        Raises:
          StopIteration: the loader is closed.
          DataError: the data cannot be read; the message names the batch's position.
        """
        asked = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise StopIteration
            if not self._ready:
                assert self._error is not None
                raise self._error
            batch, position = self._ready.popleft()
            self._changed.notify_all()
        return batch, position, time.perf_counter() - asked

    def close(self) -> None:
        """Stops thread and workers and drops what they made ahead; may be called twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._maker.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fill(self) -> None:
        position = self._position
        try:
            while not self._closed:
                try:
                    batch = self._maker.make(position)
                    placed = self._put(batch) if self._put else batch
                    after = self._sampler.advance(position)
                except DataError as e:
                    raise DataError(
                        f'{e} (In the batch at position {json.dumps(position)}.)'
                    ) from e
                except Exception as e:
                    e.add_note(f'in the batch at position {json.dumps(position)}')
                    raise
                self._hand_over(placed, after)
                position = after
        except BaseException as e:  # the consumer raises it, whatever it is
            with self._changed:
                self._error = e
                self._changed.notify_all()

    def _hand_over(self, batch: Any, position: Position) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._prefetch)
            if not self._closed:
                self._ready.append((batch, position))
                self._changed.notify_all()


class _Here:
    """Makes batches in the calling thread."""

    def __init__(self, sampler: Sampler, rows: RowIndex):
        self._sampler = sampler
        self._rows = rows

    def make(self, position: Position) -> Batch:
        """Returns the batch at a position."""
        return self._sampler.batch(position, self._rows)

    def close(self) -> None:
        """Does nothing."""


class _Workers:
    """Makes batches in processes, each as many as there are workers ahead of what is asked for."""

    def __init__(self, sampler: Sampler, rows: RowIndex):
        self._sampler = sampler
        self._pool = ProcessPoolExecutor(
            sampler.workers,
            mp_context=multiprocessing.get_context('spawn'),
            initializer=_start_worker,
            initargs=(sampler, rows),
        )
        self._ahead: deque[tuple[Position, Future[Batch]]] = deque()
        self._next: Position | None = None

    def make(self, position: Position) -> Batch:
        """Returns the batch at a position; positions are asked for in their order."""
        if self._next is None:
            self._next = position
        while len(self._ahead) <= self._sampler.workers:
            self._ahead.append((self._next, self._pool.submit(_work, self._next)))
            self._next = self._sampler.advance(self._next)
        made_for, future = self._ahead.popleft()
        assert made_for == position
        try:
            return future.result()
        except BrokenProcessPool as e:
            raise DataError(
                'a worker process that makes batches died, for want of memory or because the '
                'program does not guard its __main__; lower config.data.workers.'
            ) from e

    def close(self) -> None:
        """Ends the processes after the batches they are at."""
        self._pool.shutdown(wait=True, cancel_futures=True)


_worker: list[tuple[Sampler, RowIndex]] = []  # in a worker process: what it makes batches with


def _start_worker(sampler: Sampler, rows: RowIndex) -> None:
    _worker.append((sampler, rows))
    # The trainer answers signals, and then closes its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A trainer that was killed closes nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _work(position: Position) -> Batch:
    sampler, rows = _worker[0]
    return sampler.batch(position, rows)
