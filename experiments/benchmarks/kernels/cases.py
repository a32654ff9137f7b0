"""What is timed: inputs, our implementations, and the least work that each case must do."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.kernels import (
    MaskSpec,
    attention,
    delta_rule,
    diagonal_scan,
    dplr,
    grouped_product,
    linear_recurrence,
    selective_scan,
    wkv,
)
from effjax.kernels.attention import mask
from effjax.kernels.attention.cost import attention_flops, pairs

Arrays = tuple[jax.Array, ...]
CHUNK = 64  # tokens of the chunks whose FLOPs a recurrence's floor counts


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
      op: operation, which says what peers take.
      shape: sizes, in words.
      make: `make(key) -> arrays`.
      run: `run(implementation, *arrays) -> output`.
      ours: implementations of ours that are timed; the others are held to the last one.
      flops: FLOPs of the forward and of the backward pass, by the algorithm.
      context: other facts that peers need.
    """

    op: str
    shape: str
    make: Callable[[jax.Array], Arrays]
    run: Callable[..., jax.Array]
    ours: tuple[str | None, ...]
    flops: tuple[float, float]
    context: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f'{self.op} {self.shape}'

    def bytes(self) -> tuple[int, int]:
        """Returns the fewest bytes of the forward pass, and of the backward pass.

        Inputs are read and outputs written once a pass; the backward pass reads the inputs and the
        output's gradient and writes a gradient of each input.
        """
        arrays = jax.eval_shape(self.make, jax.random.key(0))
        out = jax.eval_shape(functools.partial(self.run, 'xla'), *arrays)
        read, written = sum(map(_bytes, arrays)), _bytes(out)
        return read + written, 2 * read + written


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def recurrence(
    decay: str, b: int, t: int, h: int, k: int, v: int, *, groups: int | None = None
) -> Case:
    """A linear recurrence in bfloat16, [B, T, H, K] keys and [B, T, H, V] values.

    Args:
      decay: 'none', 'scalar', 'vector', or 'fixed': RetNet's, a constant a head.
      b, t, h, k, v: sizes.
      groups: query heads, if fewer than h.
    """
    g = groups or h

    def make(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 4)
        q, key_ = (_normal(x, (b, t, g, k)) * k**-0.5 for x in keys[:2])
        decays = {'scalar': (b, t, h), 'vector': (b, t, h, k)}
        arrays = (q, key_, _normal(keys[2], (b, t, h, v)))
        if decay not in decays:
            return arrays
        return (*arrays, -jax.nn.softplus(_normal(keys[3], decays[decay], jnp.float32) - 2))

    fixed = np.log1p(-(2.0 ** -(5.0 + np.arange(h)))).astype(np.float32)
    context = {'log_decay': fixed} if decay == 'fixed' else {}

    def run(implementation: str | None, *arrays: jax.Array) -> jax.Array:
        return linear_recurrence(*arrays, **context, implementation=implementation)

    state, tokens = k * v, float(b * t)
    within = h * v + g * k  # scores once a query head, values once a value head
    return Case(
        f'{decay} decay',
        f'{b},{t},{h},{k},{v}' + (f', {g} query heads' if groups else ''),
        make,
        run,
        (None, 'xla'),
        (
            tokens * (2 * CHUNK * within + 4 * h * state),
            tokens * (2 * CHUNK * (2 * h * v + 3 * g * k) + 8 * h * state),
        ),
        context,
    )


