"""Distillation: a student learns from its targets and from a frozen teacher's predictions."""

import copy
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.cost import Cost, total
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.registry import arguments, lookup, suggest

NEXT_TOKEN = MappingProxyType({'kind': 'next_token'})
TEACHER = 'teacher'  # its name in the train state, on the ledger and in summaries
GIVEN = ('run', 'charge')
FOUND = ('model', 'step', 'used')  # what the trainer adds to the block (`training.teacher`)


class Distillation:
    """`(1 - a) task + a (temperature^2 KL(teacher || student) + hidden |h_t - h_s|^2 / D)`.

    With `until`, `a` falls linearly from `alpha` to 0 over that share of the run, and the rest is
    the task alone, without a teacher: knowledge inheritance (Qin et al., arXiv 2105.13880). Without
    it `a` stays: distillation (Hinton et al., arXiv 1503.02531). The student alone is evaluated.

    Args:
      execution: the config's execution block.
      task: the block of the task that a student is judged by, one with `outputs`.
      teacher: `run`, the folder of a finished run of `effjax.train`, in which '{seed}' is this
        run's seed, and `charge`, whether its training counts towards this run's budget.
      alpha: weight of the teacher at the start, in [0, 1].
      temperature: softens both sides' predictions; above 0.
      until: share of the run after which `a` is 0; 0: it stays `alpha`.
      hidden: weight of the squared distance of the final hidden states, which must have one width.

    Raises:
      ConfigError: a value that cannot be, or a task that has nothing to compare.
    """

    def __init__(
        self,
        execution: Mapping[str, Any],
        *,
        task: Mapping = NEXT_TOKEN,
        teacher: Mapping,
        alpha: float = 0.5,
        temperature: float = 1.0,
        until: float = 0.0,
        hidden: float = 0.0,
    ):
        from effjax.tasks import TASKS

        _check_numbers(alpha, temperature, until, hidden)
        _check_teacher(teacher)
        kind = task.get('kind')
        component = lookup(TASKS, kind, 'task', 'config.task.task.kind')
        if not hasattr(component, 'outputs'):
            raise ConfigError(
                f'config.task.task.kind {kind!r} does not give the predictions that a teacher is '
                'compared by; use next_token, masked_lm or classification.'
            )
        self.inner = component(execution, **arguments(task))
        self.data = self.inner.data
        self.bidirectional = getattr(self.inner, 'bidirectional', False)
        if hidden and self.data == 'image':
            raise ConfigError(
                'config.task.hidden compares what the head reads, and an image classifier gives '
                'its logits only; set it to 0.'
            )
        self.alpha, self.temperature = float(alpha), float(temperature)
        self.until, self.hidden = float(until), float(hidden)
        self._teacher: Any = None  # what `models.build` returned

    # ---- the teacher -----------------------------------------------------------------------

    def taught(self, student: Any, teacher: Any) -> 'Distillation':
        """Returns this task with the model of its teacher.

        Args:
          student: the abstract module of the student.
          teacher: the teacher, as `models.build` returned it.

        Raises:
          ConfigError: hidden states of two widths that are to be compared.
        """
        if self.hidden and student.embed_width != teacher.model.embed_width:
            raise ConfigError(
                f'config.task.hidden compares hidden states of one width, but the student has '
                f'{student.embed_width} and the teacher {teacher.model.embed_width}; set it to 0.'
            )
        out = copy.copy(self)
        out._teacher = teacher
        return out

    def at(self, progress: tuple[float, float]) -> Any:
        """Returns what is left of the objective once shares of (run, stage) are done."""
        over = self.alpha == 0 or (self.until > 0 and progress[0] >= self.until)
        return self.inner if over else self

    def given(self, frozen: Mapping[str, Any], progress: jax.Array) -> '_Taught':
        """Returns the objective of one step, with the teacher's arrays of the train state."""
        alpha = jnp.float32(self.alpha)
        if self.until:
            alpha = alpha * jnp.maximum(1.0 - progress[0] / self.until, 0.0)
        return _Taught(self, self._teacher.graphdef, frozen[TEACHER], alpha)

    def frozen_cost(self, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the cost of the teacher's forward pass in one training step."""
        return {TEACHER: total(self.inner.cost(self._teacher.model, batch, seq_len).values())}

    # ---- the student -----------------------------------------------------------------------

    def info(self, batch: Mapping[str, jax.Array], rng: jax.Array | None, train: bool) -> SeqInfo:
        """Returns the task's info."""
        return self.inner.info(batch, rng, train)

    def evaluate(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns the task's sums, of the student alone."""
        return self.inner.evaluate(model, batch, info)

    def metrics(self, sums: Mapping[str, tuple[float, float]], source: Any) -> dict[str, float]:
        """Returns the task's metrics."""
        return self.inner.metrics(sums, source)

    def units(self, batch_size: int, seq_len: int) -> tuple[int, int]:
        """Returns the task's (examples, tokens)."""
        return self.inner.units(batch_size, seq_len)

    def cost(self, model: Any, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the student's cost by part; the teacher's is `frozen_cost`."""
        return self.inner.cost(model, batch, seq_len)


@dataclasses.dataclass(frozen=True)
class _Taught:
    """The objective of one step.

    Attributes:
      task: what it is the objective of.
      graphdef: the teacher without its arrays.
      teacher: dict(params=, buffers=).
      alpha: float32 scalar.
    """

    task: Distillation
    graphdef: Any
    teacher: Mapping[str, Any]
    alpha: jax.Array

    def info(self, batch: Mapping[str, jax.Array], rng: jax.Array | None, train: bool) -> SeqInfo:
        """Returns the task's info."""
        return self.task.inner.info(batch, rng, train)

    def loss(self, model: Any, batch: Mapping[str, jax.Array], info: SeqInfo):
        """Returns (loss_sum, weight, aux)."""
        inner, alpha = self.task.inner, self.alpha
        mine, aux = inner.outputs(model, batch, info)
        hard, weight, metrics = inner.loss_of(mine)
        with jax.named_scope(TEACHER):
            model = nnx.merge(self.graphdef, self.teacher['params'], self.teacher['buffers'])
            # The key stays: it chooses the tokens that a masked LM hides, the same for both.
            theirs, _ = inner.outputs(model, batch, dataclasses.replace(info, train=False))
        soft = mine.divergence(theirs, self.task.temperature)
        metrics |= {'task_loss': (hard, weight), 'divergence': (soft, weight)}
        soft = soft * self.task.temperature**2
        if self.task.hidden:
            apart = _distance(mine, theirs)
            metrics['hidden_distance'] = (apart, weight)
            soft = soft + self.task.hidden * apart
        metrics['alpha'] = (alpha * weight, weight)
        return (1.0 - alpha) * hard + alpha * soft, weight, {**metrics, **aux}


def _distance(mine: Any, theirs: Any) -> jax.Array:
    """Returns the weighted sum of rows' mean squared distance."""
    apart = mine.rows.astype(jnp.float32) - jax.lax.stop_gradient(theirs.rows).astype(jnp.float32)
    return jnp.sum(jnp.mean(jnp.square(apart), axis=-1) * mine.weights)


def _check_numbers(alpha: float, temperature: float, until: float, hidden: float) -> None:
    for key, value in (('alpha', alpha), ('until', until)):
        if not 0 <= value <= 1:
            raise ConfigError(f'config.task.{key} must be in [0, 1], got {value}.')
    if not temperature > 0:
        raise ConfigError(f'config.task.temperature must be above 0, got {temperature}.')
    if not hidden >= 0:
        raise ConfigError(f'config.task.hidden must not be negative, got {hidden}.')


def _check_teacher(block: Mapping[str, Any]) -> None:
    for key in block:
        if key not in (*GIVEN, *FOUND):
            raise ConfigError(
                f'config.task.teacher takes {" and ".join(GIVEN)}, not {key!r}.'
                + suggest(key, GIVEN)
            )
    if not isinstance(block.get('run'), str) or not block['run']:
        raise ConfigError(
            'config.task.teacher.run must name the folder of a finished run of effjax.train.'
        )
    if not isinstance(block.get('charge'), bool):
        raise ConfigError(
            'config.task.teacher.charge must say whether the training of the teacher counts '
            "towards this run's budget: True or False."
        )
