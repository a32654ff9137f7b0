"""Evaluations: a dict in the config, run on a schedule, on their own clock.

    config.evals.valid = dict(every_steps=500, batches=20)

`every_steps` (or `every_share` of the run) is how often; 0 is only at the end, where every
evaluation runs. `batches` is how many batches of the split, evenly spread; 0 is the whole split.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from effjax.training.setup import EVAL_KEYS


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One named evaluation.

    Attributes:
      name: its key in the config and in `metrics.jsonl`.
      every_steps: steps between two runs of it; 0 is only at the end.
      every_share: share of the run between two runs of it; 0 switches it off.
      source: a re-iterable of host batches with `bytes`.
    """

    name: str
    every_steps: int
    every_share: float
    source: Any

    def due(self, step: int, before: float, after: float) -> bool:
        """Whether it runs after `step`, in which the run's progress rose from before to after."""
        if self.every_steps and step % self.every_steps == 0:
            return True
        share = self.every_share
        return bool(share) and int(before / share + 1e-9) != int(after / share + 1e-9)


def plan(config: Mapping[str, Any], dataset: Any, batch_size: int, seq_len: int) -> list[Evaluation]:
    """Returns the evaluations of a config.

    Raises:
      DataError: a split that the dataset does not have.
    """
    out = []
    for name, block in config['evals'].items():
        given = {**EVAL_KEYS, **block}
        source = dataset.eval(
            given['split'], given['batch_size'] or batch_size, seq_len, batches=given['batches']
        )
        out.append(Evaluation(name, given['every_steps'], float(given['every_share']), source))
    return out


def run(
    evaluation: Evaluation,
    step: Callable[..., dict[str, jax.Array]],
    params: Any,
    buffers: Any,
    put: Callable[[dict[str, np.ndarray]], Any],
    task: Any,
) -> dict[str, float]:
    """Runs one evaluation and returns its metrics.

    Sums stay on the device until the end, so that batches overlap with their transfers; they are
    added in float64 on the host, so that a long split loses no digits.

    Args:
      evaluation: which.
      step: the compiled evaluation step.
      params: the parameters to judge.
      buffers: the model's buffers.
      put: places a host batch on the devices.
      task: turns sums into metrics.
    """
    pending = [step(params, buffers, put(batch)) for batch in evaluation.source]
    sums: dict[str, np.ndarray] = {}
    for out in jax.device_get(pending):
        for key, value in out.items():
            sums[key] = sums.get(key, np.zeros(2)) + np.asarray(value, np.float64)
    return task.metrics({k: (float(v[0]), float(v[1])) for k, v in sums.items()}, evaluation.source)
