"""The crossover of every causal mixer against attention at width 2048, on one GPU.

    python -m experiments.crossover.run [--lengths 1024:65536] [--mixers 'retnet(heads=8),...']

Calls `effjax.crossover` with the mixers at the sizes their papers have at that width. The same
command goes on where it stopped; each length is measured for all mixers in turns.
"""

import argparse
import pathlib
import sys

from effjax import crossover
from effjax.core.command import run_command

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--lengths', default='1024:65536')
    parser.add_argument('--mixers', default=','.join(MIXERS))
    parser.add_argument('--config', default='configs/lm.py:1p3b')
    parser.add_argument('--steps', default='20')
    parser.add_argument('--out', default=str(HERE / 'results'))
    args = parser.parse_args()
    argv = [f'--{key}={value}' for key, value in vars(args).items()]
    return run_command(crossover.main, argv)


if __name__ == '__main__':
    sys.exit(main())
