"""A small language model of Python source, trained in four minutes on two CPU cores.

Data: the CPython standard library's own source, which is on every machine. The held-out files are
compared with gzip -9. What it reached, on which machine: README.md.

    python -m effjax.train --config=configs/quickstart.py
"""

from effjax.core.config import defaults


def get_config():
    config = defaults()
    config.budget = '240s'
    config.batch_size = 8
    config.seq_len = 256
    config.data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')
    config.model = dict(
        kind='decoder',
        width=256,
        layers=4,
        mixer=dict(kind='attention', heads=4),
        ffn=dict(kind='swiglu'),
        tied=True,
    )
    config.optimizer = dict(kind='muon')
    config.schedule = dict(kind='linear', peak=3e-3, warmup=0.05)
    config.precision.kind = 'fp32'  # a CPU is slower in bfloat16
    config.evals.valid = dict(every_share=0.25, batches=16)
    config.evals.valid_all = dict()
    config.checkpoint.every_seconds = 60.0
    config.finish.gzip = True
    config.finish.sample_tokens = 160
    config.finish.sample_prompt = 'def main('
    return config
