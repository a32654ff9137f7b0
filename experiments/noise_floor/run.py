"""The noise floor of a workload: how much its metric varies with the seed, and what that hides.

    python -m experiments.noise_floor.run --workload lm10m --out runs/noise/lm10m
    python -m experiments.noise_floor.run --workload fashion_vit --path fashion-mnist --out ...
    python -m experiments.noise_floor.run --workload lm10m --cells runs/studies/gelu_swiglu \
        --arm swiglu          # of an arm of a study that has been run

Runs the workload's baseline with five seeds at several shares of its budget (each run decayed at
its end), and prints sigma, the slope of the metric in the budget, and the smallest speed-up that a
study of 3, 5 and 10 seeds finds. results/noise.json keeps one entry a workload; `effjax.compare`
reads it to say beforehand what a study can show. The same command goes on where it stopped.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from effjax.core.command import run_command
from effjax.core.config import as_dict
from effjax.core.errors import StudyError
from effjax.study import lock, plan, preflight, spec, stats, store
from effjax.study.execute import Runner
from effjax.study.records import Cell, analysis_from_json
from effjax.study.spec import Arm, Study
from effjax.training.files import write_json_atomic
from experiments.workloads import WORKLOADS, Workload

RESULTS = pathlib.Path(__file__).parent / 'results' / 'noise.json'
SIZES = (3, 5, 10)
# What a study sets in every run by itself, and what does not decide a run's numbers.
_NOT_COMPARED = (
    'steps', 'budget', 'seed', 'init_seed', 'name', 'log', 'checkpoint', 'finish', 'mesh',
    'sharding',
)  # fmt: skip


def measure(workload: Workload, args: argparse.Namespace) -> tuple[list[Cell], str]:
    """Runs what is missing of the baseline and returns its cells and the code's digest."""
    study: Study = workload.study(
        f'noise_{workload.name}',
        (Arm('baseline'),),
        overrides=[f'data.path={args.path}'] if args.path else [],
        seeds=tuple(range(args.seeds)),
        fractions=tuple(args.fractions),
        tune_key='',
    )
    facts = preflight.examine(study)
    code = plan.code_version()
    inputs = {name: fact.inputs for name, fact in facts.items()}
    runner = Runner(args.out, code, batched=preflight.batched(study, facts), inputs=inputs)
    groups = plan.final(study, study.baseline, {})
    with lock.held(args.out):
        runner.run(groups)
    return [store.collect(job, args.out, study.metric) for g in groups for job in g.jobs], code


def of_study(workload: Workload, folder: pathlib.Path, arm: str) -> tuple[list[Cell], str]:
    """Returns the cells of a study's arm that is the workload's baseline, and the code's digest.

    Raises:
      StudyError: a folder without findings, an arm that is not there or not that baseline, another
        metric or budget, or runs of several versions of the code.
    """
    try:
        study = spec.from_json(json.loads((folder / 'study.json').read_text()))
        found = analysis_from_json(json.loads((folder / 'analysis.json').read_text()))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StudyError(
            f'{folder} holds no findings of a study ({e}); run python -m effjax.compare first.'
        ) from e
    names = [a.name for a in study.arms]
    if arm not in names:
        raise StudyError(f'{folder} has no arm {arm!r}; give --arm, one of {", ".join(names)}.')
    for what in ('metric', 'axis', 'budget'):
        given, own = getattr(study, what), getattr(workload, what)
        if given != own:
            raise StudyError(
                f'{folder} has the {what} {given}, and workload {workload.name!r} has {own}; its '
                'noise is not that of the workload.'
            )
    theirs = plan.arm_config(study, study.arm(arm))
    differs = _differences(theirs, as_dict(workload.load()))
    differs -= {'data.path', study.tune_key}
    if differs:
        raise StudyError(
            f'arm {arm!r} of {folder} is not the baseline of workload {workload.name!r}: they '
            f'differ in {", ".join(sorted(differs))}.'
        )
    if '+' in found.code:
        raise StudyError(
            f'the runs of {folder} were made by several versions of the code ({found.code}), so '
            'that their spread is not that of seeds alone; run them again in another --out.'
        )
    return [c for c in found.cells if c.arm == arm and c.phase == 'final'], found.code


