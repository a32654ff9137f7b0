"""Training: the loop, the step, stages, checkpoints, metrics, evaluation, optimizers, schedules.

Optimizers and schedules are chosen by name. An optimizer component is a function
`(leaves, *, <config arguments>) -> Optimizer` (see `training.optimizers`); a schedule component is
a function `(*, <config arguments>) -> Schedule` (see `training.schedules`).
"""

OPTIMIZERS = {
    'adafactor': 'effjax.training.optimizers:adafactor',
    'adamw': 'effjax.training.optimizers:adamw',
    'lamb': 'effjax.training.optimizers:lamb',
    'lion': 'effjax.training.optimizers:lion',
    'muon': 'effjax.training.optimizers:muon',
    'schedule_free_adamw': 'effjax.training.optimizers:schedule_free_adamw',
    'sgd': 'effjax.training.optimizers:sgd',
}

SCHEDULES = {
    'constant': 'effjax.training.schedules:constant',
    'cosine': 'effjax.training.schedules:cosine',
    'linear': 'effjax.training.schedules:linear',
    'piecewise': 'effjax.training.schedules:piecewise',
    'wsd': 'effjax.training.schedules:wsd',
}
