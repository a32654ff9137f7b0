"""Differences planted on purpose, to see that a study finds the real one and not the false one.

    python -m experiments.aa.planted --out runs/planted

Handicap: an arm is charged for its whole budget and trains on 10/11 of it, as a technique would
that makes every step cost 10 % more for nothing. The study must call it a loss, and the budget it
needs for equal loss must come out near 1.1 times the baseline's.

Learning rate: an arm whose only 'technique' is a better learning rate than the baseline's config.
Untuned it looks like a saving; with the same tuning grid for both nothing may be left of it. The
same command goes on where it stopped.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from effjax.core.command import run_command
from effjax.study import analysis, lock, plan, store
from effjax.study.compare import Options, compare
from effjax.study.execute import Runner
from effjax.study.plan import Group, Job
from effjax.study.records import Cell, Comparison
from effjax.study.spec import Arm, Study
from effjax.training.files import write_json_atomic
from experiments.aa.run import differences
from experiments.workloads import LM_TINY

HANDICAP = 1.1  # what a step of the handicapped arm costs over one of the baseline


def handicap(args: argparse.Namespace) -> Comparison:
    """Runs the baseline against itself, charged 10 % more."""
    study: Study = dataclasses.replace(
        LM_TINY.study(
            'handicap', (Arm('plain'), Arm('handicapped')), seeds=tuple(range(args.seeds))
        ),
        budget=LM_TINY.budget * args.budget,
        margin=0.0,
        tune_key='',
    )
    plain, other = (plan.final(study, arm, {}) for arm in study.arms)
    groups = [*plain, *(Group(g.name, tuple(map(_charged, g.jobs))) for g in other)]
    with lock.held(args.out):
        Runner(args.out, plan.code_version(), batched=True).run(groups)
    cells = [store.collect(j, args.out, study.metric) for g in groups for j in g.jobs]
    cells = [_paid(c) if c.arm == 'handicapped' else c for c in cells]
    return analysis.analyse(study, cells, code='').comparisons[0]


def _paid(cell: Cell) -> Cell:
    """Returns a run with what it is charged for on its books, as its steps would have cost."""
    flops = cell.costs.get('model_flops')
    more = {'model_flops': flops * HANDICAP} if flops else {}
    return dataclasses.replace(cell, costs={**cell.costs, **more})


def _charged(job: Job) -> Job:
    """Returns a run that trains on less than it is charged for: on budget / `HANDICAP`."""
    amount = float(job.config['budget'].removesuffix('flops'))
    return dataclasses.replace(job, config={**job.config, 'budget': f'{amount / HANDICAP!r}flops'})


def learning_rate(args: argparse.Namespace, *, tuned: bool) -> Comparison:
    """Runs an arm that differs in its learning rate alone, tuned like the baseline or not."""
    slow, fast = LM_TINY.grid[0] / 8, LM_TINY.grid[2]
    study = dataclasses.replace(
        LM_TINY.study(
            'tuned' if tuned else 'untuned',
            (Arm('slow'), Arm('fast', (f'schedule.peak={fast!r}',))),
            overrides=(f'schedule.peak={slow!r}',),
            seeds=tuple(range(args.seeds)),
            fractions=(1.0,),
            batched=True,
        ),
        budget=LM_TINY.budget * args.budget,
    )
    study = study if tuned else dataclasses.replace(study, tune_key='')
    return compare(study, args.out / study.name, Options(probe=False)).comparisons[0]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--budget', type=float, default=0.5, help='share of the workload’s')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/planted'))
    args = parser.parse_args(argv)
    found = {
        'handicap': handicap(args),
        'untuned': learning_rate(args, tuned=False),
        'tuned': learning_rate(args, tuned=True),
    }
    for name, comparison in found.items():
        print(f'{name}: {comparison.sentence}')
    ratio = found['handicap'].at_equal_quality['model_flops']
    result = {
        'handicap': {
            'verdict': found['handicap'].verdict,
            'ratio': dataclasses.asdict(ratio) if ratio else None,
            'planted': HANDICAP,
        },
        **{
            name: {
                'verdict': found[name].verdict,
                'differences': differences(found[name]),
            }
            for name in ('untuned', 'tuned')
        },
    }
    write_json_atomic(args.out / 'planted.json', result)
    print(json.dumps(result))
    return 0


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
