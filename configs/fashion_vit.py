"""A plain vision transformer on Fashion-MNIST, judged on its standard test set.

Give the folder of the four files of the set (train-images-idx3-ubyte.gz, ...):

    python -m effjax.train --config=configs/fashion_vit.py --config.data.path=fashion-mnist

1.2M parameters, 60,000 images of 28x28 cut into 49 patches of 4x4, 10 epochs, nothing done to the
images. Cost, from --dry_run: 0.378 GFLOP an image, 0.227 PFLOP in all.
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
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
