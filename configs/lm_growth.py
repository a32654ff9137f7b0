"""Growing a language model of Python source: 12.5M parameters in 16 layers, from scratch or grown.

    python -m effjax.train --config=configs/lm_growth.py:stack

Without a variant the model is trained from scratch. A variant names how it is grown; all of them
end with the same model after the same model FLOPs, whatever was trained before it included:

    stack      4, 8, 16 layers at 12.5 %, 17.5 %, 70 % of the run     StackingBERT, as re-run by
                                                                      No Train No Gain
    gstack     4 layers, then the stack four times, all else anew     G_stack
    append     4, 8, 12, 16 layers, the last four copied each time    gradual stacking
    midas      the same, the middle four copied                       MIDAS
    staged     half the width, then doubled with both repairs         Staged Training
    staged_as_released  the same as its authors' code does it: symmetric halves, half the moments
    net2net    half the width, then copies of units                   bert2BERT's FPI
    aki        the same, new units from the next layer                bert2BERT's AKI
    lemon      half the width, copies with unequal shares             LEMON
    msg        half of both, then width, then depth, masks ramping    MSG
    compound   half the depth, feed-forward width and length, then all of them      CompoundGrow
    ligo       half of both, then maps that 100 steps learn           LiGO

Those that the papers begin from a model that was there anyway have a second form, whose cost is
free: `gstack_reuse`, `aki_reuse`, `lemon_reuse`, `ligo_reuse`, and `inherit`, where the small model
is a teacher (Knowledge Inheritance). They need the run of a small model, `quarter`, `narrow` or
`small` (a quarter of the layers, half the width, half of both; a fifth of the budget):

    for size in quarter narrow small; do
      python -m effjax.train --config=configs/lm_growth.py:$size --workdir=runs/lm_growth/$size
    done

`-tiny` behind a variant (`stack-tiny`, `tiny` alone from scratch) makes a model of 0.2M parameters
in 4 layers that trains in seconds on a CPU; its small models are looked for in
runs/lm_growth/quarter-tiny and so on.

Cost: 2e15 model FLOPs in all, from scratch 20 million bytes of the standard library's source
(--dry_run shows each stage). AdamW, since the papers used it. Where a paper starts the learning
rate anew after growing, so does the variant; the small model's is then held at its peak, or decayed
where the paper grew a finished model.
"""

from effjax.core.config import defaults
from effjax.core.errors import ConfigError

# variant -> (width, layers, heads, hidden, sequence, batch)
SIZES = {
    '': (256, 16, 8, 672, 1024, 16),
    'tiny': (64, 4, 4, 168, 128, 8),
}
EPS = 1e-6
HELD = dict(final=1.0)  # a schedule that stays at its peak
ANEW = dict(warmup=0.05)  # one that begins again, and ends at 0


