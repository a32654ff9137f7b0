"""A plain vision transformer on the embedded 8x8 digits: half a minute on two CPU cores.

It reached 97.6 % of the 385 held-out images in the mean of five seeds (96.6 to 98.7 %), as much as
logistic regression on the pixels, 97.7 %: 1412 images are few for a transformer, and strong weight
decay is what makes up for it (with 0.05 in place of 0.5 it was 96.1 %). Smoothed labels keep single
confident mistakes from ruling the held-out loss, which varies by 13 % from seed to seed, not 42 %.

python -m effjax.train --config=configs/digits_vit.py
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.budget = '60000examples'
    config.batch_size = 64
    config.data = dict(kind='digits')
    config.task = dict(kind='classification', label_smoothing=0.1)
    config.model = dict(
        kind='vit',
        patch=2,
        width=64,
        layers=4,
        mixer=dict(kind='attention', heads=4),
        ffn=dict(kind='gelu'),
        norm=dict(kind='layernorm'),
        init='lecun',
    )
    config.seq_len = 17  # 16 patches of 2x2 and the class token
    config.optimizer = dict(kind='adamw', weight_decay=0.5)
    config.schedule = dict(kind='cosine', peak=3e-3, warmup=0.1)
    config.precision.kind = 'fp32'
    config.evals.valid = dict(every_share=0.1)
    return config