def delta(b: int, t: int, h: int, k: int, v: int) -> Case:
    """The gated delta rule in bfloat16, [B, T, H, K] keys of norm 1 and [B, T, H, V] values.

    Its floor counts the products of a chunk's queries and keys with its keys and values, those with
    the state, and one triangular solve a pass, for the columns of values: half a product. The
    backward pass forms the weights of pairs anew, and keeps what tokens wrote.
    """

    def make(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 5)
        key_ = _normal(keys[1], (b, t, h, k), jnp.float32)
        key_ = key_ / jnp.linalg.norm(key_, axis=-1, keepdims=True)
        return (
            _normal(keys[0], (b, t, h, k)) * k**-0.5,
            key_.astype(jnp.bfloat16),
            _normal(keys[2], (b, t, h, v)),
            jax.nn.sigmoid(_normal(keys[3], (b, t, h), jnp.float32)),
            -jax.nn.softplus(_normal(keys[4], (b, t, h), jnp.float32) - 3),
        )

    def run(implementation: str | None, *arrays: jax.Array) -> jax.Array:
        return delta_rule(*arrays, implementation=implementation)

    tokens, state = float(b * t * h), k * v
    return Case(
        'delta rule',
        f'{b},{t},{h},{k},{v}',
        make,
        run,
        (None, 'xla'),
        (
            tokens * (CHUNK * (4 * k + 3 * v) + 6 * state),
            tokens * (CHUNK * (12 * k + 7 * v) + 12 * state),
        ),
    )


def rank_one(b: int, t: int, h: int, k: int, v: int) -> Case:
    """RWKV-7's recurrence in bfloat16, [B, T, H, K] keys and [B, T, H, V] values.

    Its floor counts the four matrices of a chunk's pairs, their products with values and with what
    the transitions read, those with the state, and one triangular solve a pass, for the columns of
    values: half a product. The backward pass forms the weights of pairs anew.
    """

    def make(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 6)
        read = _normal(keys[3], (b, t, h, k), jnp.float32)
        read = read / jnp.linalg.norm(read, axis=-1, keepdims=True)
        rate = jax.nn.sigmoid(_normal(keys[4], (b, t, h, k), jnp.float32))
        return (
            _normal(keys[0], (b, t, h, k)) * k**-0.5,
            _normal(keys[1], (b, t, h, k)) * k**-0.5,
            _normal(keys[2], (b, t, h, v)),
            read.astype(jnp.bfloat16),
            (-read * rate).astype(jnp.bfloat16),
            -(
                np.float32(np.exp(-0.5))
                * jax.nn.sigmoid(_normal(keys[5], (b, t, h, k), jnp.float32))
            ),
        )

    def run(implementation: str | None, *arrays: jax.Array) -> jax.Array:
        return dplr(*arrays, implementation=implementation)

    tokens, state = float(b * t * h), k * v
    return Case(
        'diagonal and rank one',
        f'{b},{t},{h},{k},{v}',
        make,
        run,
        (None, 'xla'),
        (
            tokens * (CHUNK * (8 * k + 7 * v) + 8 * state),
            tokens * (CHUNK * (24 * k + 15 * v) + 16 * state),
        ),
    )


def scan(b: int, t: int, d: int) -> Case:
    """The elementwise recurrence in float32."""

    def make(key: jax.Array) -> Arrays:
        keys = jax.random.split(key)
        x, decay = (_normal(k, (b, t, d), jnp.float32) for k in keys)
        return x, -jax.nn.softplus(decay)

    def run(implementation: str | None, *arrays: jax.Array) -> jax.Array:
        return diagonal_scan(*arrays, implementation=implementation)

    size = float(b * t * d)
    return Case('diagonal scan', f'{b},{t},{d}', make, run, (None, 'xla'), (2 * size, 4 * size))


def mamba(b: int, t: int, d: int, n: int) -> Case:
    """Mamba's selective scan, inputs in bfloat16, steps in float32."""

    def make(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 4)
        u, (read, write) = _normal(keys[0], (b, t, d)), (_normal(k, (b, t, n)) for k in keys[1:3])
        dt = jax.nn.softplus(_normal(keys[3], (b, t, d), jnp.float32) - 4)
        a = -jnp.broadcast_to(jnp.arange(1, n + 1, dtype=jnp.float32), (d, n))
        return u, dt, a, write, read

    def run(implementation: str | None, *arrays: jax.Array) -> jax.Array:
        return selective_scan(*arrays, implementation=implementation)

    size = float(b * t * d * n)
    return Case(
        'selective scan', f'{b},{t},{d},{n}', make, run, (None, 'xla'), (6 * size, 15 * size)
    )


