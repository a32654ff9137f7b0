"""The loader: batches made ahead of time in a thread, and how long training waited for them."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self

from effjax.core.errors import DataError
from effjax.data.packing import Batch, Position
from effjax.data.sampler import RowIndex, Sampler

Item = tuple[Any, Position]


class Loader(Iterator[tuple[Any, Position, float]]):
    """Iterates over (batch, position after it, seconds waited), endlessly.

    One thread makes batches in order and hands them over through a short buffer. The position is
    that of the batch which the consumer holds, never of those made ahead: a checkpoint of it
    resumes with the very next batch. Making a batch is numpy on mapped files, which outruns
    training by far; the thread is there to overlap it, and the copy to the device, with the step.
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
        """Starts the thread.

        Args:
          sampler: makes the batches.
          position: of the first batch.
          rows: rows of the global batch that this process reads; None is all.
          put: places a batch on devices, in the thread; None leaves numpy arrays.
          prefetch: batches made ahead; 0 makes each when it is asked for, without a thread.
        """
        self._sampler = sampler
        self._position = position
        self._rows = rows
        self._put = put
        self._prefetch = prefetch
        self._ready: deque[Item] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if prefetch:
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
        if self._thread is None:
            if self._closed:
                raise StopIteration
            batch, self._position = self._make(self._position)
            return batch, self._position, time.perf_counter() - asked
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
        """Stops the thread and drops what it made ahead; may be called twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _make(self, position: Position) -> Item:
        try:
            batch = self._sampler.batch(position, self._rows)
            return (self._put(batch) if self._put else batch), self._sampler.advance(position)
        except DataError as e:
            raise DataError(f'{e} (In the batch at position {json.dumps(position)}.)') from e
        except Exception as e:
            e.add_note(f'in the batch at position {json.dumps(position)}')
            raise

    def _fill(self) -> None:
        position = self._position
        try:
            while not self._closed:
                item = self._make(position)
                position = item[1]
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closed or len(self._ready) < self._prefetch
                    )
                    if not self._closed:
                        self._ready.append(item)
                        self._changed.notify_all()
        except BaseException as e:  # the consumer raises it, whatever it is
            with self._changed:
                self._error = e
                self._changed.notify_all()
