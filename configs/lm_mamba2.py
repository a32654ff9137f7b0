"""A small Mamba-2 language model: four Mamba-2 blocks, no feed-forward parts, no positions.

Mamba-2 (arXiv 2405.21060) stacks one kind of block, which mixes tokens and channels at once; two of
them take the place of attention and a feed-forward part. Heads and states are small here, as the
model is. It shows how the mixer is used, and trains anywhere; it says nothing about quality at
scale.

Cost, from --dry_run: 0.64M parameters, 4.79 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_mamba2.py
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
        mixer=dict(kind='mamba2', head_dim=32, state=16),
        layers=4,
        ffn=None,
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='none'),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
