"""A Llama-like decoder to start from, by size: tiny (default), 10m, 30m, 124m, 374m, 1p3b.

python -m effjax.train --config=configs/lm.py:30m --config.data.kind=text --config.data.path=my.txt
"""

from effjax.core.config import defaults

# size -> (width, layers, heads, sequence, batch)
SIZES = {
    'tiny': (64, 2, 2, 128, 16),
    '10m': (256, 6, 4, 512, 32),
    '30m': (384, 8, 6, 512, 64),
    '124m': (768, 12, 12, 1024, 64),
    '374m': (1024, 24, 8, 2048, 16),
    '1p3b': (2048, 24, 16, 2048, 8),
}


def get_config(size='tiny'):
    if size not in SIZES:
        from effjax.core.errors import ConfigError

        raise ConfigError(f'configs/lm.py has no size {size!r}; it has {", ".join(SIZES)}.')
    width, layers, heads, seq_len, batch_size = SIZES[size]
    config = defaults()
    config.steps = 1000
    config.batch_size = batch_size
    config.seq_len = seq_len
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')
    config.model = dict(
        kind='decoder',
        width=width,
        layers=layers,
        mixer=dict(kind='attention', heads=heads),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    config.checkpoint.every_seconds = 600.0
    return config
