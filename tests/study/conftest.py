"""Analyses made up from a formula, as rich as a real study's, for the tests of what is shown."""

import math
import random

import pytest

from effjax.study.records import COSTS, Analysis, Cell, Comparison, Interval, Ratio, Tuning

BUDGET = 2.1e15
ENVIRONMENT = {
    'effjax': '0.1', 'python': '3.12.9', 'jax': '0.12.0', 'device': 'NVIDIA H200',
    'backend': 'gpu', 'devices': 1, 'xla_flags': '--xla_gpu_deterministic_ops=true',
}  # fmt: skip
# Arm -> (catalogue id, changes, cost of a step over the baseline's, loss at the end).
ARMS = {
    'gelu': ('', [], 1.0, 1.90),
    'swiglu': ('palm', ['model.ffn.kind=swiglu', 'model.ffn.hidden=683'], 1.02, 1.86),
    'parallel-block': ('simplified-block', ['model.block=parallel'], 0.94, 1.93),
}


def costs(share, step_cost, seed, **unknown):
    """What a run spent; energy is not known on this machine."""
    steps = round(2000 * share / step_cost)
    flops = BUDGET * share
    out = dict.fromkeys(COSTS) | {
        'steps': steps, 'tokens': 16384 * steps, 'tokens_computed': 16500 * steps,
        'examples': 64 * steps, 'model_flops': flops, 'hardware_flops': 1.07 * flops,
        'optimizer_flops': 1.4e8 * steps, 'reference_seconds': 0.05 * steps * step_cost,
        'seconds': 0.051 * steps * step_cost + seed, 'data_seconds': 0.4, 'compile_seconds': 21.5,
        'eval_seconds': 6.0, 'device_seconds': 0.06 * steps + 30, 'params': 10_034_176,
        'peak_bytes': 9.4e9,
    }  # fmt: skip
    return out | unknown


def curve(cost, end, points=20):
    out = []
    for i in range(1, points + 1):
        part = i / points
        row = {k: part * cost[k] for k in ('steps', 'tokens', 'model_flops', 'hardware_flops',
                                           'seconds', 'reference_seconds')}  # fmt: skip
        out.append({**row, 'value': end + 3.5 * math.exp(-7 * part) + 0.2 * (1 - part)})
    return out


def cells_of(arm, fractions, seeds, draw):
    """Final runs of an arm at every share and seed."""
    _, _, step_cost, end = ARMS[arm]
    out = []
    for fraction in fractions:
        for seed in seeds:
            cost = costs(fraction, step_cost, seed)
            value = end + 0.25 * (1 / fraction - 1) + 0.02 * seed + draw.gauss(0, 0.004)
            out.append(
                Cell(arm, 'final', seed, fraction, {'schedule.peak': 1e-3}, 'done', '', value, cost,
                     curve(cost, value), dict(ENVIRONMENT), f'runs/{arm}-{seed}-{fraction}')
            )  # fmt: skip
    return out


def end_badly(cell, status, error):
    fields = {**cell.__dict__, 'status': status, 'error': error, 'value': None}
    return Cell(**fields | {'curve': cell.curve[:7], 'costs': dict.fromkeys(COSTS)})


def compared(arm, cells, seeds, notes, charged):
    value = {(c.arm, c.seed): c.value for c in cells if c.fraction == 1 and c.phase == 'final'}
    pairs = [[seed, value['gelu', seed], value[arm, seed]] for seed in seeds]
    d = [b - a for _, a, b in pairs if None not in (a, b)]
    mean = math.fsum(d) / len(d)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in d) / (len(d) - 1)) if len(d) > 1 else 0.0
    half = {2: 8.985, 3: 2.484}.get(len(d), 1.24) * sd
    won = mean + half < 0
    measured = Ratio(0.873, 0.842, 0.904, len(d)) if won else Ratio(1.0, 1.0, 1.0, 2, 'at least')
    at_equal = {'model_flops': measured, 'tokens': measured if won else None, 'seconds': None}
    source = {'model_flops': Ratio(0.97, 0.93, 1.01, len(d)), 'tokens': None} if charged else {}
    sentence = (
        f'{arm} saves 12.7 % (9.6 to 15.8) of the model FLOPs at equal loss against gelu, at this '
        'size' if won else f'{arm} against gelu: cannot tell at this size with n = {len(d)}'
    )  # fmt: skip
    return Comparison(
        arm, 'gelu', 'win' if won else 'inconclusive', sentence,
        Interval(mean, mean - half, mean + half, sd, len(d)), pairs, 0.011, at_equal, source,
        {'model_flops': 1.0, 'tokens': 1 / ARMS[arm][2]}, notes,
    )  # fmt: skip


