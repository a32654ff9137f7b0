"""RWKV-7 against softmax attention on the workload lm10m: the arm that `mixers` did not end.

The arms are those of `experiments/mixers`; the study is its own, so that what is published there
stands as it was measured.
"""

from effjax.study.spec import Study
from experiments.mixers.study import get_study as mixers
from experiments.workloads import LM10M


def get_study() -> Study:
    """Returns the study; the baseline is the workload's own six heads of attention."""
    arms = tuple(arm for arm in mixers().arms if arm.name in ('attention', 'rwkv7'))
    return LM10M.study(
        'rwkv7',
        arms,
        fractions=(0.75, 1.0),
        question='Does RWKV-7 save model FLOPs over attention at 10M parameters?',
    )
