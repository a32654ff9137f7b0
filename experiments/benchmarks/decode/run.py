"""Decoding: tokens a second and bytes of state at several lengths of context, mixer by mixer.

    python -m experiments.benchmarks.decode.run --config configs/lm.py:124m \
        --mixers 'retnet,mamba2,attention' --contexts 1024 8192 65536

Each model is the config's decoder with another mixer in every layer, at its initial values. It
reads a context of random tokens in pieces, then writes tokens greedily under one `jit`; the time is
that of writing alone. Mixers take turns at each context. What does not fit is said and left out.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax import models
from effjax.core.config import as_dict, load
from effjax.core.cost import total
from effjax.core.trees import nbytes
from effjax.models import init_params, merge
from effjax.study.crossover import parse_mixers

WARM_UP = 1


class Decoding:
    """A model that has read its context, and the compiled loop that writes on.

    Args:
      config: the run's config, as plain dicts, with the mixer in place.
      context: tokens to read.
      batch: rows.
      steps: tokens to write in one call.
      piece: tokens read at once.
    """

    def __init__(self, config: Mapping[str, Any], context: int, batch: int, steps: int, piece: int):
        self.room = context + steps * (WARM_UP + 1)  # every call begins where the context ends
        model_config = {**config['model'], 'max_len': self.room, 'vocab_size': 256}
        seq_len = min(piece, self.room)
        # Reading is one layer in a loop, soon compiled; writing has all layers apart anyway.
        execution = {**config['execution'], 'layers': 'scan'}
        self.built = models.build(
            {**config, 'model': model_config, 'seq_len': seq_len, 'execution': execution}
        )
        self._starting = jax.jit(lambda: init_params(self.built, jax.random.key(0))).lower()
        arrays = self._starting.out_info
        self.batch, self.steps = batch, steps
        self._pieces = [min(piece, context - start) for start in range(0, context, piece)]
        graphdef = self.built.graphdef

        def read(arrays, tokens, state):
            return merge(graphdef, arrays).prefill(tokens, state)[1]

        def write(arrays, token, state):
            model = merge(graphdef, arrays)

            def one(carry, _):
                token, state = carry
                hidden, state = model.step(token, state)
                return (jnp.argmax(model.logits(hidden), -1).astype(jnp.int32), state), None

            start = (token, model.by_layer(state))
            return jax.lax.scan(one, start, None, length=steps)[0][0]

        state = jax.eval_shape(self._start)
        tokens = {n: jax.ShapeDtypeStruct((batch, n), jnp.int32) for n in set(self._pieces)}
        self._reading = {
            n: jax.jit(read, donate_argnums=2).lower(arrays, x, state) for n, x in tokens.items()
        }
        token = jax.ShapeDtypeStruct((batch,), jnp.int32)
        self._writing = jax.jit(write).lower(arrays, token, state)

    def compile(self) -> None:
        """Compiles what was traced; threads may do so for several models at once."""
        self._read = {n: lowered.compile() for n, lowered in self._reading.items()}
        self._write, self._init = self._writing.compile(), self._starting.compile()

    def read(self) -> None:
        """Makes parameters, reads the context, holds the state to its cost, writes to warm up."""
        arrays, state = self._init(), jax.jit(self._start)()
        for i, size in enumerate(self._pieces):
            tokens = jax.random.randint(jax.random.key(i), (self.batch, size), 0, 256)
            state = self._read[size](arrays, tokens, state)
        self.state_bytes = nbytes(state)
        charged = total(self.built.model.cost(self.batch, self.room).values()).state_bytes
        if self.state_bytes > charged:
            raise AssertionError(f'the state has {self.state_bytes} bytes, charged are {charged}')
        self._args = (arrays, jnp.zeros(self.batch, jnp.int32), state)
        for _ in range(WARM_UP):
            self.run()

    def _start(self) -> Any:
        arrays = self._starting.out_info  # no value of theirs is read
        return merge(self.built.graphdef, arrays).init_state(self.batch, self.room)

    def run(self) -> None:
        """Writes `steps` tokens a row, from the end of the context, and waits."""
        self._write(*self._args).block_until_ready()


Compiling = dict[str, tuple[Decoding, concurrent.futures.Future]]


def prepare(
    config: Mapping[str, Any],
    mixers: Mapping[str, dict[str, Any]],
    context: int,
    args: argparse.Namespace,
    pool: concurrent.futures.Executor,
) -> Compiling:
    """Traces every mixer's model at one context, and leaves compiling it to a pool."""
    out: Compiling = {}
    for label, block in mixers.items():
        changed = {**config, 'model': {**config['model'], 'mixer': block}}
        made = Decoding(changed, context, args.batch, args.steps, args.piece)
        out[label] = made, pool.submit(made.compile)
    return out


