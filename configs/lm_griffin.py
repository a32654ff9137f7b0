"""A small Griffin: two recurrent blocks to one layer of local attention, gated feed-forward parts.

Griffin (arXiv 2402.19427): RG-LRU blocks carry what is far, multi-query attention over a window
what is near; one period of three here, where its published models repeat it and end on two
recurrent blocks. It shows a hybrid layer pattern, and trains anywhere; it says nothing about
quality at scale.

Cost, from --dry_run: 0.68M parameters, 5.18 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_griffin.py
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.steps = 1000
    config.batch_size = 16
    config.seq_len = 128
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')
    recurrent = dict(mixer=dict(kind='rg_lru', heads=2))
    local = dict(kind='attention', heads=2, kv_heads=1, window=32)
    config.model = dict(
        kind='decoder',
        width=64,
        mixer=local,
        segments=(dict(pattern=(recurrent, recurrent, dict()), repeat=1),),
        ffn=dict(kind='geglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
