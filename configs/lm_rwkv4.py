"""A small RWKV-4 language model: configs/lm.py's tiny decoder with its time mixing for attention.

Time mixing as in RWKV-4 (arXiv 2305.13048), and a gated feed-forward part in place of its channel
mixing; no positions, the token shift and decays know the order. It shows how the mixer is used, and
trains anywhere; it says nothing about quality at scale.

Cost, from --dry_run: 0.63M parameters, 4.54 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_rwkv4.py
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
        mixer=dict(kind='rwkv4'),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='none'),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
