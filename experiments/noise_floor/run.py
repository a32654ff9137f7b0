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
import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Sequence

from effjax.study import plan, preflight, stats, store
from effjax.study.execute import Runner
from effjax.study.records import Cell, analysis_from_json
from effjax.study.spec import Arm, Study
from effjax.training.files import write_json_atomic
from experiments.workloads import WORKLOADS, Workload

RESULTS = pathlib.Path(__file__).parent / 'results' / 'noise.json'
SIZES = (3, 5, 10)


def measure(workload: Workload, args: argparse.Namespace) -> list[Cell]:
    """Runs what is missing of the baseline and returns its cells."""
    overrides = [f'data.path={args.path}'] if args.path else []
    study: Study = workload.study(
        f'noise_{workload.name}',
        (Arm('baseline'),),
        overrides=overrides,
        seeds=tuple(range(args.seeds)),
        fractions=tuple(args.fractions),
    )
    study = dataclasses.replace(study, tune_key='')
    facts = preflight.examine(study)
    runner = Runner(args.out, plan.code_version(), batched=preflight.batched(study, facts))
    groups = plan.final(study, study.baseline, {})
    runner.run(groups)
    return [store.collect(job, args.out, study.metric) for g in groups for job in g.jobs]


def floor(workload: Workload, cells: Sequence[Cell]) -> dict:
    """Returns the entry of a workload: sigma, slope, and what n seeds can show."""
    done = [c for c in cells if c.value is not None]
    full = {c.seed: c.value for c in done if c.fraction == 1.0}
    values = [v for v in full.values() if v is not None]
    shares = sorted({c.fraction for c in done})
    by_seed = {
        seed: [
            next((c.value for c in done if (c.seed, c.fraction) == (seed, f)), None) for f in shares
        ]
        for seed in full
    }
    sd = statistics.stdev(values)
    curve = stats.fit_curve(shares, by_seed) if len(shares) > 1 else None
    slope = curve.slope if curve else None
    finds = {
        str(n): {
            'difference': stats.minimum_detectable(math.sqrt(2) * sd, n),
            'speedup': stats.detectable_speedup(sd, slope, n) if slope else None,
        }
        for n in SIZES
    }
    return {
        'name': workload.name,
        'config': workload.config,
        'metric': workload.metric,
        'axis': workload.axis,
        'budget': workload.budget,
        'seeds': len(values),
        'mean': statistics.mean(values),
        'sd': sd,
        'slope': slope,
        'values': {str(seed): value for seed, value in full.items()},
        'by_share': {
            f'{f:g}': statistics.mean(c.value for c in done if c.fraction == f) for f in shares
        },
        'seconds': statistics.mean(c.costs['seconds'] or 0.0 for c in done if c.fraction == 1.0),
        'batched': max(int(c.environment.get('batched') or 0) for c in done),
        'device': done[0].environment['device'],
        'jax': done[0].environment['jax'],
        'date': max(str(c.environment.get('finished', ''))[:10] for c in done),
        'finds': finds,
    }


def keep(entry: dict) -> None:
    """Puts an entry into results/noise.json in the place of the workload's earlier one."""
    found = json.loads(RESULTS.read_text())['workloads'] if RESULTS.exists() else []
    others = [e for e in found if e['name'] != entry['name']]
    RESULTS.parent.mkdir(exist_ok=True)
    write_json_atomic(RESULTS, {'workloads': [*others, entry]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workload', choices=WORKLOADS, required=True)
    parser.add_argument('--path', help='data of a workload that needs some')
    parser.add_argument('--out', type=pathlib.Path, default=None)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--fractions', type=float, nargs='+', default=[0.6, 0.75, 0.9, 1.0])
    parser.add_argument('--cells', type=pathlib.Path, help='folder of a finished study to read')
    parser.add_argument('--arm', help='the arm of --cells that is the baseline of the workload')
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    args.out = args.out or pathlib.Path('runs', 'noise', workload.name)
    if args.cells:
        found = analysis_from_json(json.loads((args.cells / 'analysis.json').read_text()))
        cells = [c for c in found.cells if c.arm == args.arm and c.phase == 'final']
    else:
        cells = measure(workload, args)
    entry = floor(workload, cells)
    keep(entry)
    print(json.dumps(entry))


if __name__ == '__main__':
    main()
