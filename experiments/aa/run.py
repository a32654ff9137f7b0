"""A/A: the same arm under two names, many times. How often does a study call it a difference?

    python -m experiments.aa.run --repetitions 100 --out runs/aa

Each repetition is a study of its own seeds: the arm against itself with other initial values (the
data order stays paired), judged by a 95 % interval with no margin. The share called win or loss
must lie within the binomial bounds of 5 %. One repetition with the same initial values comes
first: all its differences must be exactly 0, which checks the pairing. Anything else is an error.

All runs of the repetitions share compiled steps, a chunk of them at a time. The same command goes
on where it stopped.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from effjax.core.command import run_command
from effjax.core.errors import StudyError
from effjax.study import analysis, lock, plan, stats, store
from effjax.study.execute import Runner
from effjax.study.plan import Group
from effjax.study.records import Cell, Comparison
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


def pairing(runner: Runner, seeds: int, budget: float) -> list[float]:
    """Returns the differences of an arm to itself with the same seeds: exactly 0 each.

    Raises:
      StudyError: a difference that is not 0, or a run that did not end well.
    """
    twin = dataclasses.replace(study_of(0, seeds, budget), arms=(Arm('one'), Arm('twin')))
    runner.run([g for arm in twin.arms for g in plan.final(twin, arm, {})])
    found = differences(_judged(twin, runner.out))
    if any(found):
        raise StudyError(
            f'the same arm with the same seeds differs by {found}: its runs do not share data '
            'order, evaluation batches and initial values, and no verdict can be believed.'
        )
    return found


def repeated(
    runner: Runner, repetitions: int, seeds: int, budget: float, lanes: int
) -> list[Comparison]:
    """Returns the findings on an arm against itself with other initial values.

    Args:
      runner: of the folder.
      repetitions: studies of seeds of their own.
      seeds: of each.
      budget: share of the workload's.
      lanes: runs that share a compiled step.

    Raises:
      StudyError: a run that did not end well.
    """
    studies = [study_of(i, seeds, budget) for i in range(repetitions)]
    jobs = [j for s in studies for arm in s.arms for g in plan.final(s, arm, {}) for j in g.jobs]
    starts = range(0, len(jobs), lanes)
    runner.run([Group(f'chunk {i // lanes}', tuple(jobs[i : i + lanes])) for i in starts])
    return [_judged(study, runner.out) for study in studies]


def differences(found: Comparison) -> list[float]:
    """Returns the paired differences of a finding."""
    return [b - a for _, a, b in found.pairs if a is not None and b is not None]


def _judged(study: Study, out: pathlib.Path) -> Comparison:
    groups = [g for arm in study.arms for g in plan.final(study, arm, {})]
    cells: list[Cell] = [store.collect(j, out, study.metric) for g in groups for j in g.jobs]
    bad = next((c for c in cells if c.value is None), None)
    if bad:
        raise StudyError(
            f'{out / bad.workdir} is {bad.status}, and a share over the rest would mislead: '
            f'{bad.error or "no message"}.'
        )
    return analysis.analyse(study, cells, code='').comparisons[0]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repetitions', type=int, default=100)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--budget', type=float, default=0.25, help='share of the workload’s')
    parser.add_argument('--lanes', type=int, default=20, help='runs that share a compiled step')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/aa'))
    args = parser.parse_args(argv)
    runner = Runner(args.out, plan.code_version(), batched=True)
    with lock.held(args.out):
        zeros = pairing(runner, args.seeds, args.budget)
        print(f'same initial values: differences {zeros}', flush=True)
        found = repeated(runner, args.repetitions, args.seeds, args.budget, args.lanes)
    verdicts = [f.verdict for f in found]
    called = sum(v in ('win', 'loss') for v in verdicts)
    low, high = stats.binomial_bounds(len(verdicts), 0.05)
    result: dict[str, Any] = {
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
    if not low <= called <= high:
        raise StudyError(
            f'{called} of {len(verdicts)} repetitions were called a difference, outside of {low} '
            f'to {high}: the intervals are not those of 95 %.'
        )
    return 0


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
