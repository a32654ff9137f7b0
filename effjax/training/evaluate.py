"""Evaluations: a dict in the config, run on a schedule, on their own clock.

    config.evals.valid = dict(every_steps=500, batches=20)

`every_steps` (or `every_share` of the run) is how often; 0 is only at the end, where every
evaluation runs. `batches` is how many batches of the split, evenly spread; 0 is the whole split.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from effjax.core.errors import DataError
from effjax.core.registry import suggest
from effjax.training.setup import EVAL_KEYS

_IN_FLIGHT = 8  # batches dispatched ahead: more would only hold inputs in device memory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One named evaluation.

    Attributes:
      name: its key in the config and in `metrics.jsonl`.
      every_steps: steps between two runs of it; 0 is only at the end.
      every_share: share of the run between two runs of it; 0 switches it off.
      source: a re-iterable of whole batches on the host, with `bytes`.
      batch_size: rows of a batch, over all processes.
      rows: those that this process places.
      seq_len: tokens a row.
    """

    name: str
    every_steps: int
    every_share: float
    source: Any
    batch_size: int
    rows: slice
    seq_len: int = 0

    def due(self, step: int, before: float, after: float) -> bool:
        """Whether it runs after `step`, in which the run's progress rose from before to after."""
        if self.every_steps and step % self.every_steps == 0:
            return True
        share = self.every_share
        return bool(share) and int(before / share + 1e-9) != int(after / share + 1e-9)


def plan(
    config: Mapping[str, Any],
    dataset: Any,
    batch_size: int,
    seq_len: int,
    rows: Callable[[int], slice],
) -> list[Evaluation]:
    """Returns the evaluations of a config.

    Args:
      config: the resolved config.
      dataset: where the splits come from.
      batch_size: rows a batch, where an evaluation does not say.
      seq_len: tokens a row.
      rows: `batch_size -> ` the rows that this process loads.

    Raises:
      DataError: a split that the dataset does not have.
    """
    out = []
    for name, block in config['evals'].items():
        given = {**EVAL_KEYS, **block}
        size = given['batch_size'] or batch_size
        splits = dataset.info.splits
        if given['split'] not in splits:
            raise DataError(
                f'config.evals.{name}.split: the data has no split {given["split"]!r}; it has '
                f'{", ".join(splits)}.' + suggest(given['split'], splits)
            )
        source = dataset.eval(given['split'], size, seq_len, batches=given['batches'])
        if not len(source):
            raise DataError(
                f'config.evals.{name}: split {given["split"]!r} has nothing to evaluate; '
                'hold out more.'
            )
        out.append(
            Evaluation(
                name,
                given['every_steps'],
                float(given['every_share']),
                source,
                size,
                rows(size),
                seq_len,
            )
        )
    return out


def run(
    evaluation: Evaluation,
    step: Callable[..., dict[str, jax.Array]],
    params: Any,
    buffers: Any,
    put: Callable[[dict[str, np.ndarray]], Any],
    task: Any,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Runs one evaluation and returns its metrics, or None if it was asked to stop.

    Args:
      evaluation: which.
      step: the compiled evaluation step.
      params: the parameters to judge.
      buffers: the model's buffers.
      put: places this process's rows of a batch on the devices.
      task: turns sums into metrics.
      stop: asked before each batch.
    """
    sums = add_up(evaluation, step, params, buffers, put, stop)
    return None if sums is None else metrics(evaluation, sums, task)


def metrics(evaluation: Evaluation, sums: Mapping[str, np.ndarray], task: Any) -> dict[str, float]:
    """Returns an evaluation's metrics from `name -> (sum, weight)` over its whole split."""
    return task.metrics({k: (float(v[0]), float(v[1])) for k, v in sums.items()}, evaluation.source)


def add_up(
    evaluation: Evaluation,
    step: Callable[..., dict[str, jax.Array]],
    params: Any,
    buffers: Any,
    put: Callable[[dict[str, np.ndarray]], Any],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, np.ndarray] | None:
    """Returns `name -> float64 [..., 2]`, sum and weight over all batches, or None if stopped.

    A few batches are in flight at a time; sums are added in float64 on the host, so that a long
    split loses no digits. The arguments are those of `run`.
    """
    sums: dict[str, np.ndarray] = {}
    flying: collections.deque[dict[str, jax.Array]] = collections.deque()

    def take() -> None:
        for key, value in jax.device_get(flying.popleft()).items():
            sums[key] = sums.get(key, 0.0) + np.asarray(value, np.float64)

    for batch in evaluation.source:
        if stop():
            return None
        mine = {key: array[evaluation.rows] for key, array in batch.items()}
        flying.append(step(params, buffers, put(mine)))
        if len(flying) > _IN_FLIGHT:
            take()
    while flying:
        take()
    return sums
