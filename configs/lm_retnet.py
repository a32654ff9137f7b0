"""A small RetNet language model: configs/lm.py's tiny decoder with retention for attention.

RetNet (arXiv 2307.08621) with its gates and norms, values twice as wide as keys; retention turns
queries and keys by itself, so that the model adds no positions. It shows how the mixer is used, and
trains anywhere; it says nothing about quality at scale.

`:conv` is a hybrid: a causal convolution of 4 taps over queries, keys and values looks at what is
next to a token, which retention, whose heads decay at fixed rates, sees only blurred; as in the
linear-attention models that came after RetNet, whose own layers have none.

Cost, from --dry_run: 0.66M parameters (`:conv` 0.67M), 5.18 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_retnet.py
    python -m effjax.train --config=configs/lm_retnet.py:conv
"""

from effjax.core.config import defaults
from effjax.core.errors import ConfigError

TAPS = {'': 0, 'conv': 4}


def get_config(variant: str = ''):
    if variant not in TAPS:
        raise ConfigError(f'configs/lm_retnet.py has no variant {variant!r}; it has conv.')
    config = defaults()
    config.steps = 1000
    config.batch_size = 16
    config.seq_len = 128
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')
    config.model = dict(
        kind='decoder',
        width=64,
        layers=2,
        mixer=dict(kind='retnet', heads=2, conv=TAPS[variant]),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='none'),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
