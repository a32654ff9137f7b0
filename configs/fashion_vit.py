"""A plain vision transformer on Fashion-MNIST, judged on its standard test set.

Give the folder of the four files of the set (train-images-idx3-ubyte.gz, ...):

    python -m effjax.train --config=configs/fashion_vit.py --config.data.path=fashion-mnist

1.2M parameters, 60,000 images of 28x28 cut into 49 patches of 4x4, 10 epochs, nothing done to the
images. Cost, from --dry_run: 0.378 GFLOP an image, 0.227 PFLOP in all.

`:stack` grows it from 3 layers, `:ligo` from 3 layers of half the width by maps that 100 steps
learn; the small model takes 20 % of the budget, which must then be given in FLOPs to be equal:

    python -m effjax.train --config=configs/fashion_vit.py:ligo --config.budget=2.27e14flops \\
        --config.data.path=fashion-mnist
"""

from effjax.core.config import defaults
from effjax.core.errors import ConfigError

ANEW = dict(warmup=0.05)
NARROW = dict(
    layers=3, width=64, mixer=dict(kind='attention', heads=2), ffn=dict(kind='gelu', hidden=256)
)
STAGES = {
    '': (),
    'stack': (
        dict(name='half', model=dict(layers=3), budget='20%'),
        dict(name='whole', grow='stack', budget='80%'),
    ),
    'ligo': (
        dict(name='small', model=NARROW, budget='20%'),
        dict(name='whole', grow=dict(kind='ligo', steps=100), schedule=ANEW, budget='80%'),
    ),
}


def get_config(variant=''):
    if variant not in STAGES:
        raise ConfigError(
            f'configs/fashion_vit.py has no variant {variant!r}; it has stack and ligo.'
        )
    config = defaults()
    config.stages = STAGES[variant]
    config.budget = '600000examples'
    config.batch_size = 256
    config.data = dict(kind='idx', path='fashion-mnist')
    config.task = dict(kind='classification')
    config.model = dict(
        kind='vit',
        patch=4,
        width=128,
        layers=6,
        mixer=dict(kind='attention', heads=4),
        ffn=dict(kind='gelu'),
        norm=dict(kind='layernorm'),
        dropout=0.1,
        init='lecun',
    )
    config.seq_len = 50  # 49 patches of 4x4 and the class token
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.3)
    config.schedule = dict(kind='cosine', peak=2e-3, warmup=0.1)
    config.evals.valid = dict(every_share=0.2)
    return config
