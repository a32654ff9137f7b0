"""A training step in plain JAX: what a good program of one page reaches, in its best variant.

Layers unrolled with weights of their own, q, k, v in one product and gate, up in another, cuDNN
attention through `jax.nn.dot_product_attention`, bf16 products with fp32 master weights, AdamW
from optax, state donated. It knows no packing, no masks but the causal one, no sharding.

    python -m experiments.benchmarks.train_step.peers.plain_jax --shape=374m --steps=10
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks.train_step.shapes import BATCHES, SHAPES, Shape, having


def init(key: jax.Array, s: Shape) -> dict:
    """Returns fp32 parameters."""
    inner = s.heads * s.head_dim
    kernels = {
        'qkv': (s.width, 3 * inner),
        'out': (inner, s.width),
        'gate_up': (s.width, 2 * s.hidden),
        'down': (s.hidden, s.width),
    }

    def layer(key):
        keys = jax.random.split(key, len(kernels))
        drawn = {
            n: 0.02 * jax.random.normal(k, kernels[n]) for n, k in zip(kernels, keys, strict=True)
        }
        return drawn | {'norm_1': jnp.ones(s.width), 'norm_2': jnp.ones(s.width)}

    first, second, *rest = jax.random.split(key, s.layers + 2)
    return {
        'embedding': 0.02 * jax.random.normal(first, (s.vocab, s.width)),
        'head': 0.02 * jax.random.normal(second, (s.width, s.vocab)),
        'norm': jnp.ones(s.width),
        'layers': [layer(k) for k in rest],
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
    return (y * scale).astype(x.dtype)


def rotate(x_BTHD: jax.Array, base: float = 10000.0) -> jax.Array:
    length, dim = x_BTHD.shape[1], x_BTHD.shape[3]
    angle = jnp.arange(length)[:, None] * base ** (-jnp.arange(0, dim, 2) / dim)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHD.dtype)


def layer_forward(w: dict, x: jax.Array, s: Shape) -> jax.Array:
    bf16 = {n: v.astype(x.dtype) for n, v in w.items() if not n.startswith('norm')}
    qkv = (rms_norm(x, w['norm_1']) @ bf16['qkv']).reshape(*x.shape[:2], 3, s.heads, s.head_dim)
    q, k, v = rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]
    implementation = 'cudnn' if jax.default_backend() == 'gpu' else None
    o = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    x = x + o.reshape(*x.shape[:2], -1) @ bf16['out']
    gate, up = jnp.split(rms_norm(x, w['norm_2']) @ bf16['gate_up'], 2, axis=-1)
    return x + (jax.nn.silu(gate) * up) @ bf16['down']


def loss_fn(params: dict, tokens_BT: jax.Array, s: Shape) -> jax.Array:
    x = params['embedding'].astype(jnp.bfloat16)[tokens_BT[:, :-1]]
    for w in params['layers']:
        x = layer_forward(w, x, s)
    logits = rms_norm(x, params['norm']) @ params['head'].astype(x.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens_BT[:, 1:]
    )
    return losses.mean()


def bench(shape: Shape, steps: int, rounds: int = 5) -> dict:
    """Times the training step on random tokens; see `time_steps`."""
    params = jax.jit(init, static_argnums=1)(jax.random.key(0), shape)
    return time_steps(lambda p, tokens: loss_fn(p, tokens, shape), params, shape, steps, rounds)


def time_steps(loss: Callable, params: Any, shape: Shape, steps: int, rounds: int) -> dict:
    """Times AdamW steps on random tokens.

    Args:
      loss: the mean loss of (parameters, token ids int32 `[B, T + 1]`), a scalar.
      params: fp32 parameters, a pytree of arrays; they are donated.
      shape: model and batch.
      steps: steps a round; the device is waited for once a round.
      rounds: the result is their median.

    Returns:
      tok_s (tokens a second), step_s and rounds_s (seconds a step), compile_s, peak_bytes (the
      compiled program's arguments and temporaries), device_peak_bytes (as the allocator saw it in
      this process; None on a CPU), loss after the last step, params.
    """
    optimizer = optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1)

    def step(params, moments, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments = jax.jit(optimizer.init)(params)
    # More batches than it could learn by heart: products run faster on vanishing gradients.
    batches = jax.random.randint(
        jax.random.key(1), (BATCHES, shape.batch, shape.length + 1), 0, shape.vocab
    )
    taken = itertools.cycle(list(batches))
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, moments, batches[0]).compile()
    compile_s = time.perf_counter() - started
    seconds = []
    for r in range(rounds + 1):  # the first round warms up
        started = time.perf_counter()
        for _ in range(steps if r else min(steps, 3)):
            params, moments, value = compiled(params, moments, next(taken))
        value.block_until_ready()
        seconds.append((time.perf_counter() - started) / steps)
    memory = compiled.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    return {
        'tok_s': shape.tokens / statistics.median(seconds[1:]),
        'step_s': statistics.median(seconds[1:]),
        'rounds_s': seconds[1:],
        'compile_s': compile_s,
        'peak_bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        'device_peak_bytes': stats.get('peak_bytes_in_use'),
        'loss': float(value),
        'params': sum(p.size for p in jax.tree.leaves(params)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', choices=having('attention'), default='374m')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--smoke', action='store_true', help='a tiny shape, for a CPU')
    args = parser.parse_args()
    shape = SHAPES['smoke' if args.smoke else args.shape]
    print(
        json.dumps(
            {'program': 'plain_jax', 'shape': args.shape, **bench(shape, args.steps, args.rounds)}
        )
    )


if __name__ == '__main__':
    main()
