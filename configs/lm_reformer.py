"""A small Reformer language model: configs/lm.py's tiny decoder with attention by hashing.

Reformer (arXiv 2001.04451) with its rotary positions behind the hash and ordinary residuals; a
causal model cuts each bucket by itself. `reversible` has the paper's reversible residuals, so that
what the backward pass keeps does not grow with depth. It shows how the parts are used, and trains
anywhere; it says nothing about quality at scale. There is no decoding state, so it generates no
text.

    python -m effjax.train --config=configs/lm_reformer.py:reversible
"""

from effjax.core.config import defaults


def get_config(variant='sequential'):
    if variant not in ('sequential', 'reversible'):
        from effjax.core.errors import ConfigError

        raise ConfigError(
            f'configs/lm_reformer.py has no variant {variant!r}; it has sequential, reversible.'
        )
    config = defaults()
    config.steps = 1000
    config.batch_size = 16
    config.seq_len = 128
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')
    config.model = dict(
        kind='decoder',
        width=64,
        layers=2,
        mixer=dict(kind='reformer', heads=2, chunk=16, rounds=2),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        block=variant,
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
