"""A byte-level language model of Python source, 10.7M parameters: the workload of the studies.

The text is the source of this Python's own standard library, so it is always there, and so losses
compare only between runs on the same version of Python; a run's digest of the data says which.
Bytes, because the library is small: its 11 million bytes are as many tokens, where 4096 byte pairs
would make 3 million of them. 15.3 million tokens are 1.4 epochs; at 35 million (3.2 epochs) the
held-out loss no longer fell: 0.730 to 0.741 nats a byte at 26 million, 0.735 to 0.744 at 35 million
(GELU, three seeds, one H200), the first runs of experiments/gelu_swiglu.

Rows are windows of the stream of documents (`stream`): without document ids attention runs as
cuDNN's plain form, the fast one, and also under `vmap` over seeds, where the forms with documents
do not (see kernels/attention/cudnn.py).

Cost, from --dry_run: 78.5 MFLOP a token, 1.29 TFLOP a step, 1.2 PFLOP in all. Every fifth of the
run is judged on 24 batches spread over the held-out files, together 4.3 % of the training's FLOPs.

    python -m effjax.train --config=configs/lm10m.py

`configs/lm10m.py:tiny` has 0.2M parameters and takes seconds on a CPU, to try a study on.
"""

from effjax.core.config import defaults
from effjax.core.errors import ConfigError

# variant -> (width, layers, heads, sequence, batch, steps, peak learning rate)
SIZES = {
    '': (384, 6, 6, 1024, 16, 933, 8e-3),
    'tiny': (96, 2, 3, 128, 8, 160, 2e-2),
}


def get_config(variant=''):
    if variant not in SIZES:
        raise ConfigError(
            f'configs/lm10m.py has no variant {variant!r}; it has tiny, or give none.'
        )
    width, layers, heads, seq_len, batch_size, steps, peak = SIZES[variant]
    config = defaults()
    config.steps = steps
    config.batch_size = batch_size
    config.seq_len = seq_len
    config.data = dict(kind='stdlib', tokenizer=dict(kind='byte'), packing='stream')
    config.model = dict(
        kind='decoder',
        width=width,
        layers=layers,
        mixer=dict(kind='attention', heads=heads),
        ffn=dict(kind='swiglu'),
        norm=dict(kind='rmsnorm'),
        positions=dict(kind='rope', base=10000.0),
        tied=True,
    )
    config.optimizer = dict(kind='muon', weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=peak, warmup=0.05)
    config.evals.valid = dict(every_share=0.2, batches=24)
    if variant == 'tiny':
        config.precision.kind = 'fp32'  # a CPU is slower in bfloat16
        config.evals.valid = dict(every_share=0.5, batches=10)
    return config
