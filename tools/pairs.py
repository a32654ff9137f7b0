"""Trains every pair of methods for two steps; writes effjax/pairs.json and docs/pairs.md.

Usage: python tools/pairs.py [ID ...] [--all] [--page] [--minutes M] [--jobs N]

Only pairs without a current entry run; --all runs them all again, an ID those of that method,
--page writes the page alone. It can be stopped at any time and goes on where it was; after
--minutes it notes the pairs that are left as not run yet, and writes the page.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from effjax import methods
from effjax.core.command import run_command
from effjax.core.errors import ConfigError, StudyError
from effjax.core.registry import suggest
from effjax.study import pairs as pairs_lib
from effjax.study.pairs import STATES, Pair

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = ROOT / 'docs' / 'pairs.md'
MARKS = {'works': '+', 'refused': 'r', 'untested': '·', 'broken': '!'}
HEAD = """# Which methods go together

Made by `python tools/pairs.py` from `effjax/methods.toml`: the lines of two methods in one small
config, trained for two steps on one CPU device. "Works" says that such a config trains, not that
the two help each other; that takes a study. `python -m effjax.methods --compatible_with ID` prints
what stands here of one method.

A method without lines of its own *is* its base config, and the other's lines are put onto that. Two
methods that set one key to different values, or that are two base configs, are never in one run:
untested, as is a pair that nobody has run yet.
"""


def every_pair(rows: Mapping[str, methods.Method]) -> Iterator[tuple[str, str]]:
    """Yields the unordered pairs, in the order of the table."""
    names = list(rows)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            yield first, second


def outcomes(
    texts: Sequence[str], jobs: int, until: float
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yields each config's JSON with its (state, reason), as they come, until time is up."""
    if jobs == 1:
        for text in texts:
            if time.monotonic() > until:
                return
            yield text, pairs_lib.attempt_json(text)
        return
    spawn = multiprocessing.get_context('spawn')  # a fork of a process that runs jax may hang
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        waiting = {pool.submit(pairs_lib.attempt_json, text): text for text in texts}
        try:
            left = None if until == math.inf else max(0.0, until - time.monotonic())
            for done in concurrent.futures.as_completed(waiting, timeout=left):
                yield waiting[done], done.result()
        except TimeoutError:
            pass
        finally:
            pool.shutdown(cancel_futures=True)


def page(rows: Mapping[str, methods.Method], found: Mapping[tuple[str, str], Pair]) -> str:
    """Returns docs/pairs.md."""
    states = [found[key].state for key in every_pair(rows)]
    counts = ', '.join(f'{states.count(s)} {s}' for s in STATES)
    legend = ', '.join(f'`{MARKS[s]}` {s}' for s in STATES)
    out = [HEAD, f'{len(states)} pairs of {len(rows)} methods: {counts}. {legend}.', '']
    names = list(rows)
    out.append('| | | ' + ' | '.join(str(i) for i in range(1, len(names))) + ' |')
    out.append('|---' * (len(names) + 1) + '|')
    for i, name in enumerate(names):
        marks = [MARKS[found[other, name].state] for other in names[:i]]
        cells = marks + [''] * (len(names) - 1 - i)
        out.append(f'| {i + 1} | {name} | ' + ' | '.join(cells[: len(names) - 1]) + ' |')
    for state in STATES[1:]:
        out += _reasons(state, [found[key] for key in every_pair(rows)])
    return '\n'.join(out) + '\n'


