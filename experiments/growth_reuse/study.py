"""Growth from small models that were there anyway: their cost is free, and charged in a column.

The small models first:

    for size in quarter narrow small; do
      python -m effjax.train --config=configs/lm_growth.py:$size --workdir=runs/lm_growth/$size
    done
"""

from effjax.study.spec import Arm, Study
from experiments.workloads import LM_GROWTH

# Arm -> (the small model's variant of configs/lm_growth.py, the technique that its card is of).
ARMS = {
    'gstack_reuse': ('quarter', ''),
    'aki_reuse': ('narrow', ''),
    'lemon_reuse': ('narrow', ''),
    'ligo_reuse': ('small', 'ligo'),
    'inherit': ('quarter', 'knowledge-inheritance'),
}


def get_study() -> Study:
    """Returns the study; runs keep checkpoints of nothing, but begin from runs that do."""
    config = LM_GROWTH.config
    return LM_GROWTH.study(
        'growth_reuse',
        (
            Arm('scratch'),
            *(
                Arm(
                    name,
                    config=f'{config}:{name}',
                    method=method,
                    source_run=f'runs/lm_growth/{source}',
                )
                for name, (source, method) in ARMS.items()
            ),
        ),
        fractions=(0.75, 1.0),
        batched=False,  # lanes begin from fresh values
        question='Does a small model that is there anyway save model FLOPs of a large one?',
    )