def _differences(one: Any, other: Any, at: str = '') -> set[str]:
    """Returns the keys in which two configs differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return set() if one == other else {at}
    keys = sorted({*one, *other} - set(() if at else _NOT_COMPARED))
    return set().union(
        *(_differences(one.get(k), other.get(k), f'{at}.{k}'.lstrip('.')) for k in keys)
    )


def floor(workload: Workload, cells: Sequence[Cell], code: str) -> dict[str, Any]:
    """Returns the entry of a workload: sigma, slope, and what n seeds can show.

    Raises:
      StudyError: a run at the full budget that did not end well, or fewer than two.
    """
    full = {c.seed: c for c in cells if c.fraction == 1.0}
    bad = [c for c in full.values() if c.value is None]
    if bad:
        raise StudyError(
            f'seed {bad[0].seed} at the full budget is {bad[0].status}, and a spread without it '
            'would be too small; run the same command again, or look into its folder.'
        )
    if len(full) < 2:
        raise StudyError(f'{len(full)} runs at the full budget have no spread; give --seeds=5.')
    done = [c for c in cells if c.value is not None]
    values = [c.value for c in full.values() if c.value is not None]
    sd, slope = statistics.stdev(values), _slope(workload, done, list(full))
    finds = {
        str(n): {
            'difference': stats.minimum_detectable(math.sqrt(2) * sd, n),
            'speedup': stats.detectable_speedup(
                sd, slope, n, lower_is_better=spec.direction(workload.metric) is not False
            )
            if slope is not None
            else None,
        }
        for n in SIZES
    }
    shares = sorted({c.fraction for c in done})
    return {
        'name': workload.name,
        'config': workload.config,
        'overrides': list(workload.overrides),
        'metric': workload.metric,
        'axis': workload.axis,
        'budget': workload.budget,
        'seeds': len(values),
        'mean': statistics.mean(values),
        'sd': sd,
        'slope': slope,
        'values': {str(seed): c.value for seed, c in full.items()},
        'by_share': {
            f'{f:g}': statistics.mean(c.value for c in done if c.fraction == f) for f in shares
        },
        'settings': next(iter(full.values())).settings,
        'seconds': statistics.mean(c.costs['seconds'] or 0.0 for c in full.values()),
        'batched': max(int(c.environment.get('batched') or 0) for c in done),
        'device': done[0].environment['device'],
        'jax': done[0].environment['jax'],
        'code': code,
        'date': max(str(c.environment.get('finished', ''))[:10] for c in done),
        'finds': finds,
    }


def _slope(workload: Workload, done: Sequence[Cell], seeds: Sequence[int]) -> float | None:
    """Returns the metric's change per log budget, None where it does not get better with it."""
    shares = sorted({c.fraction for c in done})
    if len(shares) < 2:
        return None
    value = {(c.seed, c.fraction): c.value for c in done}
    curve = stats.fit_curve(shares, {s: [value.get((s, f)) for f in shares] for s in seeds})
    return (
        curve.slope if stats.improves(curve, spec.direction(workload.metric) is not False) else None
    )


def keep(entry: dict[str, Any]) -> None:
    """Puts an entry into results/noise.json in the place of the workload's earlier one."""
    found = json.loads(RESULTS.read_text())['workloads'] if RESULTS.exists() else []
    others = [e for e in found if e['name'] != entry['name']]
    RESULTS.parent.mkdir(exist_ok=True)
    write_json_atomic(RESULTS, {'workloads': [*others, entry]})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workload', choices=WORKLOADS, required=True)
    parser.add_argument('--path', help='data of a workload that needs some')
    parser.add_argument('--out', type=pathlib.Path, default=None)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--fractions', type=float, nargs='+', default=[0.6, 0.75, 0.9, 1.0])
    parser.add_argument('--cells', type=pathlib.Path, help='folder of a finished study to read')
    parser.add_argument('--arm', help='the arm of --cells that is the baseline of the workload')
    args = parser.parse_args(argv)
    workload = WORKLOADS[args.workload]
    args.out = args.out or pathlib.Path('runs', 'noise', workload.name)
    if args.cells:
        cells, code = of_study(workload, args.cells, args.arm or '')
    else:
        cells, code = measure(workload, args)
    entry = floor(workload, cells, code)
    keep(entry)
    print(json.dumps(entry))
    return 0


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