def _reasons(state: str, pairs: Sequence[Pair]) -> list[str]:
    """Returns a state's pairs, those with one reason together."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    bases = [p for p in pairs if p.state == state and p.reason.endswith(pairs_lib.TWO_BASES)]
    for pair in pairs:
        if pair.state == state and pair not in bases:
            by_reason.setdefault(pair.reason, {}).setdefault(pair.first, []).append(pair.second)
    if not by_reason and not bases:
        return []
    out = ['', f'## {state.capitalize()}', '']
    if bases:
        out += [f'{len(bases)} pairs {pairs_lib.TWO_BASES}.', '']
    out += ['| pairs | reason |', '|---|---|'] if by_reason else []
    for reason, partners in by_reason.items():
        lines = [f'{first} + {_any_of(others)}' for first, others in partners.items()]
        out.append(f'| {"<br>".join(lines)} | {reason.replace("|", chr(92) + "|")} |')
    return out


def _any_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f'({", ".join(names)})'


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('ids', nargs='*', metavar='ID', help='run the pairs of these again')
    parser.add_argument('--all', action='store_true', help='run every pair again')
    parser.add_argument('--page', action='store_true', help='write docs/pairs.md and leave')
    parser.add_argument('--minutes', type=float, help='after so long, note the rest as not run')
    parser.add_argument('--jobs', type=int, default=1, help='processes that train')
    args = parser.parse_args(argv)
    rows, stored = methods.load(), pairs_lib.load(pairs_lib.FILE)
    for name in args.ids:
        if name not in rows:
            raise ConfigError(f'no method {name!r}.' + suggest(name, rows))
    found: dict[tuple[str, str], Pair] = {}
    again = set(rows) if args.all else set(args.ids)
    for key in every_pair(rows):
        pair = stored.get(key)
        if pair and pair.digest == pairs_lib.digest(*(rows[name] for name in key)):
            found[key] = pair
    left = {key for key, pair in found.items() if pair.reason == pairs_lib.NOT_RUN}
    due = [key for key in every_pair(rows) if key not in found or key in left or again & {*key}]
    if not args.page:
        until = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
        run(rows, due, found, until, args.jobs)
    elif len(found) < len(list(every_pair(rows))):
        raise StudyError(f'{len(due)} pairs have no current entry; run without --page first.')
    save(rows, found)  # a method that is gone leaves the table even when nothing was due
    TARGET.write_text(page(rows, found))


def run(
    rows: Mapping[str, methods.Method],
    due: Sequence[tuple[str, str]],
    found: dict[tuple[str, str], Pair],
    until: float = math.inf,
    jobs: int = 1,
) -> None:
    """Finds out about the pairs in `due`, writing the table after each.

    Args:
      rows: all methods.
      due: the pairs.
      found: takes what was found.
      until: seconds of `time.monotonic()` after which no pair is run, only noted.
      jobs: processes that train.
    """
    waiting: dict[str, list[tuple[str, str]]] = {}
    for key in due:
        combined, outcome = pairs_lib.judge(*(rows[name] for name in key), ROOT)
        if outcome is not None:
            enter(rows, key, outcome, found)
        else:  # rows that change nothing make one config with many others, which runs once
            text = json.dumps({**combined.config, 'name': 'pair'}, sort_keys=True)
            waiting.setdefault(text, []).append(key)
    save(rows, found)
    for count, (text, outcome) in enumerate(outcomes(list(waiting), jobs, until), 1):
        for key in waiting.pop(text):
            enter(rows, key, outcome, found)
            state, reason = outcome
            print(
                f'{count} of {count + len(waiting)}: {key[0]} + {key[1]}: {state} {reason}',
                flush=True,
            )
        save(rows, found)
    left = [key for keys in waiting.values() for key in keys]
    for key in left:
        enter(rows, key, ('untested', pairs_lib.NOT_RUN), found)
    if left:
        print(f'{len(left)} pairs left, noted as not run yet', flush=True)


def enter(
    rows: Mapping[str, methods.Method],
    key: tuple[str, str],
    outcome: tuple[str, str],
    found: dict[tuple[str, str], Pair],
) -> None:
    """Puts what came of a pair into the table."""
    found[key] = Pair(*key, *outcome, pairs_lib.digest(*(rows[name] for name in key)))


def save(rows: Mapping[str, methods.Method], found: Mapping[tuple[str, str], Pair]) -> None:
    """Writes the pairs of `rows` that are known; the file is whole at any moment."""
    half = pairs_lib.FILE.with_suffix('.part')
    half.write_text(pairs_lib.as_json(found[key] for key in every_pair(rows) if key in found))
    half.replace(pairs_lib.FILE)


if __name__ == '__main__':
    # The time goes into compiling, and two steps do not earn it back.
    os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
    os.environ['JAX_PLATFORMS'] = 'cpu'  # of this process, which has not imported jax, and others
    sys.exit(run_command(main, sys.argv[1:]))
