"""A small LongNet language model: configs/lm.py's tiny decoder with a sparse mask.

LongNet (arXiv 2307.02486): segments of 32 tokens, and of 128 in which each fourth token is seen.
Rows of 128 tokens are too short to save time by it; the config shows how the mixer is used, and
trains anywhere. It says nothing about quality at scale.

Cost, from --dry_run: 0.63M parameters, 4.59 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_longnet.py
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
        mixer=dict(kind='longnet', heads=2, segments=(32, 128), dilations=(1, 4)),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
