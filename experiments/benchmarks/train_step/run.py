"""Times our training step beside its peers on one GPU, in one call, and prints the ratios.

    python -m experiments.benchmarks.train_step.run [--shapes 374m 1.36b 374m_long] [--out FILE]

Each program runs in a process of its own, one after another, so that none inherits another's
memory or clocks. `plain_jax` and `jla` run with XLA's default products and with cuBLASLt's; the
better one is the peer. A program that has no form of a shape is skipped. Needs the `cuda` and `hf`
extras, and for recurrent shapes what peers/fla.py and peers/jla.py name. Results: README.md beside
this file.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

from experiments.benchmarks.train_step.shapes import SHAPES

CUBLASLT = '--xla_gpu_enable_cublaslt=true --xla_gpu_enable_triton_gemm=false'
RECURRENT = ('retnet', 'gla', 'mamba2')


class Program(NamedTuple):
    """A module of this folder, the mixers that it has, its own options, and XLA's flags."""

    module: str
    mixers: tuple[str, ...] = ('attention',)
    options: tuple[str, ...] = ()
    flags: str = ''


PROGRAMS = {
    'effjax': Program('ours', ('attention', *RECURRENT)),
    'plain_jax': Program('peers.plain_jax'),
    'plain_jax_lt': Program('peers.plain_jax', flags=CUBLASLT),
    'hf': Program('peers.hf'),
    'fla': Program('peers.fla', RECURRENT),
    'fla_autocast': Program('peers.fla', RECURRENT, ('--precision=autocast',)),
    'fla_compile': Program('peers.fla', RECURRENT, ('--compile',)),
    'jla': Program('peers.jla', RECURRENT),
    'jla_lt': Program('peers.jla', RECURRENT, flags=CUBLASLT),
}


def measure(program: str, shape: str, steps: int, rounds: int, limit: float) -> dict | None:
    """Runs one program in a process of its own; returns what it printed, or None if it failed."""
    module, _, options, flags = PROGRAMS[program]
    command = [sys.executable, '-m', f'experiments.benchmarks.train_step.{module}']
    command += ['--shape', shape, '--steps', str(steps), '--rounds', str(rounds), *options]
    env = {**os.environ, 'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=limit, check=True
        )
    except subprocess.TimeoutExpired:
        print(f'{program} {shape}: ran past {limit:.0f} s', file=sys.stderr)
        return None
    except subprocess.CalledProcessError as e:
        print(f'{program} {shape} failed:\n{e.stderr[-800:]}', file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def skips(program: str, shape: str) -> str | None:
    """Says why a program has no form of a shape; None where it has one."""
    mixers = PROGRAMS[program].mixers
    if SHAPES[shape].mixer in mixers:
        return None
    return f'{shape} {program}: skipped, it has {", ".join(mixers)} and no {SHAPES[shape].mixer}'


def attention_of(results: dict[str, dict[str, dict]], shape: str) -> float | None:
    """Returns tok/s of our attention model on rows of this recurrent shape's length, if it ran.

    Of several such models it is the one whose parameters come closest.
    """
    wanted = SHAPES[shape]
    if wanted.mixer == 'attention':
        return None
    found = [
        (abs(SHAPES[name].params - wanted.params), programs['effjax']['tok_s'])
        for name, programs in results.items()
        if SHAPES[name].mixer == 'attention'
        and (SHAPES[name].batch, SHAPES[name].length) == (wanted.batch, wanted.length)
        and 'effjax' in programs
    ]
    return min(found)[1] if found else None


def table(results: dict[str, dict[str, dict]]) -> str:
    """Returns a Markdown table: tokens a second, peak memory, parameters, and two ratios.

    The ratios are of ours to each program, and to our attention model on rows of the same length.
    """
    lines = [
        '| shape | program | tok/s | step ms (rounds) | peak GiB | parameters | effjax / it '
        '| effjax / our attention |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for shape, programs in results.items():
        ours = programs.get('effjax', {}).get('tok_s')
        attention = attention_of(results, shape)
        for name, r in programs.items():
            ratio = f'{ours / r["tok_s"]:.3f}' if ours else ''
            rounds = ', '.join(f'{1e3 * s:.1f}' for s in r['rounds_s'])
            peak = f'{r["peak_bytes"] / 2**30:.1f}' if r['peak_bytes'] else ''
            beside = f'{r["tok_s"] / attention:.3f}' if attention and name == 'effjax' else ''
            lines.append(
                f'| {shape} | {name} | {r["tok_s"]:,.0f} | {1e3 * r["step_s"]:.1f} ({rounds}) '
                f'| {peak} | {r["params"]:,} | {ratio} | {beside} |'
            )
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shapes', nargs='+', choices=SHAPES, default=['374m', '1.36b'])
    parser.add_argument('--programs', nargs='+', choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument('--steps', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--limit', type=float, default=180.0, help='seconds a program may take')
    parser.add_argument('--out', type=pathlib.Path, help='write the results as JSON')
    args = parser.parse_args()
    results: dict[str, dict[str, dict]] = {}
    for shape in args.shapes:
        for program in args.programs:
            if (why := skips(program, shape)) is not None:
                print(why, flush=True)
                continue
            started = time.perf_counter()
            found = measure(program, shape, args.steps, args.rounds, args.limit)
            spent = time.perf_counter() - started
            if found is not None:
                results.setdefault(shape, {})[program] = found
                print(f'{shape} {program}: {found["tok_s"]:,.0f} tok/s ({spent:.0f} s)', flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + '\n')
    print(table(results))


if __name__ == '__main__':
    main()
