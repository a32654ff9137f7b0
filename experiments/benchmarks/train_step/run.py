"""Times our training step beside its peers on one GPU, in one call, and prints the ratios.

    python -m experiments.benchmarks.train_step.run [--shapes 374m 1.36b 374m_long] [--out FILE]

Each program runs in a process of its own, one after another, so that none inherits another's
memory or clocks. `plain_jax` runs with XLA's default products and with cuBLASLt's; the better one
is the peer. Needs the `cuda` and `hf` extras. Results: README.md beside this file.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from experiments.benchmarks.train_step.shapes import SHAPES

CUBLASLT = '--xla_gpu_enable_cublaslt=true --xla_gpu_enable_triton_gemm=false'
PROGRAMS = {
    'effjax': ('experiments.benchmarks.train_step.ours', ''),
    'plain_jax': ('experiments.benchmarks.train_step.peers.plain_jax', ''),
    'plain_jax_lt': ('experiments.benchmarks.train_step.peers.plain_jax', CUBLASLT),
    'hf': ('experiments.benchmarks.train_step.peers.hf', ''),
}


def measure(program: str, shape: str, steps: int, rounds: int, limit: float) -> dict | None:
    """Runs one program in a process of its own; returns what it printed, or None if it failed."""
    module, flags = PROGRAMS[program]
    command = [sys.executable, '-m', module, '--shape', shape]
    command += ['--steps', str(steps), '--rounds', str(rounds)]
    if shape == 'smoke':
        command.append('--smoke')
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


def table(results: dict[str, dict[str, dict]]) -> str:
    """Returns a Markdown table: tokens a second, peak memory, and our ratio to each program."""
    lines = [
        '| shape | program | tok/s | step ms (rounds) | peak GiB | effjax / it |',
        '|---|---|---|---|---|---|',
    ]
    for shape, programs in results.items():
        ours = programs.get('effjax', {}).get('tok_s')
        for name, r in programs.items():
            ratio = f'{ours / r["tok_s"]:.3f}' if ours else ''
            rounds = ', '.join(f'{1e3 * s:.1f}' for s in r['rounds_s'])
            peak = f'{r["peak_bytes"] / 2**30:.1f}' if r['peak_bytes'] else ''
            lines.append(
                f'| {shape} | {name} | {r["tok_s"]:,.0f} | {1e3 * r["step_s"]:.1f} ({rounds}) '
                f'| {peak} | {ratio} |'
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
