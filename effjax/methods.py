"""`python -m effjax.methods [ID ...] [--compatible_with ID] [--json]`: every technique of effjax.

The rows stand in `methods.toml` beside this file, one table a technique. A row without a test
does not belong there; `tests/test_methods.py` builds the config of each and trains it. Which two
go together stands in `pairs.json`, which `tools/pairs.py` makes by training them.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from typing import Any

from effjax.core.command import run_command
from effjax.core.errors import ConfigError
from effjax.core.registry import suggest

FILE = pathlib.Path(__file__).with_name('methods.toml')


@dataclasses.dataclass(frozen=True)
class Method:
    """One technique.

    Attributes:
      id: its name in the field's catalogue.
      title: what it is, in one line.
      paper: where it comes from.
      base: the config it is shown on, under `configs/`.
      config: the overrides that turn it on.
      tests: test files (or single tests) that show it works.
      studies: experiments that measured it; empty until one has.
      verdict: what was found, in one line.
    """

    id: str
    title: str
    paper: str
    base: str
    config: tuple[str, ...]
    tests: tuple[str, ...]
    studies: tuple[str, ...]
    verdict: str


def load() -> dict[str, Method]:
    """Returns `id -> Method` in the file's order.

    Raises:
      ConfigError: a row with an unknown or missing field.
    """
    names = {f.name for f in dataclasses.fields(Method)} - {'id'}
    out = {}
    for key, row in tomllib.loads(FILE.read_text()).items():
        if set(row) != names:
            wrong = ', '.join(sorted(names ^ set(row)))
            raise ConfigError(f'{FILE.name}: row {key!r} lacks or does not know: {wrong}.')
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        out[key] = Method(id=key, **values)
    return out


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog='python -m effjax.methods', description='Lists every technique that effjax implements.'
    )
    parser.add_argument('ids', nargs='*', metavar='ID', help='show only these, in full')
    parser.add_argument(
        '--compatible_with', metavar='ID', help='show with which methods this one goes together'
    )
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args(argv)
    methods = load()
    asked = [] if args.compatible_with is None else [args.compatible_with]
    for name in [*args.ids, *asked]:
        if name not in methods:
            raise ConfigError(f'no method {name!r}.' + suggest(name, methods))
    if asked:
        _print_partners(args.compatible_with, methods, args.ids, args.json)
        return
    chosen = [methods[name] for name in args.ids] or list(methods.values())
    if args.json:
        print(json.dumps([dataclasses.asdict(m) for m in chosen], indent=2))
    elif args.ids:
        print('\n\n'.join(_page(m) for m in chosen))
    else:
        width = max(len(m.id) for m in chosen)
        for m in chosen:
            print(f'{m.id:<{width}}  {m.title}  [{m.verdict}]')


def _print_partners(
    name: str, methods: dict[str, Method], among: Sequence[str], as_json: bool
) -> None:
    """Prints with what a method goes together: of all methods, or of those asked about."""
    from effjax.study import pairs

    groups = {
        state: {other: why for other, why in found.items() if not among or other in among}
        for state, found in pairs.partners(name, methods, pairs.load()).items()
    }
    if as_json:
        print(json.dumps({'id': name, **groups}, indent=2))
        return
    print(f'{name} in one config with another method, trained for {pairs.STEPS} steps:')
    for state, found in groups.items():
        if not found:
            continue
        print(f'\n{state} ({len(found)})')
        if not any(found.values()):
            print(textwrap.indent(_wrapped(', '.join(found)), '  '))
            continue
        width = max(map(len, found))
        for other, why in found.items():
            print(f'  {other:<{width}}  {why}')


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 96, break_on_hyphens=False)


def _page(m: Method) -> str:
    lines = [f'{m.id}: {m.title}', f'  paper    {m.paper}', f'  config   --config={m.base}']
    lines += [f'           --config.{override}' for override in m.config]
    lines += [f'  {"tests" if i == 0 else "":<8} {t}' for i, t in enumerate(m.tests)]
    lines += [f'  {"studies" if i == 0 else "":<8} {s}' for i, s in enumerate(m.studies)]
    return '\n'.join([*lines, f'  verdict  {m.verdict}'])


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
