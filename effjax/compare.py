"""`python -m effjax.compare`: paired arms at an equal budget, over seeds, with a verdict.

    python -m effjax.compare --baseline=configs/lm.py --change model.ffn.kind=gelu \\
        --data=my.txt --budget=20m --seeds=3
    python -m effjax.compare --study=experiments/gelu_swiglu

The first form makes a study of a baseline and its changes, the second runs a study file. The same
command goes on where it stopped.
"""

import argparse
import glob
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effjax.core.command import parse_with_overrides, quiet_platform, run_command
from effjax.core.errors import StudyError
from effjax.study.stopping import Leaving

if TYPE_CHECKING:
    from effjax.study.spec import Study

_GRID = (0.5, 1.0, 2.0)  # times the baseline's own value, where no grid is given


def main(argv: Sequence[str]) -> int:
    """The command."""
    args, overrides = _parse(argv)
    with Leaving():
        return _obey(args, overrides, argv)


def _obey(args: argparse.Namespace, overrides: Sequence[str], argv: Sequence[str]) -> int:
    if args.list and not (args.study or args.baseline):
        print(_studies())
        return 0
    quiet_platform()
    if args.workers > 1:
        from effjax.study.execute import leave_memory_to_workers

        leave_memory_to_workers()
    from effjax.study import spec

    study = _from_file(args, overrides) if args.study else _from_flags(args, overrides)
    spec.check(study)
    out = pathlib.Path(args.out or pathlib.Path('runs', 'studies', study.name))
    if args.list:
        return _list(study, out)
    if args.dry_run:
        return _dry_run(study, out, args.workers)
    return _run(study, out, args, argv)


def _run(study: 'Study', out: pathlib.Path, args: argparse.Namespace, argv: Sequence[str]) -> int:
    from effjax.study import commands
    from effjax.study import compare as studies

    command = commands.noted(argv)
    if args.report_only:
        found = studies.report(study, out, [command])
    else:
        options = studies.Options(
            workers=args.workers,
            any_code=args.any_code,
            retry_failed=args.retry_failed,
            probe=not args.no_probe,
            commands=(command,),
        )
        found = studies.compare(study, out, options, say=_say)
    for comparison in found.comparisons:
        print(comparison.sentence + (f', at this size ({found.scale})' if found.scale else ''))
    for note in dict.fromkeys([*(n for c in found.comparisons for n in c.notes), *found.notes]):
        print(f'note: {note}')
    print(f'report: {out / "report.html"}')
    if args.publish:
        from effjax.study import card

        print(f'published: {card.publish(found, args.publish)}')
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog='python -m effjax.compare',
        description='Runs arms at an equal budget over paired seeds, and says which is better.',
        epilog='Any key of the config can be set for all arms: --config.model.width=128.',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--study', metavar='FILE', help='a study file, or the folder of its study.py')
    add('--baseline', metavar='FILE[:VARIANT]', help='config of the baseline')
    add(
        '--change',
        action='append',
        default=[],
        metavar='"KEY=VALUE ..."',
        help='what one arm changes; may be given several times, one arm each',
    )
    add('--data', metavar='PATH', help='text file or folder, .jsonl or .parquet to train on')
    add('--budget', metavar='AMOUNT', help='of each full run: 20m, 1e8tokens, 3e15flops, 2000steps')
    add('--seeds', metavar='N', help='how many, or several seeds with commas (default 3)')
    add('--metric', help='EVALUATION.METRIC (default valid.loss)')
    add('--margin', type=float, help='differences up to this do not matter (default 0)')
    add('--fractions', metavar='F,F,...', help='shares of the budget (default 0.6,0.75,0.9,1)')
    add(
        '--tune_key',
        metavar='KEY',
        help="the tuned config key (default schedule.peak; '' tunes none)",
    )
    add('--grid', metavar='V,V,V', help='its values (default 0.5, 1 and 2 times the baseline’s)')
    add('--tune_fraction', type=float, help='share of the budget of a tuning run (default 0.25)')
    add('--least_steps', type=int, metavar='N', help='of the shortest run (default 50)')
    add('--batched', choices=('auto', 'yes', 'no'), help='share compiled steps by vmap')
    add('--out', metavar='DIR', help='the study’s folder (default runs/studies/<name>)')
    add('--workers', type=int, default=1, metavar='N', help='runs side by side, a device each')
    add('--any_code', action='store_true', help='accept results of another code version')
    add('--retry_failed', action='store_true', help='run again what failed or diverged')
    add('--no_probe', action='store_true', help='skip the short runs that measure speed and noise')
    add('--dry_run', action='store_true', help='check and print the plan; run nothing')
    add('--list', action='store_true', help='list the studies, or the runs of one, and their state')
    add('--report_only', action='store_true', help='judge and report what has been run')
    add('--publish', metavar='DIR', help='copy the findings there, for cards and docs/verdicts.md')
    add('--traceback', action='store_true', help='show the traceback of an error in the input')
    args, overrides = parse_with_overrides(parser, argv)
    if bool(args.study) == bool(args.baseline) and not (args.list and not args.study):
        raise StudyError('give either --study=FILE or --baseline=FILE with --change KEY=VALUE.')
    if args.workers < 1:
        raise StudyError(f'--workers must be at least 1, got {args.workers}.')
    return args, overrides


