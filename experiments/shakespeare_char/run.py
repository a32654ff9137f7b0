"""nanoGPT's character model of tiny Shakespeare over several seeds: best and final validation loss.

    python -m experiments.shakespeare_char.run --path input.txt --seeds 0 1 2 --out runs/shakespeare

Each seed is a run of `configs/shakespeare_char.py` in a folder of its own under --out; the same
command goes on where it was interrupted and skips what is done. Prints, for each seed and in the
mean, the lowest loss of all evaluations and the last one, both over the whole validation split, and
the seconds of training. nanoGPT states 1.4697 nats a character for the lowest.
"""

import argparse
import json
import pathlib
import statistics

from effjax import train
from effjax.core.config import load

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'shakespeare_char.py'


def result(folder: pathlib.Path) -> dict:
    """Returns a finished run's lowest and last validation loss, and its seconds of training."""
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    losses = [(r['eval']['valid']['loss'], r['step']) for r in rows if 'eval' in r]
    summary = json.loads((folder / 'summary.json').read_text())
    low, step = min(losses)
    return {
        'min': low,
        'min_step': step,
        'final': losses[-1][0],
        'steps': losses[-1][1],
        'seconds': rows[-1]['seconds'],
        'device': summary['environment']['device'],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--path', required=True, help="tiny Shakespeare's input.txt")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/shakespeare'))
    parser.add_argument('--override', action='append', default=[], help='KEY=VALUE of the config')
    args = parser.parse_args()
    results = {}
    for seed in args.seeds:
        folder = args.out / f'seed_{seed}'
        overrides = [f'data.path={args.path}', f'seed={seed}', *args.override]
        done = train.run(load(str(CONFIG), overrides), folder)
        if done.stopped_by:
            print(f'stopped by {done.stopped_by}; the same command goes on')
            return
        results[seed] = result(folder)
        print(f'seed {seed}: {json.dumps(results[seed])}', flush=True)
    keys = ('min', 'final', 'seconds')
    means = {k: statistics.mean(r[k] for r in results.values()) for k in keys}
    print(f'mean of {len(results)}: {json.dumps(means)}')
    text = json.dumps({'seeds': results, 'mean': means}, indent=1) + '\n'
    (args.out / 'results.json').write_text(text)


if __name__ == '__main__':
    main()
