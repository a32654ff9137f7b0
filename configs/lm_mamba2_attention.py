"""A small hybrid: three Mamba-2 blocks to one of attention, all with feed-forward parts.

The state spaces carry what is far in states of fixed size, one layer in four looks tokens up
exactly. It shows a hybrid layer pattern, and trains anywhere; it says nothing about quality at
scale.

Cost, from --dry_run: 0.77M parameters, 6.52 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_mamba2_attention.py
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.steps = 1000
    config.batch_size = 16
    config.seq_len = 128
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')
    space = dict(mixer=dict(kind='mamba2', head_dim=32, state=16))
    config.model = dict(
        kind='decoder',
        width=64,
        mixer=dict(kind='attention', heads=2),
        segments=(dict(pattern=(space, space, space, dict()), repeat=1),),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
