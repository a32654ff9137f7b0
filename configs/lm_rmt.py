"""A small recurrent memory transformer: segments of 32 tokens hand on 4 tokens of memory.

Bulatov et al., arXiv 2207.06881: a decoder of rows of 128 tokens that sees 32 at a time; gradients
pass two segments. Rows are windows of one stream, since a memory knows no documents. It shows how
the memory is used, and trains anywhere; it says nothing about quality at scale.

Cost, from --dry_run: 0.63M parameters, 4.89 GFLOP a step of 2048 tokens.

    python -m effjax.train --config=configs/lm_rmt.py
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.steps = 1000
    config.batch_size = 16
    config.seq_len = 128
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='stream')
    config.model = dict(
        kind='decoder',
        width=64,
        layers=2,
        mixer=dict(kind='attention', heads=2),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        memory=dict(tokens=4, segment=32, truncate=2),
        tied=False,
    )
    config.optimizer = dict(kind='adamw', b2=0.95, weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=1e-3, warmup=0.02)
    config.evals.valid = dict(every_share=0.1, batches=16)
    return config
