"""A small H3 language model: configs/lm.py's tiny decoder with state spaces for attention.

H3 (arXiv 2212.14052) with elementwise products and 16 numbers a state; there are no positions,
since state spaces know the order. It shows how the mixer is used, and trains anywhere; it says
nothing about quality at scale.

Cost, from --dry_run: 0.64M parameters, 4.59 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_h3.py
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.steps = 1000
    config.batch_size = 16
    config.seq_len = 128
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')
    config.model = dict(
        kind='decoder',
        width=64,
        layers=2,
        mixer=dict(kind='h3', state=16),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='none'),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
