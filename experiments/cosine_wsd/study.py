"""Cosine against warm-up, stable, decay: the same budget, both decayed to zero at its end."""

from effjax.study.spec import Arm, Study
from experiments.workloads import LM10M


def get_study() -> Study:
    """Returns the study; the stable schedule decays over its last fifth."""
    return LM10M.study(
        'cosine_wsd',
        (
            Arm('cosine', ("schedule={'kind': 'cosine', 'peak': 0.008, 'warmup': 0.05}",)),
            Arm(
                'wsd',
                ("schedule={'kind': 'wsd', 'peak': 0.008, 'warmup': 0.05, 'decay': 0.2}",),
                method='wsd',
            ),
        ),
        question='Does a warm-up-stable-decay schedule cost anything against a cosine?',
    )