# ---- a study from flags ------------------------------------------------------------------------


def _from_flags(args: argparse.Namespace, overrides: Sequence[str]) -> 'Study':
    from effjax.core.config import as_dict, load
    from effjax.study import spec

    if not args.budget:
        raise StudyError('give the budget of a run: --budget=20m, 1e8tokens, 3e15flops, 2000steps.')
    base = as_dict(load(args.baseline, overrides))
    # What was said of single keys comes last: it refines the blocks that stand before it.
    common = [*_data(args.data, base), *_evaluation(base, args.metric), *overrides]
    axis, amount = spec.parse_budget(args.budget)
    changes = [spec.split_change(text) for text in args.change]
    arms = (spec.Arm('baseline'), *(spec.Arm(spec.arm_name(c), c) for c in changes))
    file = pathlib.Path(args.baseline.partition(':')[0])
    name = spec.shortened('-'.join([file.stem, *(arm.name for arm in arms[1:])]), 80)
    study = spec.Study(
        name=name,
        config=args.baseline,
        arms=arms,
        axis=axis,
        budget=amount,
        overrides=tuple(common),
        question=f'{", ".join(a.name for a in arms[1:])} against {args.baseline}',
    )
    study = _changed(study, args)
    if study.tune_key and not study.grid:
        study = _with_grid(study, base)
    return study


def _from_file(args: argparse.Namespace, overrides: Sequence[str]) -> 'Study':
    import dataclasses

    from effjax.study import spec

    if args.change or args.data:
        raise StudyError('--change and --data go with --baseline; a study file names its own arms.')
    study = spec.load(args.study)
    study = dataclasses.replace(study, overrides=(*study.overrides, *overrides))
    if args.budget:
        axis, amount = spec.parse_budget(args.budget)
        study = dataclasses.replace(study, axis=axis, budget=amount)
    return _changed(study, args)


def _changed(study: 'Study', args: argparse.Namespace) -> 'Study':
    """Returns a study with what the command line says."""
    import dataclasses

    given: dict[str, Any] = {
        'metric': args.metric,
        'margin': args.margin,
        'tune_key': args.tune_key,
        'tune_fraction': args.tune_fraction,
        'least_steps': args.least_steps,
        'seeds': _seeds(args.seeds) if args.seeds else None,
        'fractions': _numbers(args.fractions, '--fractions') if args.fractions else None,
        'grid': _numbers(args.grid, '--grid') if args.grid else None,
    }
    changes = {k: v for k, v in given.items() if v is not None}
    if args.metric:
        changes['lower_is_better'] = None  # as the metric's name tells
        if args.metric != study.metric and study.margin and args.margin is None:
            raise StudyError(
                f'the margin of {study.name}, {study.margin:g}, was set for {study.metric}, and '
                f'--metric={args.metric} has another scale; give its --margin too.'
            )
    if args.batched:
        changes['batched'] = {'auto': None, 'yes': True, 'no': False}[args.batched]
    return dataclasses.replace(study, **changes)


