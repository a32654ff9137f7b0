"""BERT (arXiv 1810.04805) by size: an encoder of text that learns to fill in masked tokens.

15 % of a row's tokens are predicted, of which 80 % are masked, 10 % random and 10 % left alone. No
sentence pairs, token types or next-sentence loss. `tiny` (default) trains anywhere on the text that
comes with Python and shows how the parts are used; `base` and `large` are the published shapes.

    python -m effjax.train --config=configs/bert.py

Other mixers that look both ways are one line away, such as --config.model.mixer.kind=linformer.
"""

from effjax.core.config import defaults

# size -> (width, layers, heads, sequence, batch, vocabulary)
SIZES = {
    'tiny': (64, 2, 2, 128, 32, 4096),
    'base': (768, 12, 12, 512, 256, 30522),
    'large': (1024, 24, 16, 512, 256, 30522),
}


def get_config(size='tiny'):
    if size not in SIZES:
        from effjax.core.errors import ConfigError

        raise ConfigError(f'configs/bert.py has no size {size!r}; it has {", ".join(SIZES)}.')
    width, layers, heads, seq_len, batch_size, vocabulary = SIZES[size]
    config = defaults()
    config.steps = 2000
    config.batch_size = batch_size
    config.seq_len = seq_len
    tokenizer = dict(kind='wordpiece', vocab_size=vocabulary)
    config.data = dict(kind='stdlib', tokenizer=tokenizer, packing='stream')
    config.task = dict(kind='masked_lm', rate=0.15, masked=0.8, random=0.1)
    config.model = dict(
        kind='encoder',
        width=width,
        layers=layers,
        mixer=dict(kind='attention', heads=heads),
        ffn=dict(kind='gelu'),
        norm=dict(kind='layernorm', eps=1e-12),
        positions=dict(kind='learned'),
        block='postnorm',
        dropout=0.0 if size == 'tiny' else 0.1,
    )
    config.optimizer = dict(kind='adamw', b2=0.999, eps=1e-6, weight_decay=0.01)
    config.schedule = dict(kind='linear', peak=1e-3 if size == 'tiny' else 1e-4, warmup=0.05)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
