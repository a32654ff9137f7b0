"""MQAR by Zoology's protocol: which mixers recall, at which width, against the published cells.

    python -m experiments.recall.run --minutes 9          # goes on with the cells that are missing
    python -m experiments.recall.run --mixers hyena h3 --lengths 64 --widths 64 128
    python -m experiments.recall.run --report             # table, plot and page from the results

The four learning rates of a cell train as one compiled step; a cell ends early where a rate has
passed 99 %. Each finished cell is a line of results/cells.jsonl, which is never made again.
"""

import argparse
import datetime
import json
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from effjax.core.cost import total
from effjax.study.plan import code_version
from effjax.training.batched import Group, check_batchable
from experiments.recall import page
from experiments.recall.cells import ENOUGH, LENGTHS, MIXERS, RATES, WIDTHS, Cell, configs, order

RESULTS = pathlib.Path(__file__).parent / 'results'


class Sweep(Group):
    """Lanes of one cell, which end together where one has learned the task or time is up.

    Args:
      cell_configs: the runs.
      workdirs: their folders.
      until: seconds of `time.monotonic()` at which to give up.
    """

    def __init__(self, cell_configs: Sequence[Any], workdirs: Sequence[pathlib.Path], until: float):
        super().__init__(cell_configs, workdirs)
        self.until = until
        self.late = False

    def accuracies(self) -> list[float]:
        """Returns each lane's last accuracy; 0 before the first."""
        return [lane.results.get('valid', {}).get('accuracy', 0.0) for lane in self.lanes]

    def _stopping(self) -> bool:
        self.late = self.late or time.monotonic() > self.until
        return super()._stopping() or self.late or max(self.accuracies()) > ENOUGH

    def _say(self, text: str) -> None:
        """Nothing: a line for every lane and epoch is too much."""


def run_cell(cell: Cell, until: float = float('inf'), **changes: Any) -> dict[str, Any] | None:
    """Trains a cell and returns its result, None where time or a signal ended it.

    Args:
      cell: mixer, length, width.
      until: seconds of `time.monotonic()`.
      **changes: see `cells.configs`.
    """
    made = configs(cell, **changes)
    check_batchable(made)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(made, [pathlib.Path(folder, str(i)) for i in range(len(made))], until)
        sweep.run()
    found = sweep.accuracies()
    if sweep.stopped_by or (sweep.late and max(found) <= ENOUGH):
        return None
    model = sweep.runtime.built.model
    return {
        'mixer': cell.mixer,
        'length': cell.length,
        'width': cell.width,
        'accuracy': max(found),
        'by_rate': {f'{rate:.2e}': value for rate, value in zip(RATES, found, strict=True)},
        'diverged': [f'{r:.2e}' for r, lane in zip(RATES, sweep.lanes, strict=True) if lane.error],
        'steps': max(lane.ledger.steps for lane in sweep.lanes),
        'of_steps': made[0].steps,
        'params': sweep.runtime.params,
        'state_bytes': total(model.cost(1, cell.length).values()).state_bytes,
        'seconds': round(time.monotonic() - started, 1),
        'device': jax.devices()[0].device_kind,
        'jax': jax.__version__,
        'code': code_version(),
        'date': datetime.date.today().isoformat(),
    }


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
    parser.add_argument('--mixers', nargs='+', choices=list(MIXERS), default=list(MIXERS))
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
        done = {key(row) for row in read(file)}
        wanted = [
            c
            for c in order()
            if c.mixer in args.mixers and c.length in args.lengths and c.width in args.widths
        ]
        for cell in wanted:
            if cell in done:
                continue
            row = run_cell(cell, until)
            if row is None:
                print('time is up, or a signal came; the same command goes on')
                break
            with file.open('a') as f:
                f.write(json.dumps(row) + '\n')
            published = '' if cell.published is None else f' (published {cell.published:.2f})'
            print(f'{cell}: {row["accuracy"]:.3f}{published}, {row["seconds"]} s', flush=True)
    rows = read(file)
    if rows:
        print(page.write(rows, args.results))


if __name__ == '__main__':
    main()