def softmax(b: int, t: int, h: int, d: int, *, window: int | None = None, first: int = 0) -> Case:
    """Causal attention in bfloat16, whole or over a window, with `first` tokens that all see."""
    spec = MaskSpec(True, window, global_tokens=first) if first else None

    def make(key: jax.Array) -> Arrays:
        return tuple(_normal(k, (b, t, h, d)) for k in jax.random.split(key, 3))

    def run(implementation: str | None, *arrays: jax.Array) -> jax.Array:
        if spec is not None:
            return attention(*arrays, mask=spec, implementation=implementation)
        return attention(*arrays, window=window, implementation=implementation)

    scored = pairs(t, window=window) if spec is None else mask.pairs(spec, t)
    flops = attention_flops(b, h, d, scored)
    more = f' and {first} global tokens' if first else ''
    return Case(
        'causal attention' if window is None else f'window {window}{more}',
        f'{b},{t},{h},{d}',
        make,
        run,
        ('pallas_gpu', 'xla' if first else 'cudnn'),
        (flops, 2.5 * flops),
        {'window': window},
    )


def average(b: int, t: int, d: int) -> Case:
    """RWKV-4's weighted average in float32."""

    def make(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 4)
        k, v = (_normal(x, (b, t, d), jnp.float32) for x in keys[:2])
        decay, bonus = (_normal(x, (d,), jnp.float32) for x in keys[2:])
        return k, v, -jnp.exp(decay), bonus

    def run(implementation: str | None, *arrays: jax.Array) -> jax.Array:
        return wkv(*arrays, implementation=implementation)

    size = float(b * t * d)
    return Case('wkv', f'{b},{t},{d}', make, run, (None, 'xla'), (8 * size, 16 * size))


def experts(rows: int, groups: int, k: int, n: int) -> Case:
    """Products of rows with their experts' matrices, in bfloat16; the experts are not alike."""
    rng = np.random.default_rng(groups)
    sizes = rng.multinomial(rows, rng.dirichlet(np.full(groups, 4.0)))

    def make(key: jax.Array) -> Arrays:
        keys = jax.random.split(key)
        return _normal(keys[0], (rows, k)), _normal(keys[1], (groups, k, n)) * k**-0.5

    def run(implementation: str | None, *arrays: jax.Array) -> jax.Array:
        return grouped_product(*arrays, sizes, implementation=implementation)

    flops, ours = 2.0 * rows * k * n, ('tokamax', 'pallas_gpu', 'xla')
    shape = f'{rows} rows, {groups} of {k},{n}'
    return Case('grouped product', shape, make, run, ours, (flops, 2 * flops))


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


CASES = (
    recurrence('none', 4, 8192, 16, 128, 128),
    recurrence('scalar', 4, 8192, 16, 128, 128),
    recurrence('scalar', 16, 2048, 16, 128, 128),
    recurrence('scalar', 1, 32768, 16, 128, 128),
    recurrence('scalar', 4, 8192, 32, 128, 64),
    recurrence('scalar', 8, 4096, 64, 128, 64, groups=1),
    recurrence('scalar', 8, 4096, 8, 256, 512),
    recurrence('fixed', 4, 8192, 16, 128, 128),
    recurrence('vector', 4, 8192, 16, 128, 128),
    delta(4, 8192, 16, 128, 128),
    rank_one(4, 8192, 16, 64, 64),
    rank_one(4, 8192, 16, 128, 128),
    scan(8, 4096, 2048),
    scan(8, 16384, 2048),
    mamba(8, 2048, 4096, 16),
    average(8, 4096, 2048),
    experts(32768, 8, 2048, 4096),
    experts(32768, 64, 2048, 1024),
    softmax(4, 8192, 16, 128),
    softmax(1, 32768, 16, 128),
    softmax(1, 32768, 16, 128, window=1024),
    softmax(1, 32768, 16, 128, window=512, first=128),
)
SMALL = (
    recurrence('scalar', 1, 64, 2, 16, 16),
    recurrence('fixed', 1, 64, 2, 16, 16),
    recurrence('vector', 1, 64, 2, 16, 16),
    delta(1, 64, 2, 16, 16),
    rank_one(1, 64, 2, 16, 16),
    scan(1, 64, 8),
    mamba(1, 64, 8, 4),
    average(1, 64, 8),
    experts(64, 3, 16, 8),
)
