"""A small PolySketchFormer: configs/lm.py's tiny decoder with sketched polynomial attention.

PolySketchFormer (arXiv 2310.01655) with a random sketch of 8 numbers and blocks of 32 tokens, small
as the model is. It shows how the mixer is used, and trains anywhere; it says nothing about quality
at scale.

Cost, from --dry_run: 0.63M parameters, 4.75 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_polysketch.py
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
        mixer=dict(kind='polysketch', heads=2, sketch=8, block=32),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