def measure(compiling: Compiling, context: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each mixer at one context."""
    open_, rows = {}, {}
    for label, (made, done) in compiling.items():
        rows[label] = {'mixer': label, 'context': context, 'batch': args.batch}
        try:
            done.result()
            made.read()
            open_[label] = made
            rows[label]['state_bytes'] = made.state_bytes // args.batch
        except jax.errors.JaxRuntimeError as e:
            if 'RESOURCE_EXHAUSTED' not in str(e):
                raise
            rows[label]['error'] = 'does not fit into memory'
    samples: dict[str, list[float]] = {label: [] for label in open_}
    for _ in range(args.rounds):
        for label, decoding in open_.items():
            started = time.perf_counter()
            decoding.run()
            samples[label].append(time.perf_counter() - started)
    for label, seconds in samples.items():
        middle = statistics.median(seconds)
        rows[label]['tokens_per_second'] = args.batch * args.steps / middle
        rows[label]['step_ms'] = 1e3 * middle / args.steps
    return list(rows.values())


def table(rows: Sequence[Mapping[str, Any]], against: str) -> str:
    """Returns the rows as Markdown, with each speed over that of one mixer."""
    base = {r['context']: r.get('tokens_per_second') for r in rows if r['mixer'] == against}
    out = [
        f'| context | mixer | tokens/s | of {against} | ms a step | state of a row, KiB |',
        '| ---: | --- | ---: | ---: | ---: | ---: |',
    ]
    for r in rows:
        if 'error' in r:
            out.append(f'| {r["context"]:,} | {r["mixer"]} | {r["error"]} | | | |')
            continue
        speed, other = r['tokens_per_second'], base.get(r['context'])
        share = f'{speed / other:.2f}x' if other else '-'
        out.append(
            f'| {r["context"]:,} | {r["mixer"]} | {speed:,.0f} | {share} | {r["step_ms"]:.3f} | '
            f'{r["state_bytes"] / 1024:,.1f} |'
        )
    return '\n'.join(out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='configs/lm.py:124m', help='FILE or FILE:VARIANT')
    parser.add_argument('--mixers', default='retnet,mamba,mamba2,gla,attention')
    parser.add_argument('--contexts', type=int, nargs='+', default=[1024, 8192, 65536])
    parser.add_argument('--against', default='attention', help='one of the mixers')
    parser.add_argument('--batch', type=int, default=8, help='rows')
    parser.add_argument('--steps', type=int, default=64, help='tokens written in one call')
    parser.add_argument('--rounds', type=int, default=5, help='timed calls of each')
    parser.add_argument(
        '--piece', type=int, default=2048, help='tokens of the context read at once'
    )
    parser.add_argument('--override', action='append', default=[], help='KEY=VALUE of the config')
    parser.add_argument('--out', type=pathlib.Path, help='a JSON file for the rows')
    args = parser.parse_args(argv)
    config = as_dict(load(args.config, args.override))
    mixers = parse_mixers(args.mixers, config['model']['mixer'])
    rows: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = {n: prepare(config, mixers, n, args, pool) for n in args.contexts}
    # All are compiled: the compiler tries things out on the device, which would disturb a timing.
    for context in args.contexts:
        rows += measure(ahead.pop(context), context, args)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rows, indent=1) + '\n')
    device = jax.devices()[0].device_kind
    print(f'{device}, jax {jax.__version__}, {args.config}, {args.batch} rows\n')
    print(table(rows, args.against))
    if jax.default_backend() == 'cpu':
        print('\nMeasured on a CPU: speeds do not carry over to an accelerator; bytes do.')


if __name__ == '__main__':
    main()
