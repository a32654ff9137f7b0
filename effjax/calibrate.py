"""`python -m effjax.calibrate --config=FILE[:VARIANT] --vary KEY=V1,V2 --out=TABLE.json`.

Measures how long train steps take on this device, by shape, into a table of reference time. A run
with `config.reference='TABLE.json'` is charged by it, whatever device it runs on, and can have a
budget such as `10ref_m`. Every combination of the varied values is measured, for every config;
a table that is there already is extended.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effjax.core.command import parse_with_overrides, quiet_platform, run_command
from effjax.core.errors import ConfigError

if TYPE_CHECKING:
    from effjax.costs.reference import Table

# Columns that a listing always has; others are shown where entries differ in them.
_COLUMNS = ('model.kind', 'model.layers', 'model.width', 'batch_size', 'seq_len', 'precision.kind')


def main(argv: Sequence[str]) -> int:
    """The command."""
    args, overrides = _parse(argv)
    from effjax.costs.reference import Table

    if args.list:
        print(listing(Table.read(args.list)))
        return 0
    if args.check:
        print(listing(Table.load(args.check)))
        print(_verdict(Table.load(args.check)))
        return 0
    if not args.config or not args.out:
        raise ConfigError('give --config and --out to measure, or a table to --check or --list.')
    table = calibrate(
        configs(args.config, args.vary, overrides), args.out, steps=args.steps, rounds=args.rounds
    )
    print(listing(table))
    print(_verdict(table))
    print(f'table: {args.out}')
    return 0


def calibrate(
    configs: Sequence[Any], out: str | pathlib.Path, *, steps: int = 30, rounds: int = 2
) -> 'Table':
    """Measures configs into a table, adding to one that is there; nothing is written on an error.

    Args:
      configs: configs whose form has been checked.
      out: the file.
      steps: timed steps of each config in a round.
      rounds: rounds, at least 2.

    Returns:
      The table as written.

    Raises:
      ConfigError, DataError, DeviceError, StudyError: see `effjax.study.calibration.measure`.
    """
    quiet_platform()
    from effjax.costs.reference import Table
    from effjax.study import calibration

    old = Table.load(out) if pathlib.Path(out).expanduser().exists() else None
    if old is not None:  # told before minutes are spent on measuring
        found = calibration.conditions(configs, steps=steps, rounds=rounds)
        old.merged(Table(found, '', ()))
    table = calibration.measure(configs, steps=steps, rounds=rounds, say=_say)
    if old is not None:
        table = old.merged(table)
        table.check()
    calibration.save(table, out)
    return table


def configs(files: Sequence[str], vary: Sequence[str], overrides: Sequence[str]) -> list[Any]:
    """Returns every config with every combination of the varied values.

    Args:
      files: 'FILE[:VARIANT]'.
      vary: 'KEY=V1,V2,...'.
      overrides: 'KEY=VALUE', for all.

    Raises:
      ConfigError: a `vary` without values, or a config or value that does not fit.
    """
    from effjax.core.config import load

    axes = []
    for text in vary:
        key, _, values = text.partition('=')
        key = key.removeprefix('config.')
        if not all(values.split(',')):
            raise ConfigError(f'--vary {text!r} lacks a value; write --vary model.layers=4,8,12.')
        axes.append([f'{key}={value}' for value in values.split(',')])
    return [
        load(file, [*overrides, *chosen]) for file in files for chosen in itertools.product(*axes)
    ]


def listing(table: 'Table') -> str:
    """Returns a table as text: where and how it was measured, and a line an entry."""
    from effjax.costs.reference import flatten

    shapes = [flatten(e.shape) for e in table.entries]
    known = dict.fromkeys(key for shape in shapes for key in shape)
    columns = [
        key
        for key in dict.fromkeys([*_COLUMNS, *known])
        if key in _COLUMNS or len({repr(shape.get(key)) for shape in shapes}) > 1
    ]
    rows = [[*columns, 'ms', 'repeats differ', 'quartiles']]
    for entry, shape in zip(table.entries, shapes, strict=True):
        values = [str(shape.get(key, '-')) for key in columns]
        time = [f'{1e3 * entry.seconds:.4g}', f'{entry.disagreement:.2%}', f'{entry.spread:.2%}']
        rows.append([*values, *time])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(map(str.rjust, row, widths)).rstrip() for row in rows]
    where = table.conditions
    mesh = ' x '.join(f'{axis} {size}' for axis, size in where['mesh'].items()) or 'one device'
    head = (
        f'{where["device"]} ({mesh}), jax {where["jax"]}, {table.made}; medians of '
        f'{where["rounds"]} x {where["steps"]} steps'
    )
    return '\n'.join([head, *lines])


def _verdict(table: 'Table') -> str:
    from effjax.costs.reference import TOLERANCE

    return (
        f'{len(table.entries)} entries: monotone in depth, width, length and batch; repeats agree '
        f'within {TOLERANCE:.0%}'
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog='python -m effjax.calibrate',
        description='Measures seconds of train steps by shape, into a table to charge runs by.',
        epilog='Any key of the configs can be set for all: --config.precision.kind=fp32.',
        allow_abbrev=False,
    )
    parser.add_argument(
        '--config', action='append', metavar='FILE[:VARIANT]', help='config file; may be repeated'
    )
    parser.add_argument(
        '--vary',
        action='append',
        default=[],
        metavar='KEY=V1,V2',
        help='values of a key to measure, such as model.layers=4,8,12; may be repeated',
    )
    parser.add_argument('--out', metavar='FILE', help='table to write or to add to')
    parser.add_argument('--steps', type=int, default=30, help='timed steps a round (default 30)')
    parser.add_argument('--rounds', type=int, default=2, help='rounds to compare (default 2)')
    parser.add_argument('--check', metavar='FILE', help='check a table and leave')
    parser.add_argument('--list', metavar='FILE', help='print a table, refused or not, and leave')
    parser.add_argument(
        '--traceback', action='store_true', help='show the traceback of an error in the input'
    )
    return parse_with_overrides(parser, argv)


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