def get_config(variant=''):
    method, _, size = variant.partition('-')
    if variant in SIZES:
        method, size = '', variant
    methods = (*METHODS, *SMALL, *REUSE)
    known = variant in SIZES or (method in methods and variant in (method, f'{method}-tiny'))
    if not known:
        raise ConfigError(
            f'configs/lm_growth.py has no variant {variant!r}; it has {", ".join(methods)}, each '
            'also with -tiny behind it, and tiny.'
        )
    width, layers, heads, hidden, seq_len, batch_size = SIZES[size]

    def sizes(depth=1, narrow=1, ffn=0):
        """What differs in a model with so many times fewer layers, less width, hidden units."""
        changes = dict(layers=layers // depth) if depth > 1 else {}
        if narrow > 1:
            changes |= dict(width=width // narrow)
            changes |= dict(mixer=dict(kind='attention', heads=heads // narrow))
        if max(narrow, ffn) > 1:
            changes |= dict(ffn=dict(kind='swiglu', hidden=hidden // (ffn or narrow)))
        return changes

    config = defaults()
    config.budget = '2e11flops' if size == 'tiny' else '2e15flops'
    config.batch_size = batch_size
    config.seq_len = seq_len
    config.data = dict(kind='stdlib', tokenizer=dict(kind='byte'), packing='stream')
    config.model = dict(
        kind='decoder',
        width=width,
        layers=layers,
        mixer=dict(kind='attention', heads=heads),
        ffn=dict(kind='swiglu', hidden=hidden),
        norm=dict(kind='rmsnorm', eps=EPS),
        positions=dict(kind='rope', base=10000.0),
        tied=True,
    )
    config.optimizer = dict(kind='adamw', weight_decay=0.1)
    config.schedule = dict(kind='linear', peak=2e-3, warmup=0.05)
    config.evals.valid = dict(every_share=0.2, batches=24)
    if size == 'tiny':
        config.precision.kind = 'fp32'  # a CPU is slower in bfloat16
        config.schedule.peak = 1e-2
        config.evals.valid = dict(every_share=0.5, batches=8)
    if method in METHODS:
        config.stages = METHODS[method](sizes, config)
    elif method in SMALL:
        config.model.update(sizes(*SMALL[method]))
        config.budget = '4e10flops' if size == 'tiny' else '4e14flops'
    elif method:
        source, grow = REUSE[method]
        if method == 'ligo_reuse' and size == 'tiny':
            grow = dict(grow, steps=10)
        run = f'runs/lm_growth/{source}{"-tiny" if size else ""}'
        if grow is None:
            config.task = _taught(run)
        else:
            config.init_from = dict(run=run, charge=False)
            config.stages = (dict(name='whole', grow=grow, share=1.0),)
    return config


def _taught(run):
    return dict(
        kind='distillation',
        task=dict(kind='next_token'),
        teacher=dict(run=run, charge=False),
        alpha=0.5,
        until=0.5,
    )


def stack(sizes, config):
    return (
        dict(name='quarter', model=sizes(4), budget='12.5%'),
        dict(name='half', model=sizes(2), grow='stack', budget='17.5%'),
        dict(name='whole', grow='stack', budget='70%'),
    )


def gstack(sizes, config):
    return (
        dict(name='quarter', model=sizes(4), schedule=HELD, budget='12.5%'),
        dict(name='whole', grow=dict(kind='stack', moments='reset'), schedule=ANEW, budget='87.5%'),
    )


def _by_quarters(kind):
    def stages(sizes, config):
        quarter = config.model.layers // 4
        return (
            dict(name='quarter', model=sizes(4), budget='10%'),
            dict(name='half', model=sizes(2), grow=kind, budget='15%'),
            dict(name='most', model=dict(layers=3 * quarter), grow=kind, budget='15%'),
            dict(name='whole', grow=kind, budget='60%'),
        )

    return stages


def _by_width(grow, small=HELD):
    def stages(sizes, config):
        return (
            dict(name='narrow', model=sizes(1, 2), schedule=small, budget='20%'),
            dict(name='whole', grow=grow, schedule=ANEW, budget='80%'),
        )

    return stages


def msg(sizes, config):
    # Masked norms see half of the units: what is added to their mean square is twice as much.
    twice = dict(norm=dict(kind='rmsnorm', eps=2 * EPS))
    return (
        dict(name='small', model=sizes(2, 2) | twice, budget='15%'),
        dict(name='wide', model=sizes(2), grow=dict(kind='msg', ramp=0.5), budget='15%'),
        dict(name='whole', grow=dict(kind='msg', ramp=0.2), budget='70%'),
    )


def compound(sizes, config):
    short = config.seq_len // 4
    return (
        dict(
            name='small',
            model=sizes(2, ffn=2),
            seq_len=short,
            batch_size=4 * config.batch_size,
            budget='25%',
        ),
        dict(name='whole', grow=dict(kind='compound', depth='stack'), budget='75%'),
    )


def ligo(sizes, config):
    steps = 10 if config.model.layers == 4 else 100
    return (
        dict(name='small', model=sizes(2, 2), schedule=dict(final=0.0), budget='15%'),
        dict(name='whole', grow=dict(kind='ligo', steps=steps), schedule=ANEW, budget='85%'),
    )


# variant -> (times fewer layers, times less width), of the small models that others begin from
SMALL = {'quarter': (4, 1), 'narrow': (1, 2), 'small': (2, 2)}
# variant -> (its small model, the operator; None: it is a teacher)
REUSE = {
    'gstack_reuse': ('quarter', dict(kind='stack', moments='reset')),
    'aki_reuse': ('narrow', dict(kind='aki', moments='reset')),
    'lemon_reuse': ('narrow', dict(kind='lemon')),
    'ligo_reuse': ('small', dict(kind='ligo', steps=100)),
    'inherit': ('quarter', None),
}
METHODS = {
    'stack': stack,
    'gstack': gstack,
    'append': _by_quarters('append'),
    'midas': _by_quarters('midas'),
    'staged': _by_width('staged'),
    'staged_as_released': _by_width(
        dict(kind='staged', repair_symmetry=False, repair_moments=False)
    ),
    'net2net': _by_width(dict(kind='net2net', noise=1e-2), small=dict(final=0.0)),
    'aki': _by_width(dict(kind='aki', moments='reset'), small=dict(final=0.0)),
    'lemon': _by_width('lemon', small=dict(final=0.0)),
    'msg': msg,
    'compound': compound,
    'ligo': ligo,
}
