"""Times of compiled programs on one device, and the ceilings that floors are stated over."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def median(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int, rounds: int) -> float:
    """Returns the median over rounds of the seconds of one call.

    Args:
      run: starts one call and returns what to wait for.
      wait: waits.
      calls: calls of a round, started one after another.
      rounds: rounds.
    """
    wait(run())
    wait(run())
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            out = run()
        wait(out)
        seconds.append((time.perf_counter() - started) / calls)
    return statistics.median(seconds)


def ceilings(calls: int, rounds: int, *, small: bool = False) -> tuple[float, float]:
    """Returns this device's bytes a second of a copy, and FLOP/s of a bfloat16 product.

    The copy is an elementwise operation on 1 GiB, counted read and written: the path that a kernel
    made by XLA has. The product is 8192^3, of random numbers.
    """
    count, side = (2**20, 256) if small else (2**29, 8192)
    x = jax.random.normal(jax.random.key(0), (count,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    moved = 4 * count / median(lambda: copy(x), jax.block_until_ready, calls, rounds)
    a = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    flops = 2 * side**3 / median(lambda: product(a, a), jax.block_until_ready, calls, rounds)
    return moved, flops


def jax_times(
    f: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], calls: int, rounds: int
) -> tuple[jax.Array, tuple[jax.Array, ...], float, float]:
    """Returns f's output and gradients, and its seconds forward and forward + backward.

    Gradients are those of `sum(f * w)` with a random w of the output's dtype.
    """
    shape = jax.eval_shape(f, *arrays)
    weight = jax.random.normal(jax.random.key(7), shape.shape).astype(shape.dtype)

    def both(weight: jax.Array, *arrays: jax.Array) -> Any:
        o, pull = jax.vjp(f, *arrays)
        return o, pull(weight)

    forward, backward = jax.jit(f), jax.jit(both)
    o, grads = backward(weight, *arrays)
    first = median(lambda: forward(*arrays), jax.block_until_ready, calls, rounds)
    whole = median(lambda: backward(weight, *arrays), jax.block_until_ready, calls, rounds)
    return o, grads, first, whole
