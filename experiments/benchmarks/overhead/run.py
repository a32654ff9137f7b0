"""What the training loop costs beyond the step it runs: logging, ledger, progress, data, all on.

    python -m experiments.benchmarks.overhead.run [--steps 1000] [--width 384 --layers 6]

Trains a small model through `Trainer` and then calls the very same compiled step in a bare loop,
on batches that are on the device already, in one process. Prints both times a step, their ratio,
and the time that the host was busy in each step of the loop.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from effjax.core import config as config_lib
from effjax.training.loop import Trainer
from effjax.training.runtime import Runtime


def config_of(args: argparse.Namespace):
    """Returns the config: text of the standard library, bytes, no evaluations."""
    config = config_lib.defaults()
    config.update(name='overhead', steps=args.steps, batch_size=args.batch, seq_len=args.length)
    config.data = {'kind': 'stdlib', 'tokenizer': {'kind': 'byte'}, 'packing': 'stream'}
    config.model = {
        'kind': 'decoder',
        'width': args.width,
        'layers': args.layers,
        'mixer': {'kind': 'attention', 'heads': max(1, args.width // 64)},
        'ffn': {'kind': 'gelu'},
    }
    return config_lib.finish(config)


class Measured(Trainer):
    """A trainer that notes when each step ended and how long the host waited for it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ended: list[float] = []
        self.waited: list[float] = []

    def _fetch(self, flight) -> np.ndarray:
        started = time.perf_counter()
        out = super()._fetch(flight)
        self.ended.append(time.perf_counter())
        self.waited.append(self.ended[-1] - started)
        return out


def bare(compiled, state, batches, steps: int) -> float:
    """Returns seconds a step of the compiled step alone, one step in flight as in the loop."""
    ended, last = [], None
    for i in range(steps):
        state, vector = compiled(state, batches[i % len(batches)], 1e-4, 0)
        if last is not None:
            np.asarray(last)
            ended.append(time.perf_counter())
        last = vector
    return statistics.median(np.diff(ended))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--width', type=int, default=384)
    parser.add_argument('--layers', type=int, default=6)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--length', type=int, default=256)
    args = parser.parse_args()
    kept = {}
    compile_stage = Runtime.compile

    def compile_and_keep(self, stage, batch):
        kept['step'] = compile_stage(self, stage, batch)
        return kept['step']

    Runtime.compile = compile_and_keep
    with tempfile.TemporaryDirectory() as folder:
        trainer = Measured(config_of(args), pathlib.Path(folder))
        trainer.run()
    skip = min(50, args.steps // 4)
    spans = np.diff(trainer.ended)[skip:]
    loop, mean = float(np.median(spans)), float(np.mean(spans))
    host = float(np.median(spans - np.asarray(trainer.waited)[1:][skip:]))
    stage = trainer.runtime.stages[0]
    loader = trainer.runtime.loader(stage, None)
    batches = [next(loader)[0] for _ in range(16)]
    loader.close()
    bare(kept['step'], trainer.runtime.initial_state(), batches, skip)
    alone = bare(kept['step'], trainer.runtime.initial_state(), batches, args.steps - skip)
    result = {
        'device': jax.devices()[0].device_kind,
        'loop_ms': 1e3 * loop,
        'loop_mean_ms': 1e3 * mean,
        'bare_ms': 1e3 * alone,
        'overhead': loop / alone - 1,
        'host_busy_ms': 1e3 * host,
        'params': trainer.runtime.params,
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
