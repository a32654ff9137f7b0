"""`python -m experiments.benchmarks.kernels.check`: are the Hopper kernels right, on a real GPU?

Each call of `checks.py` gets fresh random inputs, and its outputs, states and every gradient are
held to the same call in float32 (products at the highest precision). A result is right if each
output and gradient is near enough as a whole and in each of its rows, if every element is finite,
and if all calls on the same inputs give the same bits: another bit is a race, since no kernel adds
atomically, so that no operation is excepted.

What a kernel leaves unwritten must not look right by chance: results are written into donated
buffers full of NaN. What a program keeps between its kernels is poisoned as far as its allocator
lets it: as much memory is taken, filled with NaN and given back right before each call.

    python -m experiments.benchmarks.kernels.check [--cases NAME ...] [--seed N] [--small] [--out F]
    python -m experiments.benchmarks.kernels.check --racecheck

Exit status: 0 right, 1 something is wrong, 2 no Hopper GPU (or no compute-sanitizer).
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import target
from effjax.kernels.devices import refuse_hopper
from experiments.benchmarks.kernels import racecheck
from experiments.benchmarks.kernels.checks import Arrays, Check, checks, wide
from experiments.benchmarks.kernels.measures import compare

KERNEL = 'pallas_gpu'
# A row may be so many times further off than all rows together: one that was forgotten is wrong by
# about 1, which in a norm over thousands of rows would not show.
ROW, ROW_MOST = 30.0, 0.5
HEAD = """\
| case | largest error, of its bound | worst row | not finite | calls agree | |
| --- | --- | --- | --- | --- | --- |"""


@dataclasses.dataclass(frozen=True)
class Programs:
    """A check's programs, being compiled.

    Attributes:
      make: key -> inputs with a gradient, the others, gradients of outputs.
      ours: (memory of the results, what `make` gives) -> results, which are outputs and gradients.
      poison: () -> results of NaN.
      truth: what `make` gives -> right results.
      compare: (results, results of another call, right ones) -> numbers.
    """

    make: Any
    ours: Any
    poison: Any
    truth: Any
    compare: Any


def results(check: Check, implementation: str, given: tuple[Arrays, Arrays, Arrays]) -> Arrays:
    """Returns outputs, and gradients under the names of inputs with a 'd' before them."""
    trained, fixed, weights = given
    outputs, pull = jax.vjp(lambda x: check.run(implementation, {**x, **fixed}), trained)
    (gradients,) = pull(weights)
    return outputs | {f'd{name}': x for name, x in gradients.items()}


def lower(check: Check, *, interpret: bool) -> dict[str, Any]:
    """Traces a check's programs, ready to compile."""

    def make(key: jax.Array) -> tuple[Arrays, Arrays, Arrays]:
        keys = jax.random.split(key)
        trained, fixed = check.make(keys[0])
        outputs = jax.eval_shape(lambda x: check.run(check.truth, {**x, **fixed}), trained)
        split = jax.random.split(keys[1], len(outputs))
        weights = {
            name: jax.random.normal(split[i], x.shape, x.dtype)
            for i, (name, x) in enumerate(outputs.items())
        }
        if check.positive:
            weights = {name: jnp.abs(x) for name, x in weights.items()}
        return trained, fixed, weights

    def ours(memory: Arrays, given: Any) -> Arrays:
        del memory  # donated
        return results(check, KERNEL, given)

    def truth(given: Any) -> Arrays:
        trained, fixed, weights = given
        with jax.default_matmul_precision('highest'):
            return results(check, check.truth, (wide(trained), wide(fixed), wide(weights)))

    key = jax.random.key(0)
    given = jax.eval_shape(make, key)
    like = given[2] | {f'd{name}': x for name, x in given[0].items()}
    poison = lambda: {n: jnp.full(x.shape, jnp.nan, x.dtype) for n, x in like.items()}  # noqa: E731
    with interpreted() if interpret else contextlib.nullcontext():
        donated = jax.jit(ours, donate_argnums=0, keep_unused=True).lower(like, given)
    return {
        'make': jax.jit(make).lower(key),
        'ours': donated,
        'poison': jax.jit(poison).lower(),
        'truth': jax.jit(truth).lower(given),
        'compare': jax.jit(compare).lower(like, like, jax.eval_shape(truth, given)),
    }


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run in Pallas' interpreter, on the CPU; races raise."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from effjax.kernels.attention import hopper as attention
    from effjax.kernels.linear_recurrence import hopper as recurrence

    kept = [(module, module.STAGED) for module in (attention, recurrence)]
    mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
    try:
        for module, _ in kept:
            module.STAGED = True  # the interpreter has no products of registers
        with target('gpu'), mode:
            yield
    finally:
        for module, staged in kept:
            module.STAGED = staged


