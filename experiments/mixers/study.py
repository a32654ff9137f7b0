"""Sequence mixers against softmax attention on the workload lm10m, at equal model FLOPs.

Each arm replaces attention and keeps the rest of the model, so that sizes differ by what the mixer
needs; a mixer that carries positions by itself has none beside it.
"""

from effjax.study.spec import Arm, Study
from experiments.workloads import LM10M

_NO_POSITIONS = "model.positions={'kind': 'none'}"


def _arm(method: str, mixer: str, *more: str) -> Arm:
    return Arm(method, (f'model.mixer={{{mixer}}}', *more), method=method)


def get_study() -> Study:
    """Returns the study; the baseline is the workload's own six heads of attention."""
    return LM10M.study(
        'mixers',
        (
            Arm('attention', ("model.mixer={'kind': 'attention', 'heads': 6}",)),
            _arm('retnet', "'kind': 'retnet', 'heads': 3"),
            _arm('gla', "'kind': 'gla', 'heads': 3"),
            _arm('mamba2', "'kind': 'mamba2'", _NO_POSITIONS),
            _arm('mamba', "'kind': 'mamba'", _NO_POSITIONS),
            _arm('gated-deltanet', "'kind': 'gated_deltanet', 'heads': 3", _NO_POSITIONS),
            _arm('rwkv7', "'kind': 'rwkv7', 'heads': 6", _NO_POSITIONS),
            _arm('rg-lru', "'kind': 'rg_lru', 'heads': 6", _NO_POSITIONS),
            _arm('hyena', "'kind': 'hyena'", _NO_POSITIONS),
            _arm('linear-attention', "'kind': 'linear_attention', 'heads': 6"),
        ),
        fractions=(0.75, 1.0),
        question='Which sequence mixer saves model FLOPs over attention at 10M parameters?',
    )
