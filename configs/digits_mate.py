"""MATE on the embedded 8x8 digits: half of the heads look along rows, half along columns.

MATE (arXiv 2109.04312) was made for tables; no table comes with effjax, and a grid of a known width
that does is the digits', read as 8 x 8 numbers, one a token. Two layers lead from any cell to any
other. Everything else is configs/digits_vit.py's, but for patches of one pixel, 64 tokens in place
of 16, the mean over them, since a class token would shift the grid, and a third of the budget.

It reached 86.5 % of the 385 held-out images in one run of 20000 examples, ten minutes of training
on two busy cores. It shows how the mixer is used and says nothing of it against attention, which
was not run at this shape and budget.

    python -m effjax.train --config=configs/digits_mate.py
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.budget = '20000examples'
    config.batch_size = 64
    config.data = dict(kind='digits')
    config.task = dict(kind='classification', label_smoothing=0.1)
    config.model = dict(
        kind='vit',
        patch=1,
        width=64,
        layers=4,
        mixer=dict(kind='mate', heads=4, columns=8),
        ffn=dict(kind='gelu'),
        norm=dict(kind='layernorm'),
        pool='mean',
        init='lecun',
    )
    config.seq_len = 64  # pixels
    config.optimizer = dict(kind='adamw', weight_decay=0.5)
    config.schedule = dict(kind='cosine', peak=3e-3, warmup=0.1)
    config.precision.kind = 'fp32'
    config.evals.valid = dict(every_share=0.1)
    return config
