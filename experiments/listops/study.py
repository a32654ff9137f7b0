"""Attention, Mamba and RetNet on ListOps, at equal model FLOPs."""

from effjax.study.spec import Arm, Study


def get_study() -> Study:
    """Returns the study; its budget is 3000 steps of the baseline."""
    return Study(
        name='listops',
        config='configs/listops.py',
        arms=(
            Arm('attention'),
            Arm(
                'mamba',
                ("model.mixer={'kind': 'mamba'}", "model.positions={'kind': 'none'}"),
                method='mamba',
            ),
            Arm(
                'retnet',
                ("model.mixer={'kind': 'retnet', 'heads': 4}",),
                method='retnet',
                grid=(1e-3, 2e-3, 4e-3, 8e-3),
            ),
        ),
        axis='model_flops',
        budget=2e14,
        seeds=(0, 1, 2),
        metric='valid.accuracy',
        margin=0.01,
        fractions=(1.0,),
        tune_key='schedule.peak',
        grid=(5e-4, 1e-3, 2e-3, 4e-3),
        question='Which mixer follows the structure of nested lists?',
        scale='0.8M parameters, 50,000 rows of 20 to 200 tokens',
    )
