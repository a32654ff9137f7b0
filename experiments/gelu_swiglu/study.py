"""GELU against SwiGLU at equal model FLOPs: the SwiGLU is narrower, so that both cost the same."""

from effjax.study.spec import Arm, Study
from experiments.workloads import LM10M


def get_study() -> Study:
    """Returns the study; the baseline is the GELU of GPT-2, four times as wide as the model."""
    return LM10M.study(
        'gelu_swiglu',
        (
            Arm('gelu', ("model.ffn={'kind': 'gelu'}",)),
            Arm('swiglu', ("model.ffn={'kind': 'swiglu'}",), method='swiglu'),
        ),
        seeds=(0, 1, 2, 3, 4),
        question='Does SwiGLU save model FLOPs over GELU in the feed-forward part?',
    )
