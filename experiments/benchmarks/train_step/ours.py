"""effjax's own training step on the shapes of this benchmark: what `effjax.train` compiles.

python -m experiments.benchmarks.train_step.ours --shape=374m --steps=10
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from effjax import models, parallel, precision
from effjax.core import config as config_lib
from effjax.core import trees
from effjax.tasks.next_token import NextToken
from effjax.training import optimizers, step
from effjax.training import state as state_lib
from effjax.training.compiled import compile_train
from experiments.benchmarks.train_step.shapes import BATCHES, CONV, RANK, SHAPES, STATE, Shape


def config_of(shape: Shape, *overrides: str) -> dict:
    """Returns the config of a shape: a decoder, AdamW, bf16 with fp32 master weights."""
    config = config_lib.defaults()
    config.steps = 1
    config.batch_size, config.seq_len = shape.batch, shape.length
    config.model = {
        'kind': 'decoder',
        'vocab_size': shape.vocab,
        'width': shape.width,
        'layers': shape.layers,
        'mixer': mixer_of(shape),
        'ffn': {'kind': 'swiglu', 'hidden': shape.hidden} if shape.hidden else None,
        'tied': False,
    }
    if shape.mixer != 'attention':  # these need no positions; RetNet turns queries and keys itself
        config.model.positions = {'kind': 'none'}
    config.optimizer = {'kind': 'adamw', 'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.1}
    config.clip_norm = 0.0  # the peers clip nothing
    return config_lib.as_dict(config_lib.finish(config, overrides))


def mixer_of(shape: Shape) -> dict:
    """Returns the mixer's block of a shape."""
    if shape.mixer == 'mamba2':
        return {'kind': 'mamba2', 'head_dim': shape.head_dim, 'state': STATE, 'conv': CONV}
    mixer = {'kind': shape.mixer, 'heads': shape.heads}
    if shape.mixer == 'attention':
        return mixer | {'head_dim': shape.head_dim}
    return mixer | ({'rank': RANK} if shape.mixer == 'gla' else {})


def compiled_step(shape: Shape, *overrides: str):
    """Returns (compiled step, state, batches, parameters)."""
    config = config_of(shape, *overrides)
    mesh = parallel.make_mesh(config['mesh'])
    built = models.build(config, mesh=mesh)
    kind = precision.build(config['precision'])
    optimizer = optimizers.build(config['optimizer'], meta=built.meta['params'])
    abstract = state_lib.abstract(built, optimizer, kind.loss_scale, False)
    shardings = state_lib.shardings(built, optimizer, abstract, mesh)
    init = state_lib.initialiser(built, optimizer, kind.loss_scale, False)
    state = parallel.init_sharded(init, shardings, jax.random.key(0))
    drawn = np.random.default_rng(1).integers(
        0, shape.vocab, (BATCHES, shape.batch, shape.length + 1), dtype=np.int32
    )
    positions = np.broadcast_to(np.arange(shape.length, dtype=np.int32), drawn[0, :, 1:].shape)
    batches = [
        parallel.put_batch(
            {
                'tokens': rows[:, :-1],
                'targets': rows[:, 1:],
                'positions': positions,
                'weights': np.ones(positions.shape, np.float32),
            },
            mesh,
        )
        for rows in drawn
    ]
    compiled = compile_train(
        step.make_train_step(
            built.graphdef, NextToken(config['execution']), optimizer, clip_norm=config['clip_norm']
        ),
        state=abstract,
        shardings=shardings,
        batch=batches[0],
        mesh=mesh,
        parts=built.model.cost(shape.batch, shape.length),
        units=(shape.batch, shape.tokens),
        optimizer_flops=optimizer.flops(abstract['params']),
        options=config['execution']['compiler_options'],
    )
    return compiled, state, batches, trees.count(abstract['params'])


def bench(shape: Shape, steps: int, rounds: int = 5, overrides: tuple[str, ...] = ()) -> dict:
    """Times the training step on random tokens; see `peers.plain_jax.bench`."""
    started = time.perf_counter()
    compiled, state, batches, params = compiled_step(shape, *overrides)
    compile_s = time.perf_counter() - started
    taken, lr = itertools.cycle(batches), jnp.float32(3e-4)
    seconds = []
    for r in range(rounds + 1):  # the first round warms up
        started = time.perf_counter()
        for _ in range(steps if r else min(steps, 3)):
            state, metrics = compiled(state, next(taken), lr, 0)
        metrics.block_until_ready()
        seconds.append((time.perf_counter() - started) / steps)
    memory = compiled.memory or {}
    stats = jax.devices()[0].memory_stats() or {}
    return {
        'tok_s': shape.tokens / statistics.median(seconds[1:]),
        'step_s': statistics.median(seconds[1:]),
        'rounds_s': seconds[1:],
        'compile_s': compile_s,
        'peak_bytes': memory.get('arguments', 0) + memory.get('temporary', 0),
        'device_peak_bytes': stats.get('peak_bytes_in_use'),
        'loss': float(dict(zip(compiled.names, np.asarray(metrics), strict=True))['loss']),
        'params': params,
        'model_tflops': compiled.cost.model_flops / statistics.median(seconds[1:]) / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', choices=SHAPES, default='374m')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--smoke', action='store_true', help='a tiny shape, for a CPU')
    parser.add_argument('--override', action='append', default=[], help='KEY=VALUE of the config')
    args = parser.parse_args()
    shape = SHAPES['smoke' if args.smoke else args.shape]
    result = bench(shape, args.steps, args.rounds, tuple(args.override))
    print(json.dumps({'program': 'effjax', 'shape': args.shape, **result}))


if __name__ == '__main__':
    main()
