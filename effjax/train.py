"""`python -m effjax.train --config=FILE[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]`.

Trains one config and leaves `config.json`, `metrics.jsonl`, `summary.json`, `checkpoints/` and
`report.html` in the work folder. The same command with the same folder goes on where it stopped.
From Python: `effjax.train.run(config, workdir)`.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core.command import parse_with_overrides, quiet_platform, run_command


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished (or stopped) run.

    Attributes:
      workdir: the folder that holds its files.
      summary: what `summary.json` holds.
      report: path of `report.html`.
      stopped_by: name of the signal that ended it early, or None.
    """

    workdir: pathlib.Path
    summary: dict[str, Any]
    report: pathlib.Path
    stopped_by: str | None = None


def run(config: Mapping[str, Any], workdir: str | pathlib.Path | None = None) -> Run:
    """Trains a config, resuming from `workdir` when it holds a checkpoint of this config.

    Args:
      config: a config as `effjax.core.config.defaults()` makes it, or plain dicts of that form.
      workdir: the folder for everything the run leaves, made if need be; None is
        `runs/<config>-<time>`.

    Returns:
      The run, its summary and where its report is.

    Raises:
      ConfigError: before anything compiles.
      DataError: missing or empty data.
      CheckpointError: the folder belongs to another config, or no checkpoint in it is valid.
      TrainingError: the loss is not finite.
    """
    quiet_platform()
    from effjax import report
    from effjax.core.config import check_form
    from effjax.parallel import broadcast, initialize, is_primary
    from effjax.training.session import train

    check_form(config)
    if workdir is None:
        initialize()  # the folder's name holds the time: all processes take the first one's
        workdir = broadcast(default_workdir(config['name']).as_posix())
    folder = pathlib.Path(workdir)
    summary, stopped_by = train(config, folder)
    page = report.write(folder) if is_primary() else folder / 'report.html'
    return Run(folder, summary, page, None if summary['complete'] else stopped_by)


def default_workdir(name: str) -> pathlib.Path:
    """Returns `runs/<name>-<time>`."""
    return pathlib.Path('runs') / f'{name or "run"}-{time.strftime("%Y%m%d-%H%M%S")}'


def main(argv: Sequence[str]) -> int:
    """The command."""
    args, overrides = _parse(argv)
    from effjax.core.config import as_json, load

    config = load(args.config, overrides)
    if args.print_config:
        print(as_json(config), end='')
        return 0
    quiet_platform()
    if args.dry_run:
        from effjax.training.dryrun import dry_run

        print(dry_run(config))
        return 0
    done = run(config, args.workdir)
    from effjax.parallel import is_primary
    from effjax.training.finish import lines

    if is_primary():
        if done.stopped_by:
            print(f'stopped by {done.stopped_by}; go on with --workdir={done.workdir}')
        else:
            print('\n'.join(lines(done.summary)))
        print(f'report: {done.report}')
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog='python -m effjax.train',
        description='Trains one config, resumably, with every cost on the ledger.',
        epilog='Any key of the config can be set: --config.steps=1000 --config.mesh.fsdp=8 '
        '--config.model.mixer.heads=4. --print_config shows them all.',
        allow_abbrev=False,
    )
    parser.add_argument('--config', required=True, metavar='FILE[:VARIANT]', help='config file')
    parser.add_argument(
        '--workdir', metavar='DIR', help='folder of the run (default runs/<config>-<time>)'
    )
    parser.add_argument(
        '--print_config', action='store_true', help='print the resolved config and leave'
    )
    parser.add_argument(
        '--dry_run',
        action='store_true',
        help='print parameters, FLOPs, memory and shardings; train nothing',
    )
    parser.add_argument(
        '--traceback', action='store_true', help='show the traceback of an error in the input'
    )
    return parse_with_overrides(parser, argv)


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