def synthetic(*, seeds=(0, 1, 2), fractions=(0.6, 0.75, 0.9, 1.0), bad=True, charged=True,
              name='ffn_equal_flops', **changes):  # fmt: skip
    """Returns a study of three arms; `bad` adds a failed, a diverged and an untuned one.

    Args:
      seeds, fractions: of the final runs.
      bad: one run diverges, one fails, one arm's best setting is at the edge of its grid.
      charged: the first arm reuses a source model, so costs are counted with and without it.
      name: the study's.
      **changes: fields of the `Analysis` to set.
    """
    draw = random.Random(0)
    cells = [c for arm in ARMS for c in cells_of(arm, fractions, seeds, draw)]
    if bad:
        full = [i for i, c in enumerate(cells) if c.arm == 'parallel-block' and c.fraction == 1]
        message = 'the loss is not finite at step 812; lower schedule.peak or raise warmup.'
        cells[full[-1]] = end_badly(cells[full[-1]], 'diverged', message)
        cells[full[0] - 1] = end_badly(
            cells[full[0] - 1], 'failed', 'RESOURCE_EXHAUSTED: out of memory | 9.1 GiB'
        )
    grid = [3e-4, 1e-3, 3e-3]
    for arm, (_, _, step_cost, end) in ARMS.items():
        for i, peak in enumerate(grid):
            cost = costs(0.25, step_cost, 9)
            cells.append(Cell(arm, 'tune', 9, 0.25, {'schedule.peak': peak}, 'done', '',
                              end + 1 + 0.1 * abs(i - 1), cost, [], dict(ENVIRONMENT)))  # fmt: skip
    tuned = Tuning('schedule.peak', grid, [3.0, 2.9, 3.1], 1e-3, False)
    edge = Tuning('schedule.peak', grid, [3.0, 2.9, None], 3e-4, True)
    note = ['parallel-block is untuned: its best schedule.peak, 0.0003, is the first of its grid.']
    command = 'python -m effjax.train --config=configs/lm.py --config.data.path=my.txt'
    arms = {
        arm: {
            'method': method, 'changes': list(edits), 'tuning': tuned,
            'commands': [' '.join([command, *(f'--config.{edit}' for edit in edits)])],
        }
        for arm, (method, edits, _, _) in ARMS.items()
    }  # fmt: skip
    if bad:
        arms['parallel-block']['tuning'] = edge
    comparisons = [
        compared('swiglu', cells, seeds, [], charged),
        compared('parallel-block', cells, seeds, note if bad else [], False),
    ]
    fields = {
        'name': name, 'question': 'Does a gated feed-forward pay at equal model FLOPs?',
        'metric': 'loss', 'lower_is_better': True, 'margin': 0.01, 'axis': 'model_flops',
        'budget': BUDGET, 'fractions': list(fractions), 'seeds': list(seeds), 'baseline': 'gelu',
        'arms': arms, 'comparisons': comparisons, 'cells': cells, 'device': 'NVIDIA H200',
        'date': '2026-11-03', 'code': 'a1b2c3d4',
        'scale': '10.0M parameters, 32.8M tokens of Python source',
        'commands': [f'python -m effjax.compare experiments/{name}/study.py --workdir=runs/ffn'],
        'notes': [],
    }  # fmt: skip
    return Analysis(**fields | changes)


@pytest.fixture
def make_analysis():
    """Returns `synthetic(*, seeds, fractions, bad, charged, name, **fields) -> Analysis`."""
    return synthetic
