"""A small Mega language model: moving averages and gated attention within chunks of 64 tokens.

Mega-chunk (arXiv 2209.10655): averages carry what is far, a single attention head what lies in the
same chunk; post-norm blocks, in which the mixer's update gate is exactly the paper's. It shows how
the mixer is used, and trains anywhere; it says nothing about quality at scale.

Cost, from --dry_run: 0.68M parameters, 5.20 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_mega.py
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
        block='postnorm',
        mixer=dict(kind='mega', key_dim=32, chunk=64),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='layernorm'),
        positions=dict(kind='none'),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
