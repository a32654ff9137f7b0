"""Keeps what runs of configs/selective_copy.py found, for its page and the methods' cards.

python -m effjax.train --config=configs/selective_copy.py --workdir=runs/copy_mamba
python -m effjax.train --config=configs/selective_copy.py:s4d --workdir=runs/copy_s4d
python -m experiments.selective_copy.publish --runs mamba=runs/copy_mamba s4d=runs/copy_s4d
"""

import argparse
import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from effjax.study import facts
from effjax.training.files import write_json_atomic

RESULTS = pathlib.Path(__file__).parent / 'results'
METHODS = {'mamba': 'mamba', 's4d': 's4d'}  # variant of the config -> method of the catalogue


def read(variant: str, folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a finished run found.

    Raises:
      SystemExit: no such run, or one that has not ended.
    """
    file = folder / 'summary.json'
    if not file.exists():
        raise SystemExit(f'{file} does not exist: name the folder of a run of {variant}.')
    summary = json.loads(file.read_text())
    if not summary['complete']:
        raise SystemExit(f'the run in {folder} has not ended; the command that began it goes on.')
    return {
        'variant': variant,
        'accuracy': summary['eval']['valid']['accuracy'],
        'steps': summary['final_step'],
        'params': summary['params'],
        'device': summary['environment']['device'],
        'jax': summary['environment']['jax'],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', nargs='+', required=True, metavar='VARIANT=FOLDER')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    rows = []
    for run in args.runs:
        variant, equals, folder = run.partition('=')
        if variant not in METHODS or not equals:
            parser.error(f'{run!r} is not VARIANT=FOLDER with one of {", ".join(METHODS)}')
        rows.append(read(variant, pathlib.Path(folder)))
    args.results.mkdir(parents=True, exist_ok=True)
    write_json_atomic(args.results / 'results.json', rows)
    lines = {
        METHODS[row['variant']]: f'accuracy {row["accuracy"]:.4f} after {row["steps"]:,} steps'
        for row in rows
    }
    what = 'Selective copying of 16 tokens among 240 of noise'
    facts.write(args.results, what, rows[0]['device'], datetime.date.today().isoformat(), lines)


if __name__ == '__main__':
    main()
