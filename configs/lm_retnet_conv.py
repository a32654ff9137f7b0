"""A small hybrid: configs/lm_retnet.py with a short convolution before each layer's retention.

A causal convolution of 4 taps over queries, keys and values looks at what is next to a token, which
retention, whose heads decay at fixed rates, sees only blurred; as in the linear-attention models
that came after RetNet (arXiv 2307.08621), whose own layers have none. It shows a hybrid, and trains
anywhere; it says nothing about quality at scale.

Cost, from --dry_run: 0.67M parameters, 5.18 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_retnet_conv.py
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
        mixer=dict(kind='retnet', heads=2, conv=4),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='none'),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
