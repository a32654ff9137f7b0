"""nanoGPT's character model of tiny Shakespeare, at its budget: 5000 steps of 64 x 256 characters.

Give the text's path:

    python -m effjax.train --config=configs/shakespeare_char.py --config.data.path=input.txt

The last 10 % of the text are held out by position and judged whole. nanoGPT's best is 1.4697 nats
a character; here the lowest of a run is 1.4650 in the mean of three seeds (1.4630, 1.4675,
1.4645), reached near step 2000, and the last is 1.69, in 44 seconds of training on one H200
(experiments/shakespeare_char).
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.steps = 5000
    config.batch_size = 64
    config.seq_len = 256
    config.data = dict(
        kind='text',
        path='input.txt',
        one_document=True,
        valid_fraction=0.1,
        tokenizer=dict(kind='char'),
        packing='stream',
    )
    config.model = dict(
        kind='decoder',
        width=384,
        layers=6,
        mixer=dict(kind='attention', heads=6, attention_dropout=0.2),
        ffn=dict(kind='gelu'),
        norm=dict(kind='layernorm'),
        positions=dict(kind='learned'),
        tied=True,
        dropout=0.2,
    )
    config.optimizer = dict(kind='adamw', b2=0.99, weight_decay=0.1)
    config.schedule = dict(kind='cosine', peak=1e-3, warmup=0.02, final=0.1)
    config.precision.kind = 'bf16'
    config.evals.valid = dict(every_steps=250)
    config.checkpoint.every_steps = 1000
    config.finish.sample_tokens = 200
    return config
