"""`python -m effjax.kernels.tune [--kernels NAME ...] [--out FILE]`: the fastest sizes of kernels.

Each kernel is timed with every size that it may have, at an example of each class of shapes, on the
device at hand. What is fastest, and faster than the kernel's own rule by more than the margin, goes
into the device's table, which kernels read; where the rule wins, the table says so too. A size
whose results differ from the rule's, or that does not compile, is left out and said.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import DeviceError, EffjaxError
from effjax.kernels import attention, diagonal_scan, last_choice, selective_scan
from effjax.kernels.sizes import Sizes, file_of, read, trying

MARGIN = 0.02  # share of the rule's time that another size must save: less is noise
# bfloat16 rounds to 2^-9; sizes change the order of sums, and what is rounded between them.
DISTANCE = 0.01

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A kernel and a class of shapes.

    Attributes:
      kernel: its name, as `sizes.tuned` takes it.
      shapes: the class, likewise.
      implementation: whose kernel it is.
      rule: sizes of the kernel's own rule.
      sizes: all that are tried.
      example: shapes and dtypes of the arguments that are timed.
      run: function of them; `run` alone is timed, or its gradients.
      backward: whether the kernel is one of the backward pass.
    """

    kernel: str
    shapes: str
    implementation: str
    rule: Sizes
    sizes: tuple[Sizes, ...]
    example: tuple[jax.ShapeDtypeStruct, ...]
    run: Callable[..., jax.Array]
    backward: bool

    @property
    def name(self) -> str:
        return f'{self.kernel} {self.shapes}'


