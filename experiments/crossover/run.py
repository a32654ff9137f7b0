"""The crossover of every causal mixer against attention at width 2048, on one GPU.

    python -m experiments.crossover.run [--lengths 1024:65536] [--mixers 'retnet(heads=8),...']

Calls `effjax.crossover` with the mixers at the sizes their papers have at that width. The same
command goes on where it stopped; each length is measured for all mixers in turns.
"""

import argparse
import datetime
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from effjax import crossover
from effjax.core.command import run_command
from effjax.study import facts
from effjax.study.crossover import Point, crossing

HERE = pathlib.Path(__file__).parent
MIXERS = (
    'attention',
    'attention(heads=16,window=1024)',
    'retnet(heads=8)',
    'gla(heads=4)',
    'mamba2',
    'mamba',
    'rwkv7(heads=32)',
    'gated_deltanet(heads=8)',
    'deltanet(heads=16)',
    'linear_attention(heads=16)',
    'based(heads=16)',
    'rg_lru(heads=16)',
    'hyena',
    's4d',
)
# mixer -> method of the catalogue whose card says what was found
METHODS = {
    'window': 'sparse-attention', 'retnet': 'retnet', 'gla': 'gla', 'mamba2': 'mamba2',
    'mamba': 'mamba', 'rwkv7': 'rwkv7', 'gated_deltanet': 'gated-deltanet',
    'deltanet': 'deltanet', 'linear_attention': 'linear-attention', 'based': 'based',
    'rg_lru': 'rg-lru', 'hyena': 'hyena', 's4d': 's4d',
}  # fmt: skip


def lines(points: list[Point]) -> dict[str, str]:
    """Returns method -> from which length on it takes less time than attention, for its card."""
    out = {}
    for mixer in dict.fromkeys(p.mixer for p in points):
        method = METHODS.get('window' if 'window=' in mixer else mixer.split('(')[0])
        if method:
            words = crossing(points, mixer, 'attention')[1]
            ran = sorted({p.ran for p in points if p.mixer == mixer and p.ran})
            out[method] = f'`{mixer}` takes less time than attention {words} ({"; ".join(ran)})'
    return out


def write_facts(results: pathlib.Path, saved: Mapping[str, Any], date: str) -> None:
    """Writes what the cards say of the points of a crossover.json."""
    what = f'A layer of width {saved["conditions"]["width"]:,}, forward and backward'
    found = lines([Point(**p) for p in saved['points']])
    facts.write(results, what, saved['conditions']['device'], date, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--lengths', default='1024:65536')
    parser.add_argument('--mixers', default=','.join(MIXERS))
    parser.add_argument('--config', default='configs/lm.py:1p3b')
    parser.add_argument('--steps', default='20')
    parser.add_argument('--out', default=str(HERE / 'results'))
    args = parser.parse_args()
    argv = [f'--{key}={value}' for key, value in vars(args).items()]
    status = run_command(crossover.main, argv)
    if not status:
        out = pathlib.Path(args.out)
        saved = json.loads((out / 'crossover.json').read_text())
        write_facts(out, saved, datetime.date.today().isoformat())
    return status


if __name__ == '__main__':
    sys.exit(main())
