"""The workloads that all studies share: what is trained, for how much, and what decides.

    from effjax.study.spec import Arm
    from experiments.workloads import LM10M

    def get_study():
        return LM10M.study('relu2', (Arm('gelu', ...), Arm('relu2', ...)))

Defined once, so that the noise floor, the tuning of the baseline and the margin of a workload hold
for every study on it. A margin is set before any study: it is about what a tenth more budget is
expected to buy, so that a difference within it is worth nobody's trouble. An evaluation reads the
same batches at every seed and in every arm, and costs below 5 % of the training at full budget.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from effjax.core.config import load
from effjax.study.spec import Arm, Study


@dataclasses.dataclass(frozen=True)
class Workload:
    """A baseline with its budget.

    Attributes:
      name: what studies call it.
      config: the baseline's config file, with its variant.
      overrides: 'a.b=c' that make the config the workload.
      metric: 'EVALUATION.METRIC' at the end of a run.
      axis: what the budget counts.
      budget: how much of it a full run gets.
      steps: what the baseline makes of the full budget.
      tune_key: the key that every arm tunes.
      grid: its values, spaced evenly in their logarithm; the baseline's own is within it.
      least_steps: of the shortest run of a study on it, tuning included.
      margin: differences of the metric within it, either way, do not matter.
      scale: the workload in words.
      note: what one must know before believing a result on it.
    """

    name: str
    config: str
    budget: float
    steps: int
    grid: tuple[float, ...]
    margin: float
    scale: str
    overrides: tuple[str, ...] = ()
    metric: str = 'valid.loss'
    axis: str = 'model_flops'
    tune_key: str = 'schedule.peak'
    least_steps: int = 50
    note: str = ''

    def load(self, overrides: Sequence[str] = ()) -> Any:
        """Returns the baseline's config, at the full budget unless `overrides` say otherwise.

        Raises:
          ConfigError: as `effjax.core.config.load`, whose paths start where the command runs.
        """
        given = {override.partition('=')[0] for override in overrides}
        full = [] if given & {'steps', 'budget'} else [f'budget={self.budget:g}flops']
        return load(self.config, [*self.overrides, *full, *overrides])

    def study(
        self, name: str, arms: Sequence[Arm], *, overrides: Sequence[str] = (), **changes: Any
    ) -> Study:
        """Returns a study on this workload.

        Args:
          name: the study's name.
          arms: the first is the baseline.
          overrides: 'a.b=c' for all arms, beside the workload's, such as 'data.path=...'.
          **changes: other fields of `Study`.
        """
        shared = {
            'config': self.config,
            'axis': self.axis,
            'budget': self.budget,
            'metric': self.metric,
            'margin': self.margin,
            'tune_key': self.tune_key,
            'grid': self.grid,
            'least_steps': self.least_steps,
            'scale': self.scale,
            **changes,
        }
        return Study(name=name, arms=tuple(arms), overrides=(*self.overrides, *overrides), **shared)


LM10M = Workload(
    name='lm10m',
    config='configs/lm10m.py',
    budget=1.2e15,
    steps=933,
    grid=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    margin=0.005,
    scale='10.7M parameters, 15.3M bytes of Python source',
    note=(
        'Nats a byte, so bits_per_byte is the loss over ln 2. 1.4 epochs: at 2.75e15 (3.2 epochs) '
        'the held-out loss no longer fell from 75 % of the budget on, on an H200, so that budgets '
        'could not be told apart. The text is that of the running Python; compare only runs with '
        'the same digest of the data. Windows without document ids: cuDNN attention with documents '
        'cannot run under vmap over seeds, without them it can.'
    ),
)

LM_GROWTH = Workload(
    name='lm_growth',
    config='configs/lm_growth.py',
    budget=2e15,
    steps=1217,
    grid=(1e-3, 2e-3, 4e-3),
    margin=0.005,
    scale='12.5M parameters in 16 layers, 20M bytes of Python source',
    note=(
        'As lm10m, deeper, with AdamW as the papers on growth have it. 20 million bytes, not 30: '
        'the text is 11 million, and at 3.2 epochs the held-out loss of lm10m no longer fell.'
    ),
)

LM_TINY = Workload(
    name='lm_tiny',
    config='configs/lm10m.py:tiny',
    budget=2.66e11,
    steps=160,
    least_steps=20,
    grid=(5e-3, 1e-2, 2e-2, 4e-2),
    margin=0.03,
    scale='0.25M parameters, 0.16M bytes of Python source',
    note='Seconds on a CPU, to try studies on and to test them: it settles nothing by itself.',
)

DIGITS_VIT = Workload(
    name='digits_vit',
    config='configs/digits_vit.py',
    budget=1.26e12,
    steps=939,
    grid=(1e-3, 3e-3, 9e-3),
    margin=0.01,
    scale='0.2M parameters, 60,000 views of 1412 digits of 8x8',
    note=(
        '385 held-out images: one is 0.26 % of accuracy, and the loss varies by 13 % from seed to '
        'seed, so that three seeds show large effects only. 42 epochs of 1412 images: it rewards '
        'what regularises.'
    ),
)

FASHION_VIT = Workload(
    name='fashion_vit',
    config='configs/fashion_vit.py',
    budget=2.27e14,
    steps=2349,
    grid=(5e-4, 1e-3, 2e-3, 4e-3),
    margin=0.005,
    scale='1.2M parameters, 10 epochs of Fashion-MNIST',
    note=(
        'Needs data.path, the folder of the four files. Judged on the whole standard test set, '
        'which is also what tuning sees; the same for every arm.'
    ),
)

SHAKESPEARE_CHAR = Workload(
    name='shakespeare_char',
    config='configs/shakespeare_char.py',
    overrides=('schedule.final=0.0',),
    budget=2.21e15,
    steps=2001,
    grid=(5e-4, 1e-3, 2e-3, 4e-3),
    margin=0.01,
    scale="10.7M parameters, 33M characters of tiny Shakespeare: nanoGPT's model",
    note=(
        'Needs data.path, the text. 2000 steps, not the 5000 of the config: after about 2000 the '
        'model learns the text by heart and the held-out loss rises. Dropout of attention weights '
        'keeps cuDNN from running, so that seconds here are those of plain XLA attention.'
    ),
)

WORKLOADS = {
    w.name: w for w in (LM10M, LM_GROWTH, LM_TINY, DIGITS_VIT, FASHION_VIT, SHAKESPEARE_CHAR)
}
