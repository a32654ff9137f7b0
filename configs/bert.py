"""BERT (arXiv 1810.04805) by size: an encoder of text that learns to fill in masked tokens.

15 % of a row's tokens are predicted, of which 80 % are masked, 10 % random and 10 % left alone. No
sentence pairs, token types or next-sentence loss. `tiny` (default) reads the text that comes with
Python and trains anywhere: after 1000 of its steps, half an hour on two busy cores, a held-out
masked token cost 4.98 nats and one in six was found. `base` and `large` are the published shapes.
`linformer`, `nystromformer`, `reformer` and `etc` are the tiny one with that mixer: how it is used,
and no word on its quality. `etc` has 8 global tokens, one for each 16 of a row, and no positions.
`roberta` is the tiny one by RoBERTa's recipe (arXiv 1907.11692): byte-level BPE, full rows of text,
twice the rows a step. Masks are drawn anew each time a row comes, as in all of these;
`--config.task.dynamic=false` keeps a row's masks.

    python -m effjax.train --config=configs/bert.py:linformer
"""

from effjax.core.config import defaults

# size -> (width, layers, heads, sequence, batch, vocabulary)
SIZES = {
    'tiny': (64, 2, 2, 128, 32, 4096),
    'base': (768, 12, 12, 512, 256, 30522),
    'large': (1024, 24, 16, 512, 256, 30522),
}
# Mixers of the tiny model, beside their heads.
MIXERS = {
    'linformer': dict(rank=32),
    'nystromformer': dict(landmarks=16, conv=5),
    'reformer': dict(chunk=16, rounds=2),
    'etc': dict(radius=16),
}
# What else of the model goes with a mixer.
AROUND = {'etc': dict(positions=dict(kind='none'), globals=dict(tokens=8, every=16))}


def get_config(variant='tiny'):
    if variant not in SIZES and variant not in MIXERS and variant != 'roberta':
        from effjax.core.errors import ConfigError

        known = ', '.join([*SIZES, *MIXERS, 'roberta'])
        raise ConfigError(f'configs/bert.py has no variant {variant!r}; it has {known}.')
    tiny = variant not in ('base', 'large')
    width, layers, heads, seq_len, batch_size, vocabulary = SIZES['tiny' if tiny else variant]
    mixer = variant if variant in MIXERS else 'attention'
    config = defaults()
    config.steps = 2000
    config.batch_size = 2 * batch_size if variant == 'roberta' else batch_size
    config.seq_len = seq_len
    pieces = 'bpe' if variant == 'roberta' else 'wordpiece'
    tokenizer = dict(kind=pieces, vocab_size=vocabulary)
    config.data = dict(kind='stdlib', tokenizer=tokenizer, packing='stream')
    config.task = dict(kind='masked_lm', rate=0.15, masked=0.8, random=0.1, dynamic=True)
    config.model = dict(
        kind='encoder',
        width=width,
        layers=layers,
        mixer=dict(kind=mixer, heads=heads, **MIXERS.get(mixer, {})),
        ffn=dict(kind='gelu'),
        norm=dict(kind='layernorm', eps=1e-12),
        positions=dict(kind='learned'),
        block='postnorm',
        dropout=0.0 if tiny else 0.1,
    )
    config.model.update(AROUND.get(mixer, {}))
    config.optimizer = dict(kind='adamw', b2=0.999, eps=1e-6, weight_decay=0.01)
    config.schedule = dict(kind='linear', peak=2e-3 if tiny else 1e-4, warmup=0.05)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
