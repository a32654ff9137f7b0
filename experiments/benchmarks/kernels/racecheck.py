"""compute-sanitizer's racecheck over small checks, each in a process of its own.

It looks at threads' accesses to shared memory: two by different threads, one of them a write,
without a barrier between them, are a hazard. It slows kernels down, hence the small shapes. It does
not settle everything on Hopper: what the copy engine writes for a tensor map, and what wgmma reads,
is no thread's access, and bulk copies without a map are reported though barriers order them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from experiments.benchmarks.kernels.checks import Check

TOOL = 'compute-sanitizer'
KERNELS = 'kns=mosaic_gpu'  # ours alone: with XLA's watched too a check was not done in 300 s
LIMIT = 300  # seconds of a process
# Beside the first check of each operation: those that run kernels of their own.
ALSO = ('stretches, no decay', 'vector decay, documents')
# Kernels one by one, not in graphs, and no more memory than is needed.
SETTINGS = {
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    'XLA_FLAGS': '--xla_gpu_enable_command_buffer=',
}


def chosen(checks: Sequence[Check], *, every: bool) -> list[Check]:
    """Returns the checks to go over: one of each kernel, or all."""
    first: dict[str, Check] = {}
    for check in checks:
        first.setdefault(check.name if check.name in ALSO else check.op, check)
    return list(checks) if every else list(first.values())


def command(check: Check, seed: int) -> list[str]:
    """Returns the command line of a check under the sanitizer."""
    program = [sys.executable, '-m', 'experiments.benchmarks.kernels.check', '--small']
    options = ['--tool', 'racecheck', '--kernel-name', KERNELS]
    return [TOOL, *options, *program, '--seed', str(seed), '--cases', check.name]


def hazards(text: str) -> int | None:
    """Returns how many hazards the sanitizer reports, or None where it gives no summary."""
    found = re.search(r'RACECHECK SUMMARY: (\d+) hazards? displayed', text)
    return int(found[1]) if found else None


def run(checks: Sequence[Check], seed: int) -> int:
    """Runs the sanitizer over checks, prints what it finds, returns the exit status."""
    for check in checks:
        print(shlex.join(command(check, seed)), flush=True)
    if shutil.which(TOOL) is None:
        print(f'racecheck: there is no {TOOL} here; it comes with the CUDA toolkit.')
        return 2
    statuses = [_one(check, seed) for check in checks]
    print(f'racecheck: {statuses.count(0)} without hazards, {statuses.count(1)} with, or failed')
    return max(statuses, default=0)


def _one(check: Check, seed: int) -> int:
    """Prints one check's result; returns 0, 1 with hazards or where it fails, 2 without a GPU."""
    flags = ' '.join(filter(None, [os.environ.get('XLA_FLAGS'), SETTINGS['XLA_FLAGS']]))
    settings = os.environ | SETTINGS | {'XLA_FLAGS': flags}
    try:
        done = subprocess.run(
            command(check, seed), env=settings, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        print(f'{check.name}: not done after {LIMIT} s', flush=True)
        return 1
    text = done.stdout + done.stderr
    count = hazards(text)
    if count == 0 and done.returncode == 0:
        print(f'{check.name}: no hazards, and right', flush=True)
        return 0
    words = 'no summary' if count is None else f'{count} hazards'
    # What it says of hazards, or else of the end.
    told = [x for x in text.splitlines() if 'hazard' in x.lower() or 'WRONG' in x]
    told = told or text.splitlines()[-5:]
    print('\n  '.join([f'{check.name}: {words}, status {done.returncode}', *told[:20]]), flush=True)
    return 2 if done.returncode == 2 else 1
