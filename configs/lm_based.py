"""A small Based: Taylor linear attention and attention over a small window, in turns.

Based (arXiv 2402.18668) sees exactly what is near by a window, and all else by linear attention
with the exponential's Taylor polynomial. Its layers of gated convolutions are left out here: one
period of two layers. It shows a hybrid layer pattern, and trains anywhere; it says nothing about
quality at scale.

Cost, from --dry_run: 0.63M parameters, 4.75 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_based.py
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.steps = 1000
    config.batch_size = 16
    config.seq_len = 128
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')
    local = dict(mixer=dict(kind='attention', heads=2, window=16))
    config.model = dict(
        kind='decoder',
        width=64,
        mixer=dict(kind='based', heads=2),
        segments=(dict(pattern=(dict(), local), repeat=1),),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