def _attention(kernel: str, head_dim: int) -> Tunable:
    from effjax.kernels.attention.hopper import SIZES

    shape = (2, 8192, 2048 // head_dim, head_dim)
    stages, step = SIZES[kernel, head_dim]
    return Tunable(
        f'attention.{kernel}',
        f'head_dim={head_dim}',
        'pallas_gpu',
        {'stages': stages, 'step': step},
        tuple({'stages': n, 'step': s} for s in (64, 128) for n in (2, 3, 4, 5)),
        (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 3,
        functools.partial(attention, implementation='pallas_gpu'),
        kernel != 'forward',
    )


def _diagonal(implementation: str, dtype: str) -> Tunable:
    from effjax.kernels.diagonal_scan.plan import BLOCKS

    plan = BLOCKS[implementation]
    if implementation == 'pallas_gpu':  # a channel a thread
        tried = [(size, plan.width) for size in (16, 32, 48)]
    else:
        tried = [(size, width) for size in (128, 256, 512) for width in (128, 256, 512)]
    shape = jax.ShapeDtypeStruct((8, 4096, 2048 if dtype == 'float32' else 1024), dtype)
    return Tunable(
        'diagonal_scan',
        f'decay={dtype}',
        implementation,
        dataclasses.asdict(plan),
        tuple({'size': size, 'width': width} for size, width in tried),
        (shape, shape),
        lambda x, a: diagonal_scan(x, _decays(a), implementation=implementation),
        True,
    )


def _decays(a: jax.Array) -> jax.Array:
    """Logarithms of decays below 1."""
    if jnp.iscomplexobj(a):
        return jax.lax.complex(-jnp.abs(a.real), a.imag)
    return -jnp.abs(a)


def _selective(states: int) -> Tunable:
    from effjax.kernels.selective_scan.plan import ROWS_SHARED

    wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    tokens = (8, 2048)
    example = (
        half((*tokens, 2048)), wide((*tokens, 2048)), wide((2048, states)),
        half((*tokens, states)), half((*tokens, states)),
    )  # fmt: skip

    def run(u: jax.Array, dt: jax.Array, a: jax.Array, *maps: jax.Array) -> jax.Array:
        dt, a = jax.nn.softplus(dt - 4), -jnp.abs(a)
        return selective_scan(u, dt, a, *maps, implementation='pallas_gpu')

    return Tunable(
        'selective_scan',
        f'states={states}',
        'pallas_gpu',
        {'rows': ROWS_SHARED},
        tuple({'rows': rows} for rows in (64, 128)),
        example,
        run,
        True,
    )


def tunables(implementation: str) -> list[Tunable]:
    """Returns what can be tuned of 'pallas_gpu' or 'pallas_tpu'."""
    diagonal = [_diagonal(implementation, dtype) for dtype in ('float32', 'complex64')]
    if implementation == 'pallas_tpu':
        return diagonal
    passes = ('forward', 'queries', 'keys')
    return [
        *(_attention(kernel, head_dim) for head_dim in (128, 64) for kernel in passes),
        *diagonal,
        _selective(16),
    ]


# ---- measuring ---------------------------------------------------------------------------------


def _lowered(one: Tunable, found: Sizes) -> Any:
    """Traces a tunable with some sizes."""

    def forward(*arrays: jax.Array) -> Any:
        return (one.run(*arrays),)

    def backward(*arrays: jax.Array) -> Any:
        o, pull = jax.vjp(one.run, *arrays)
        return (o, *pull(o))

    with trying(one.kernel, found):
        lowered = jax.jit(backward if one.backward else forward).lower(*one.example)
    ran = last_choice()['implementation']
    if ran != one.implementation:
        raise DeviceError(f'{one.name}: {ran} ran in place of {one.implementation}.')
    return lowered


def _compiling(
    one: Tunable, found: Sizes, pool: concurrent.futures.Executor
) -> concurrent.futures.Future:
    """Traces a tunable and leaves compiling it to a pool; what goes wrong is the future's error."""
    try:
        return pool.submit(_lowered(one, found).compile)
    except DeviceError:
        raise
    except Exception as e:  # such as more shared memory than there is
        failed: concurrent.futures.Future = concurrent.futures.Future()
        failed.set_exception(e)
        return failed


def _inputs(one: Tunable) -> Arrays:
    rng = np.random.default_rng(0)

    def normal(x: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal((2, *x.shape), np.float32)
        both = values[0] + 1j * values[1] if x.dtype.kind == 'c' else values[0]
        return jnp.asarray(both, x.dtype)

    return tuple(normal(x) for x in one.example)


def _seconds(run: Callable[..., Any], arrays: Arrays, calls: int, rounds: int) -> float:
    jax.block_until_ready(run(*arrays))
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            out = run(*arrays)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - started) / calls)
    return statistics.median(samples)


def _apart(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> float:
    """The largest distance |a - b| / |b| of two lists of arrays, in norm."""

    def distance(x: jax.Array, y: jax.Array) -> float:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        apart, size = (np.linalg.norm(np.asarray(z, wide).ravel()) for z in (x.astype(wide) - y, y))
        return float(apart / max(size, 1e-30))

    return max(distance(x, y) for x, y in zip(a, b, strict=True))


def measure(
    one: Tunable, compiling: Sequence[tuple[Sizes, Any]], calls: int, rounds: int
) -> dict[str, Any]:
    """Returns a table's entry.

    Args:
      one: kernel and shapes.
      compiling: (sizes, future of the compiled program), the rule's first.
      calls: calls of a round.
      rounds: rounds, whose median counts.

    Raises:
      DeviceError: the rule's own sizes do not run.
    """
    arrays, truth, times = _inputs(one), None, []
    for found, future in compiling:
        try:
            run = future.result()
            out = run(*arrays)
            if truth is None:
                truth = out
            elif not (apart := _apart(out, truth)) < DISTANCE:
                print(f"  {dict(found)}: left out, its results are {apart:.1e} from the rule's")
                continue
            seconds = _seconds(run, arrays, calls, rounds)
        except Exception as e:
            words = (str(e).splitlines() or [''])[0][:120]
            if truth is None:
                raise DeviceError(f'{one.name}: its own sizes do not run: {words}') from e
            print(f'  {dict(found)}: left out, {type(e).__name__}: {words}')
            continue
        times.append((seconds, found))
        print(f'  {dict(found)}: {1e3 * seconds:.3f} ms', flush=True)
    rule, (best, found) = times[0], min(times, key=lambda pair: pair[0])
    if best > (1 - MARGIN) * rule[0]:
        best, found = rule
    return {
        'sizes': dict(found),
        'ms': round(1e3 * best, 4),
        'rule_ms': round(1e3 * rule[0], 4),
        'example': [f'{x.dtype.name}{list(x.shape)}' for x in one.example],
        'passes': 'forward and backward' if one.backward else 'forward',
        'jax': jax.__version__,
        'date': datetime.date.today().isoformat(),
    }


def tune(chosen: Sequence[Tunable], out: pathlib.Path, calls: int = 10, rounds: int = 5) -> None:
    """Measures kernels and adds what was found to a table; entries of others stay."""
    jobs: list[tuple[Tunable, list[tuple[Sizes, Any]]]] = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for one in chosen:
            order = [one.rule, *(found for found in one.sizes if found != one.rule)]
            jobs.append((one, [(found, _compiling(one, found, pool)) for found in order]))
    # All are compiled: the compiler tries things out on the device, which would disturb a timing.
    table = {'device': jax.devices()[0].device_kind, **read(out)}
    for one, compiling in jobs:
        print(one.name)
        entry = measure(one, compiling, calls, rounds)
        table['entries'] = {**table['entries'], one.name: entry}
        saved = entry['rule_ms'] / entry['ms']
        print(f'  -> {entry["sizes"]}, {saved:.2f} times the speed of its rule', flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f'.{out.name}.part')
        part.write_text(json.dumps(table, indent=1, sort_keys=True) + '\n')
        part.replace(out)  # whole or not at all


def main(argv: Sequence[str]) -> int:
    """The command."""
    device = jax.devices()[0]
    parser = argparse.ArgumentParser(prog='effjax.kernels.tune', description=__doc__)
    parser.add_argument('--kernels', nargs='+', help='only those whose name begins so')
    parser.add_argument('--out', type=pathlib.Path, help="a table; the device's own by default")
    args = parser.parse_args(argv)
    if device.platform not in ('gpu', 'tpu'):
        raise DeviceError(
            f'no kernel has sizes to tune on {device.platform}; run it on a GPU or TPU.'
        )
    all_of = tunables(f'pallas_{device.platform}')
    begin = tuple(args.kernels or ('',))
    chosen = [one for one in all_of if one.name.startswith(begin)]
    if not chosen:
        names = ', '.join(dict.fromkeys(one.kernel for one in all_of))
        raise DeviceError(f'no kernel begins with {" or ".join(begin)}; there are {names}.')
    out = args.out or file_of(device.device_kind)
    tune(chosen, out)
    print(f'written: {out}')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except EffjaxError as error:
        sys.exit(f'error: {error}')