def prepare(
    check: Check, pool: concurrent.futures.Executor, *, interpret: bool
) -> Programs | Exception:
    """Traces a check's programs and leaves compiling them to a pool; or returns what went wrong."""
    try:
        made = lower(check, interpret=interpret)
    except Exception as e:  # a kernel that does not lower is a result
        return e
    return Programs(**{name: pool.submit(x.compile) for name, x in made.items()})


def poisoned(programs: Programs) -> Arrays:
    """Returns memory for results, full of NaN, and leaves NaN where a call finds its own memory.

    The allocator is asked for as much as the program's temporary memory, so that it gives the
    program the same place right afterwards.
    """
    memory = jax.block_until_ready(programs.poison())
    analysis = programs.ours.memory_analysis()
    size = 0 if analysis is None else analysis.temp_size_in_bytes
    # Of four such bytes every bfloat16 and every float32 is NaN.
    spare = jnp.full((-(-size // 4),), 2**32 - 1, jnp.uint32)
    jax.block_until_ready(spare).delete()
    return memory


def examine(check: Check, programs: Programs | Exception, seed: int, calls: int) -> dict[str, Any]:
    """Runs a check; returns its row.

    Returns:
      'case', 'op', 'right', 'wrong' (what is, in words), and where it ran 'same' and 'results': by
      name 'error', 'bound', 'row', 'row_bound' and 'not_finite'.
    """
    row: dict[str, Any] = {'case': check.name, 'op': check.op, 'why': check.why}
    try:
        if isinstance(programs, Exception):
            raise programs
        pairs = dataclasses.fields(programs)
        programs = Programs(**{f.name: getattr(programs, f.name).result() for f in pairs})
        # A check's inputs do not depend on which others run.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(check.name.encode()) >> 1)
        wait = jax.block_until_ready  # an error belongs to the call that made it
        given = wait(programs.make(key))
        first = wait(programs.ours(poisoned(programs), given))
        right = wait(programs.truth(given))
        found = None
        for _ in range(calls - 1):
            again = wait(programs.ours(poisoned(programs), given))
            one = jax.device_get(programs.compare(first, again, right))
            found = one if found is None else _joined(found, one)
    except Exception as e:
        words = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:300]}'
        return {**row, 'right': False, 'wrong': [words]}
    return {**row, **judged(check, found)}


def _joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The numbers of `b`, and whether both comparisons found the same bits."""
    return {n: {**x, 'same': bool(a[n]['same']) and bool(x['same'])} for n, x in b.items()}


def judged(check: Check, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a check's numbers, those of `measures.compare` by name."""
    table, wrong = {}, []
    for name, x in found.items():
        bound = check.limit(name)
        rows = min(ROW_MOST, ROW * bound)
        table[name] = {
            'error': float(x['error']),
            'bound': bound,
            'row': float(x['row']),
            'row_bound': rows,
            'not_finite': int(x['not_finite']),
        }
        if not x['truth_finite']:
            wrong.append(f'{name}: what it is held to is not finite')
        if x['not_finite']:
            wrong.append(f'{name}: {int(x["not_finite"])} not finite')
        if not x['error'] <= bound:
            wrong.append(f'{name}: off by {x["error"]:.1e}, more than {bound:.1e}')
        if not x['row'] <= rows:
            wrong.append(f'{name}: a row is off by {x["row"]:.1e}, more than {rows:.1e}')
        if not x['same']:
            wrong.append(f'{name}: another call gives other bits')
    same = all(bool(x['same']) for x in found.values())
    return {'right': not wrong, 'wrong': wrong, 'same': same, 'results': table}


def line(row: dict[str, Any]) -> str:
    """Returns a check's one line."""
    if 'results' not in row:
        return f'{row["case"]}: WRONG: {"; ".join(row["wrong"])}'
    errors = ', '.join(f'{n} {x["error"]:.1e}' for n, x in row['results'].items())
    bad = sum(x['not_finite'] for x in row['results'].values())
    agree = 'same bits each time' if row['same'] else 'OTHER BITS another time'
    verdict = 'right' if row['right'] else f'WRONG: {"; ".join(row["wrong"])} ({row["why"]})'
    return f'{row["case"]}: errors {errors}; {bad} not finite; {agree}; {verdict}'


def entry(row: dict[str, Any]) -> str:
    """Returns a check's line of the table."""
    if 'results' not in row:
        return f'| {row["case"]} | {row["wrong"][0]} | | | | **WRONG** |'
    name, most = max(row['results'].items(), key=lambda item: item[1]['error'] / item[1]['bound'])
    worst = max(x['row'] for x in row['results'].values())
    bad = sum(x['not_finite'] for x in row['results'].values())
    verdict = 'right' if row['right'] else '**WRONG**'
    agree = 'yes' if row['same'] else '**no**'
    error = f'{name} {most["error"]:.1e} of {most["bound"]:.1e}'
    return f'| {row["case"]} | {error} | {worst:.1e} | {bad} | {agree} | {verdict} |'


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, with the checks that they name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', nargs='+', help='only those whose name begins so')
    parser.add_argument('--seed', type=int, help='of the inputs; else from the clock')
    parser.add_argument('--calls', type=int, default=2, help='on the same inputs, at least 2')
    parser.add_argument('--small', action='store_true', help='small shapes')
    parser.add_argument(
        '--interpret', action='store_true', help="through Pallas' interpreter; needs --small"
    )
    parser.add_argument(
        '--racecheck',
        action='store_true',
        help='run compute-sanitizer over a small check of each kernel, or over those of --cases',
    )
    parser.add_argument('--out', type=pathlib.Path, help='a JSON file for the rows')
    args = parser.parse_args(argv)
    if args.interpret and not args.small:
        parser.error('--interpret takes hours with large shapes: add --small')
    if args.calls < 2:
        parser.error('--calls is at least 2: one call says nothing of races')
    args.checks = checks(small=args.small or args.racecheck)
    if args.cases:
        chosen = [c for c in args.checks if any(c.name.startswith(n) for n in args.cases)]
        if not chosen:
            parser.error(f'no case begins so; there are {", ".join(c.name for c in args.checks)}')
        args.checks = tuple(chosen)
    if args.seed is None:
        args.seed = time.time_ns() // 1000 % 2**31
    return args


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all checks, one operation after another, each check printing its line; returns rows."""
    rows = []
    for op, group in itertools.groupby(args.checks, lambda check: check.op):
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            prepared = [(c, prepare(c, pool, interpret=args.interpret)) for c in group]
        # All are compiled: the compiler tries things out on the device, in memory that a call's
        # results, and what is between its kernels, would not get then.
        print(f'{op}: {len(prepared)} compiled in {time.monotonic() - started:.0f} s', flush=True)
        for check, programs in prepared:
            rows.append(examine(check, programs, args.seed, args.calls))
            print(line(rows[-1]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse(argv)
    if args.racecheck:  # in processes of its own: this one takes no GPU memory
        return racecheck.run(racecheck.chosen(args.checks, every=bool(args.cases)), args.seed)
    if args.interpret:  # each simulated warpgroup waits in a thread of XLA's pool
        os.environ.setdefault('NPROC', '8')
    why = None if args.interpret else refuse_hopper()
    if why:
        print(f'check: {why}. Anywhere: --small --interpret, through the interpreter.')
        return 2
    device = jax.devices()[0].device_kind
    print(f'{device}, jax {jax.__version__}, --seed {args.seed}', flush=True)
    rows = run(args)
    wrong = [row['case'] for row in rows if not row['right']]
    print('\n'.join(['', HEAD, *map(entry, rows), '']))
    print(f'--seed {args.seed}: {len(rows) - len(wrong)} right, {len(wrong)} WRONG')
    if args.out:
        facts = {'device': device, 'jax': jax.__version__, 'seed': args.seed, 'calls': args.calls}
        facts |= {'small': args.small, 'interpreted': args.interpret}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**facts, 'rows': rows}, indent=1) + '\n')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
