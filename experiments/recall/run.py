"""MQAR by Zoology's protocol: which mixers recall, at which width, against the published cells.

    python -m experiments.recall.run --minutes 9          # goes on with the cells that are missing
    python -m experiments.recall.run --mixers hyena h3 --lengths 64 --widths 64 128
    python -m experiments.recall.run --report             # table, plot and page from the results

The four learning rates of a cell train as one compiled step, and an epoch is one call; a cell ends
early where a rate has passed 99 %. Each finished cell is a line of results/cells.jsonl, which is
never made again. With one process a GPU (CUDA_VISIBLE_DEVICES=0, 1, ...) the GPUs share the cells.
"""

import argparse
import collections
import concurrent.futures
import datetime
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from effjax.study.plan import code_version
from experiments.recall import page
from experiments.recall.cells import (
    ENOUGH,
    EPOCHS,
    LENGTHS,
    MIXERS,
    RATES,
    VARIANTS,
    WIDTHS,
    Cell,
    configs,
    order,
)
from experiments.recall.claims import Claims
from experiments.recall.train import Lanes

RESULTS = pathlib.Path(__file__).parent / 'results'
AHEAD = 2  # cells that are compiled while one trains


def run_cell(lanes: Lanes, cell: Cell, until: float = float('inf')) -> dict[str, Any] | None:
    """Trains a cell and returns its result, None where it would not end in time.

    Args:
      lanes: its runs, compiled.
      cell: mixer, length, width.
      until: seconds of `time.monotonic()`.
    """
    started = time.monotonic()
    found = lanes.run(until, ENOUGH)
    if found is None:
        return None
    rates = [f'{rate:.2e}' for rate in RATES]
    return {
        'mixer': cell.mixer,
        'length': cell.length,
        'width': cell.width,
        'accuracy': max(found.accuracy),
        'by_rate': dict(zip(rates, found.accuracy, strict=True)),
        'diverged': [r for r, bad in zip(rates, found.diverged, strict=True) if bad],
        'steps': found.epochs * lanes.steps,
        'of_steps': lanes.epochs * lanes.steps,
        'params': lanes.runtime.params,
        'state_bytes': lanes.state_bytes,
        'seconds': round(time.monotonic() - started, 1),
        'compile_seconds': round(lanes.compile_seconds, 1),
        'device': jax.devices()[0].device_kind,
        'jax': jax.__version__,
        'code': code_version(),
        'date': datetime.date.today().isoformat(),
    }


def sweep(cells: Sequence[Cell], file: pathlib.Path, until: float, **changes: Any) -> None:
    """Runs cells and appends each result to a file at once.

    While one trains, the next ones are compiled. Left out are cells that would not end in time,
    and those that another process on this machine is at.

    Args:
      cells: what is missing, in order.
      file: one JSON line a cell.
      until: seconds of `time.monotonic()`.
      **changes: see `cells.configs`.
    """
    epochs, claims = changes.get('epochs', EPOCHS), Claims(file.parent / 'claims')

    def prepare(cell: Cell) -> Lanes:
        return Lanes(configs(cell, **changes), epochs)

    def taken() -> Iterator[Cell]:
        for cell in cells:
            if claims.take(cell):
                if cell not in {key(row) for row in read(file)}:
                    yield cell
                else:
                    claims.release(cell)

    left, ahead = taken(), collections.deque[tuple[Cell, Any]]()
    with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        try:
            ahead.extend((c, pool.submit(prepare, c)) for c in itertools.islice(left, AHEAD))
            while ahead:
                lanes = ahead[0][1].result()
                if time.monotonic() > until:
                    print('time is up; the same command goes on', flush=True)
                    return
                ahead.extend((c, pool.submit(prepare, c)) for c in itertools.islice(left, 1))
                cell = ahead[0][0]
                keep(cell, run_cell(lanes, cell, until), file)
                del lanes
                claims.release(ahead.popleft()[0])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for cell, _ in ahead:
                claims.release(cell)


def keep(cell: Cell, row: Mapping[str, Any] | None, file: pathlib.Path) -> None:
    """Appends a cell's result to a file and says it; None is a cell without one."""
    if row is None:
        print(f'{cell}: left out, it would not end in time', flush=True)
        return
    with file.open('a') as f:
        f.write(json.dumps(row) + '\n')
    published = '' if cell.published is None else f' (published {cell.published:.2f})'
    print(f'{cell}: {row["accuracy"]:.3f}{published}, {row["seconds"]} s', flush=True)


def read(file: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the results so far; a line that a kill cut off is left out."""
    out = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def key(row: Mapping[str, Any]) -> Cell:
    """Returns the cell of a result."""
    return Cell(row['mixer'], row['length'], row['width'])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*MIXERS, *VARIANTS]
    parser.add_argument('--mixers', nargs='+', choices=names, default=list(MIXERS))
    parser.add_argument('--lengths', nargs='+', type=int, choices=list(LENGTHS), default=[*LENGTHS])
    parser.add_argument('--widths', nargs='+', type=int, choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument('--minutes', type=float, default=0.0, help='stop after this long; 0: never')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS, help='folder of results')
    parser.add_argument('--report', action='store_true', help='make the page from the results')
    args = parser.parse_args()
    file = args.results / 'cells.jsonl'
    if not args.report:
        args.results.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + 60 * args.minutes if args.minutes else float('inf')
        cells = order(args.mixers)
        sweep(
            [c for c in cells if c.length in args.lengths and c.width in args.widths], file, until
        )
    rows = read(file)
    if rows:
        print(page.write(rows, args.results))


if __name__ == '__main__':
    main()
