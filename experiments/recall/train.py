"""The lanes of one cell, an epoch a call: rows, order and evaluation stay on the device.

A step of these models takes less time than the host needs to make its batch and to start it. So all
rows are placed once and an epoch is one compiled scan over the trainer's own step, with a judgement
of the held-out rows behind it.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import parallel
from effjax.core.cost import total
from effjax.data.sources.mqar import Mqar
from effjax.training import schedules
from effjax.training.batched import LaneRuntime, check_batchable
from effjax.training.compiled import with_lanes


@dataclasses.dataclass(frozen=True)
class Found:
    """How far a cell came.

    Attributes:
      accuracy: of each lane, on the held-out rows after the last epoch.
      diverged: whether a lane's last epoch had a step that was not finite.
      epochs: that were trained.
    """

    accuracy: list[float]
    diverged: list[bool]
    epochs: int


class Lanes:
    """Runs of one cell with everything compiled.

    Args:
      configs: the runs, alike but for their seed and learning rate.
      epochs: times that the training rows are seen.
    """

    def __init__(self, configs: Sequence[Any], epochs: int):
        started = time.monotonic()
        check_batchable(configs)
        self.epochs = epochs
        self.runtime = LaneRuntime(configs)
        self._batch = configs[0].batch_size
        source = Mqar(**{k: v for k, v in configs[0].data.items() if k != 'kind'})
        with parallel.mesh_context(self.runtime.mesh, self.runtime.rules):
            self._state = self.runtime.initial_state()
            self._rows = jax.device_put(dict(source.examples('train')[:]))
            self._held = self._padded(source.examples('valid')[:])
            self._seeds = np.array([c['seed'] for c in self.runtime.configs], np.uint32)
            self._schedules = [schedules.build(c['schedule']) for c in self.runtime.configs]
            self._epoch = self._compile()
        self.compile_seconds = time.monotonic() - started

    @property
    def steps(self) -> int:
        """Steps of an epoch; the last batch is filled up with the epoch's first rows."""
        return -(-len(self._rows['tokens']) // self._batch)

    @property
    def state_bytes(self) -> int:
        """Decoding state of one row at its end."""
        model, length = self.runtime.built.model, self._rows['tokens'].shape[1]
        return total(model.cost(1, length).values()).state_bytes

    def run(self, until: float = float('inf'), enough: float = 1.0) -> Found | None:
        """Trains to the end, or until a lane's accuracy is above `enough`.

        Args:
          until: seconds of `time.monotonic()` at which to give up.
          enough: an accuracy.

        Returns:
          What was found; None where the epochs would not end in time, said after two of them.
        """
        started = time.monotonic()
        for epoch in range(self.epochs):
            progress = (epoch + 0.5) / self.epochs
            rates = np.array([schedule(progress) for schedule in self._schedules], np.float32)
            self._state, accuracy, skipped = self._epoch(
                self._state, self._rows, self._held, np.int32(epoch), rates, self._seeds
            )
            found = Found(np.asarray(accuracy).tolist(), np.asarray(skipped).tolist(), epoch + 1)
            if max(found.accuracy) > enough:
                return found
            now = time.monotonic()
            end = started + (now - started) / found.epochs * self.epochs
            late = found.epochs >= 2 and end > until
            if found.epochs < self.epochs and (late or now > until):
                return None
        return found

    def _padded(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns rows as batches [N, B, ...] with weights, the last one padded."""
        count = len(rows['tokens'])
        padding = -count % self._batch
        rows = {**rows, 'weights': np.ones(count, np.float32)}
        return {
            name: jnp.asarray(np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))).reshape(
                -1, self._batch, *x.shape[1:]
            )
            for name, x in rows.items()
        }

    def _compile(self) -> Any:
        """Returns `epoch(state, rows, held, epoch, lr, seeds) -> (state, accuracy, skipped)`."""
        runtime, (stage, *_) = self.runtime, self.runtime.stages
        step = jax.vmap(runtime.raw_step(stage), in_axes=(0, None, 0, 0, None))
        evaluate, judged = runtime.raw_eval_step(), jax.vmap(runtime.raw_eval_params)
        ones = jnp.ones(self._batch, jnp.float32)
        seed = int(runtime.config['seed'])

        def epoch(state, rows, held, number, lr, seeds):
            key = jax.random.fold_in(jax.random.key(seed), number)
            order = jax.random.permutation(key, len(rows['tokens']))
            order = jnp.resize(order, (self.steps, self._batch))

            def one(state, chosen):
                batch = {name: x[chosen] for name, x in rows.items()}
                state, metrics = step(state, {**batch, 'weights': ones}, lr, seeds, jnp.ones(2))
                return state, metrics['skipped'] > 0

            state, skipped = jax.lax.scan(one, state, order)
            params = judged(state)

            def judge(sums, part):
                return sums + evaluate(params, state['buffers'], part)['accuracy'], None

            sums = jax.lax.scan(judge, jnp.zeros((runtime.lanes, 2)), held)[0]
            return state, sums[:, 0] / sums[:, 1], skipped.any(0)

        lanes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.uint32)
        lowered = jax.jit(epoch, donate_argnums=0).lower(
            self._state, self._rows, self._held, np.int32(0), *with_lanes(lanes, runtime.lanes)
        )
        # XLA's own options, not those of `training.compiled`: a weight's gradient sums over all
        # tokens of a lane into a few tiles, and without Triton's products, which divide such sums,
        # steps take 1.5 times as long (attention, N = 64, d = 64 on an H200: 4.4 against 2.9 ms).
        return lowered.compile()
