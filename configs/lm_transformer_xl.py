"""A small Transformer-XL: segments of 32 tokens that see a memory of the 64 tokens before them.

Dai et al., arXiv 1901.02860: post-norm blocks, relative positions, memories without gradients. A
token of the second layer has seen up to two memories back. It shows how the mixer is used, and
trains anywhere; it says nothing about quality at scale.

Cost, from --dry_run: 0.63M parameters, 4.69 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_transformer_xl.py
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
        mixer=dict(kind='transformer_xl', heads=2, segment=32, memory=64),
        ffn=dict(kind='relu'),
        norm=dict(kind='layernorm'),
        positions=dict(kind='none'),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
