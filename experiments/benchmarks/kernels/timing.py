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


def lower(f: Callable[..., jax.Array], arrays: Any) -> tuple[Any, Any]:
    """Traces f alone, and f with its gradients; returns both, ready to compile.

    Gradients are those of `sum(f * w)` with any w of the output's dtype, the first argument.

    Args:
      f: a function of arrays.
      arrays: their shapes and dtypes.
    """
    out = jax.eval_shape(f, *arrays)

    def both(weight: jax.Array, *arrays: jax.Array) -> Any:
        o, pull = jax.vjp(f, *arrays)
        return o, pull(weight)

    return jax.jit(f).lower(*arrays), jax.jit(both).lower(out, *arrays)


def times(
    forward: Any, both: Any, arrays: tuple[jax.Array, ...], calls: int, rounds: int
) -> tuple[jax.Array, tuple[jax.Array, ...], float, float]:
    """Returns output and gradients of a random w, and the seconds forward and forward + backward.

    Args:
      forward: f, compiled.
      both: f with its gradients, compiled; see `lower`.
      arrays: f's arguments.
      calls: calls of a round.
      rounds: rounds.
    """
    out = both.out_info[0]
    weight = jax.random.normal(jax.random.key(7), out.shape).astype(out.dtype)
    o, grads = both(weight, *arrays)
    first = median(lambda: forward(*arrays), jax.block_until_ready, calls, rounds)
    whole = median(lambda: both(weight, *arrays), jax.block_until_ready, calls, rounds)
    return o, grads, first, whole
