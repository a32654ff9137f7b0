"""Mega against attention on ListOps, at equal model FLOPs and with as many parameters."""

import dataclasses

from effjax.study.spec import Arm, Study
from experiments.listops.study import get_study as listops


def get_study() -> Study:
    """Returns the study; budget, seeds and grid are those of `experiments/listops`."""
    # Mega's mixer is larger than attention's: a narrower feed-forward part makes up for it.
    mega = (
        "model.mixer={'kind': 'mega', 'key_dim': 64, 'value_dim': 128}",
        "model.ffn={'kind': 'swiglu', 'hidden': 296}",
        "model.positions={'kind': 'none'}",
    )
    return dataclasses.replace(
        listops(),
        name='mega',
        arms=(Arm('attention'), Arm('mega', mega, method='mega')),
        question='Does Mega follow the structure of nested lists better than attention?',
    )
