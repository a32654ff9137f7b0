"""A/A: the same arm under two names, many times. How often does a study call it a difference?

    python -m experiments.aa.run --repetitions 100 --out runs/aa

Each repetition is a study of its own seeds: the arm against itself with other initial values (the
data order stays paired), judged by a 95 % interval with no margin. The share called win or loss
must lie within the binomial bounds of 5 %. One repetition with the same initial values comes
first: all its differences must be exactly 0, which checks the pairing.

All runs of the repetitions share compiled steps, a chunk of them at a time. The same command goes
on where it stopped.
"""

import argparse
import dataclasses
import json
import pathlib

from effjax.study import analysis, plan, stats, store
from effjax.study.execute import Runner
from effjax.study.plan import Group
from effjax.study.spec import Arm, Study
from effjax.training.files import write_json_atomic
from experiments.workloads import LM_TINY

OFFSET = 500_000  # between the seeds of the two arms' initial values


def study_of(repetition: int, seeds: int, budget: float) -> Study:
    """Returns one repetition: seeds that no other repetition uses."""
    first = repetition * seeds
    return dataclasses.replace(
        LM_TINY.study(
            'aa',
            (Arm('one'), Arm('other', init_offset=OFFSET)),
            seeds=tuple(range(first, first + seeds)),
            fractions=(1.0,),
            margin=0.0,
        ),
        tune_key='',
        budget=LM_TINY.budget * budget,
        overrides=("evals.valid={'every_share': 0.0, 'batches': 4}",),
    )


def pairing(runner: Runner, args: argparse.Namespace) -> list[float]:
    """Returns the differences of an arm to itself with the same seeds: exactly 0 each."""
    twin = study_of(0, args.seeds, args.budget)
    twin = dataclasses.replace(twin, arms=(Arm('one'), Arm('twin')))
    groups = [g for arm in twin.arms for g in plan.final(twin, arm, {})]
    runner.run(groups)
    values = [
        [store.collect(j, args.out, twin.metric).value for j in group.jobs] for group in groups
    ]
    return [b - a for a, b in zip(*values, strict=True) if a is not None and b is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repetitions', type=int, default=100)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--budget', type=float, default=0.25, help='share of the workload’s')
    parser.add_argument('--lanes', type=int, default=20, help='runs that share a compiled step')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/aa'))
    args = parser.parse_args()
    runner = Runner(args.out, plan.code_version(), batched=True)
    zeros = pairing(runner, args)
    print(f'same initial values: differences {zeros}', flush=True)
    studies = [study_of(i, args.seeds, args.budget) for i in range(args.repetitions)]
    jobs = [j for s in studies for arm in s.arms for g in plan.final(s, arm, {}) for j in g.jobs]
    runner.run(
        [
            Group(f'chunk {i // args.lanes}', tuple(jobs[i : i + args.lanes]))
            for i in range(0, len(jobs), args.lanes)
        ]
    )
    verdicts = []
    for study in studies:
        cells = [
            store.collect(j, args.out, study.metric)
            for arm in study.arms
            for g in plan.final(study, arm, {})
            for j in g.jobs
        ]
        verdicts.append(analysis.analyse(study, cells, code='').comparisons[0].verdict)
    called = sum(v in ('win', 'loss') for v in verdicts)
    low, high = stats.binomial_bounds(len(verdicts), 0.05)
    result = {
        'repetitions': len(verdicts),
        'seeds': args.seeds,
        'called': called,
        'bounds': [low, high],
        'within': low <= called <= high,
        'verdicts': {v: verdicts.count(v) for v in sorted(set(verdicts))},
        'same_seed_differences': zeros,
    }
    write_json_atomic(args.out / 'aa.json', result)
    print(json.dumps(result))


if __name__ == '__main__':
    main()
