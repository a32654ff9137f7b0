"""ListOps by a small decoder: the value of nested MIN, MAX, MED and SM, asked at the last bracket.

Rows of 20 to 200 tokens; the Long Range Arena's (arXiv 2011.04006) have 500 to 2000, which is
--config.data.min_len=500 --config.data.seq_len=2000 --config.seq_len=2000.

    python -m effjax.train --config=configs/listops.py
    python -m effjax.compare --study=experiments/listops
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.steps = 3000
    config.batch_size = 64
    config.seq_len = 200
    config.data = dict(kind='listops', seq_len=200, min_len=20, train=50_000, valid=2_000)
    config.task = dict(kind='recall')
    config.model = dict(
        kind='decoder',
        width=128,
        layers=4,
        mixer=dict(kind='attention', heads=4),
        ffn=dict(kind='swiglu'),
        positions=dict(kind='rope', base=10000.0),
        init='lecun',
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.05)
    config.evals.valid = dict(every_share=0.1)
    return config
