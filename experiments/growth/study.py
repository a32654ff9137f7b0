"""Every way to grow a language model, side by side at equal model FLOPs, all stages paid for."""

from effjax.study.spec import Arm, Study
from experiments.workloads import LM_GROWTH

# Variant of configs/lm_growth.py -> the technique that its card is of, '' without one of its own.
METHODS = {
    'stack': 'stackbert',
    'gstack': '',
    'append': '',
    'midas': '',
    'staged': 'staged-training',
    'staged_as_released': '',
    'net2net': '',
    'aki': '',
    'lemon': '',
    'msg': '',
    'compound': 'compoundgrow',
    'ligo': 'ligo',
}


def arms(only=METHODS, size=''):
    """The arms of a study: from scratch first, then grown."""
    end = f'-{size}' if size else ''
    config = LM_GROWTH.config
    return (
        Arm('scratch', config=f'{config}:{size}' if size else config),
        *(Arm(name, config=f'{config}:{name}{end}', method=METHODS[name]) for name in only),
    )


def get_study() -> Study:
    """Returns the study; every run gets the whole budget, and the small models are paid for."""
    return LM_GROWTH.study(
        'growth',
        arms(),
        fractions=(1.0,),
        question='Does growing a model save model FLOPs, the small models paid for?',
    )