def _with_grid(study: 'Study', base: dict[str, Any]) -> 'Study':
    import dataclasses

    node: Any = base
    for part in study.tune_key.split('.'):
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, int | float) or isinstance(node, bool):
        raise StudyError(
            f'config.{study.tune_key} has no number to make a tuning grid of; give --grid, or '
            '--tune_key= to tune nothing.'
        )
    return dataclasses.replace(study, grid=tuple(float(f'{node * f:.6g}') for f in _GRID))


def _seeds(text: str) -> tuple[int, ...]:
    try:
        if ',' in text:
            return tuple(int(part) for part in text.split(',') if part.strip())
        return tuple(range(int(text)))
    except ValueError as e:
        raise StudyError(f'--seeds is a count or numbers with commas, got {text!r}.') from e


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(',') if part.strip())
    except ValueError as e:
        raise StudyError(f'{flag} takes numbers with commas, got {text!r}.') from e


def _data(path: str | None, base: dict[str, Any]) -> list[str]:
    """Returns the override that puts a user's own data in the place of the baseline's."""
    if not path:
        return []
    kept = {k: v for k, v in base['data'].items() if k in ('tokenizer', 'packing')}
    return [f'data={ {"kind": _source(pathlib.Path(path)), "path": path, **kept}!r}']


def _source(path: pathlib.Path) -> str:
    """Returns the data source for a file, or for what a folder holds: text where it has both."""
    for kind in ('jsonl', 'parquet'):
        inside = path.is_dir() and any(path.rglob(f'*.{kind}*')) and not any(path.rglob('*.txt'))
        if inside or (not path.is_dir() and f'.{kind}' in path.suffixes):
            return kind
    return 'text'


def _evaluation(base: dict[str, Any], metric: str | None) -> list[str]:
    """Returns an evaluation for a baseline that has none under the metric's name."""
    name = (metric or 'valid.loss').partition('.')[0]
    if name in base['evals']:
        return []
    return [f'evals.{name}={ {"every_share": 0.1, "batches": 32}!r}']


# ---- what is there -----------------------------------------------------------------------------


def _studies() -> str:
    from effjax.study import spec

    lines = []
    for file in sorted(glob.glob('experiments/*/study.py')):
        study = spec.load(file)
        folder = pathlib.Path(file).parent
        state = 'published' if (folder / 'results' / 'analysis.json').exists() else 'not measured'
        lines.append(f'{folder}: {study.question or study.name} [{state}]')
    return '\n'.join(lines) or 'no studies: there is no experiments/*/study.py here.'


def _list(study: 'Study', out: pathlib.Path) -> int:
    from effjax.study.compare import collect

    for cell in collect(study, out):
        value = f'{cell.value:.5g}' if cell.value is not None else cell.error
        settings = ' '.join(f'{k}={v:g}' for k, v in cell.settings.items())
        print(
            f'{cell.status:<9} {cell.phase:<6} {cell.arm}  {cell.fraction:.0%}  seed {cell.seed}  '
            f'{settings}  {value}'.rstrip()
        )
    return 0


def _dry_run(study: 'Study', out: pathlib.Path, workers: int) -> int:
    from effjax.study import preflight
    from effjax.study.compare import devices, expectation, overview

    devices(study, workers)
    facts = preflight.examine(study)
    batched = preflight.batched(study, facts)
    lines = overview(study, facts, batched=batched)
    lines += expectation(study, facts, out, batched=batched, workers=workers)
    print('\n'.join(lines))
    return 0


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
