"""Times our kernels beside their floors and their peers on one device, in one process.

    python -m experiments.benchmarks.kernels.run [--cases 'scalar decay'] [--out FILE]

For each case: our picked implementation and the plain XLA one, jax-linear-attention's kernel and
fla's where they are installed and run, and cuDNN attention of the same shape. All jax programs are
compiled side by side, and timed one at a time. Floors count the bytes and FLOPs of a case over
ceilings measured in the same run. Every jax program is checked against the XLA one, output and
gradients. Results: README.md beside this file.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import last_choice
from experiments.benchmarks.kernels.cases import CASES, SMALL, Case
from experiments.benchmarks.kernels.peers import OTHERS, fla_times, jax_peers
from experiments.benchmarks.kernels.timing import ceilings, lower, times

# bfloat16 rounds to 2^-9 of a number; outputs and gradients go through some such roundings.
BOUND = 0.02
HEAD = """\
| case | program | ms, forward / and backward | of the floor | error, output / gradients |
| --- | --- | --- | --- | --- |"""


def distance(a: Any, b: Any) -> float:
    """Returns the largest relative distance |a - b| / |b| of two lists of arrays, in norm."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())  # noqa: E731
    return float(
        max(norm(x.astype(jnp.float32) - y.astype(jnp.float32)) / norm(y) for x, y in pairs)
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """One implementation of a case, being compiled.

    Attributes:
      name: 'effjax' for what the public function picks.
      ran: the implementation, for that one.
      compiled: gives (forward, with gradients), or the error in its way.
    """

    name: str
    ran: str | None
    compiled: concurrent.futures.Future


def prepare(case: Case, pool: concurrent.futures.Executor) -> list[Program]:
    """Traces a case's jax programs, and leaves compiling them to a pool."""
    arrays = jax.eval_shape(case.make, jax.random.key(0))
    runs: dict[str, Any] = {
        name or 'effjax': functools.partial(case.run, name) for name in reversed(case.ours)
    }
    made = []
    for name, run in (runs | jax_peers(case)).items():
        ran = None
        try:
            lowered = lower(run, arrays)
            if name == 'effjax':
                ran = last_choice()['implementation']
            compiled = pool.submit(lambda pair=lowered: tuple(x.compile() for x in pair))
        except Exception as e:  # a peer's or a device's refusal is a result
            compiled = concurrent.futures.Future()
            compiled.set_exception(e)
        made.append(Program(name, ran, compiled))
    return made


def measure(
    case: Case, programs: Sequence[Program], peak: tuple[float, float], calls: int, rounds: int
) -> dict[str, Any]:
    """Returns a case's row: seconds forward and forward + backward of each jax program."""
    arrays = jax.jit(case.make)(jax.random.key(0))
    moved, flops = case.bytes(), case.flops
    floor = [max(m / peak[0], f / peak[1]) for m, f in zip(moved, flops, strict=True)]
    row: dict[str, Any] = {'case': case.name, 'floor': [floor[0], sum(floor)], 'programs': {}}
    truth: Any = None
    for program in programs:
        try:
            o, grads, first, whole = times(*program.compiled.result(), arrays, calls, rounds)
        except Exception as e:
            row['programs'][program.name] = {'error': _words(e)}
            continue
        found: dict[str, Any] = {'forward': first, 'whole': whole}
        if program.ran:
            found['ran'] = program.ran
        if truth is None:
            truth = (o, grads)
        elif program.name not in OTHERS:
            found['error_of_output'] = distance(o, truth[0])
            found['error_of_gradients'] = distance(grads, truth[1])
        row['programs'][program.name] = found
    return row


def add_fla(case: Case, row: dict[str, Any], calls: int, rounds: int) -> None:
    """Puts fla's times of a case, or its refusal, into its row."""
    try:
        first, whole = fla_times(case, calls, rounds)
        row['programs']['fla'] = {'forward': first, 'whole': whole}
    except Exception as e:
        row['programs']['fla'] = {'error': _words(e)}


def _words(e: Exception) -> str:
    return f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:160]}'


def lines(row: dict[str, Any]) -> list[str]:
    """Returns a row's lines of the table; a time is 'forward / forward + backward' in ms."""
    floor = row['floor']
    out = [f'| **{row["case"]}** | floor | {1e3 * floor[0]:.3f} / {1e3 * floor[1]:.3f} | | |']
    for name, found in row['programs'].items():
        if 'error' in found:
            out.append(f'| | {name} | {found["error"]} | | |')
            continue
        label = f'{name} ({found["ran"]})' if 'ran' in found else name
        share = f'{floor[0] / found["forward"]:.0%} / {floor[1] / found["whole"]:.0%}'
        errors = ''
        if 'error_of_output' in found:
            errors = f'{found["error_of_output"]:.1e} / {found["error_of_gradients"]:.1e}'
            if max(found['error_of_output'], found['error_of_gradients']) > BOUND:
                errors += ' **wrong**'
        times = f'{1e3 * found["forward"]:.3f} / {1e3 * found["whole"]:.3f}'
        out.append(f'| | {label} | {times} | {share} | {errors} |')
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', nargs='+', help='only those whose name begins so')
    parser.add_argument('--calls', type=int, default=10, help='calls of a round')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument(
        '--no_fla', action='store_true', help="without fla's kernels, the slowest to start"
    )
    parser.add_argument('--small', action='store_true', help='tiny shapes, to try the program')
    parser.add_argument('--out', type=pathlib.Path, help='a JSON file for the rows')
    args = parser.parse_args(argv)
    cases = SMALL if args.small else CASES
    if args.cases:
        cases = tuple(c for c in cases if any(c.name.startswith(n) for n in args.cases))
    peak = ceilings(args.calls, args.rounds, small=args.small)
    report = {'device': jax.devices()[0].device_kind, 'jax': jax.__version__, 'ceilings': peak}
    print(f'{report["device"]}, jax {jax.__version__}; copy {peak[0] / 1e12:.2f} TB/s, ', end='')
    print(f'8192^3 bfloat16 product {peak[1] / 1e12:.0f} TFLOP/s\n')
    print(HEAD)
    rows = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        prepared = [(case, prepare(case, pool)) for case in cases]
    # All are compiled: the compiler tries things out on the device, which would disturb a timing.
    for case, programs in prepared:
        rows.append(measure(case, programs, peak, args.calls, args.rounds))
        print('\n'.join(lines(rows[-1])), flush=True)
        _write(args.out, {**report, 'rows': rows})
    if args.no_fla:
        return
    # Last, since its first call of a shape tries out forms for a minute; then the table again.
    for case, row in zip(cases, rows, strict=True):
        add_fla(case, row, args.calls, args.rounds)
        print(f'fla, {case.name}: {row["programs"]["fla"]}', flush=True)
        _write(args.out, {**report, 'rows': rows})
    print('\n'.join(['', HEAD, *(line for row in rows for line in lines(row))]))


def _write(out: pathlib.Path | None, report: dict[str, Any]) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
