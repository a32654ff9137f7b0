"""What is checked: calls of every Hopper kernel with random inputs, and how far off each may be.

Each call has a shape for a GPU, and a small one for its sanitizer and for Pallas' interpreter.
Lengths are odd, so that last blocks are filled up. The bounds are of the relative distance
|a - b| / |b| from the same call in float32; `Check.why` says where each comes from.
"""

import dataclasses
from collections.abc import Callable, Mapping
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

Arrays = dict[str, Any]

LOOP = 1100  # longest rows that are held to the token loop: one of more would take seconds
HALF = 'bfloat16 rounds inputs of products, weights and results to 2^-9'
FLOW = 'the gradient of a log-decay sums up differences of rounded products'
STRONG = 'hardly anything is left of what flows through decays so strong (3 % was seen)'
SINGLE = 'float32 sums in another order'


@dataclasses.dataclass(frozen=True)
class Check:
    """One call.

    Attributes:
      name: in words.
      op: the public function.
      make: `make(key) -> (inputs with a gradient, the others)`, dicts of arrays by name.
      run: `run(implementation, inputs) -> outputs`, dicts likewise.
      truth: implementation that gives what is right, in float32.
      bound: largest relative error of outputs and gradients.
      why: where the bounds come from.
      looser: larger bounds by the name of an output, or 'd' and the name of an input.
      positive: gradients of outputs are, as inputs are then, so that sums do not cancel.
    """

    name: str
    op: str
    make: Callable[[jax.Array], tuple[Arrays, Arrays]]
    run: Callable[[str, Arrays], Arrays]
    truth: str
    bound: float
    why: str
    looser: Mapping[str, float] = dataclasses.field(default_factory=dict)
    positive: bool = False

    def limit(self, name: str) -> float:
        """Returns the largest relative error of an output or gradient."""
        return self.looser.get(name, self.bound)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _half(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def _uniform(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, shape, minval=low, maxval=high)


def documents(key: jax.Array, batch: int, length: int) -> jax.Array:
    """Returns ids int32 [B, T] of six documents a row, one of them beginning with a chunk of 64.

    Padding stands inside and at the end.
    """
    keys = jax.random.split(key, 2)
    cuts = jax.random.randint(keys[0], (batch, 5), 1, length).at[:, 0].set(length // 128 * 64)
    place = jnp.arange(length)
    ids = 1 + jnp.sum(place[None, :, None] >= cuts[:, None], axis=2, dtype=jnp.int32)
    begin = jax.random.randint(keys[1], (batch, 1), 0, length)
    padding = (place >= begin) & (place < begin + 1 + length // 16)
    return jnp.where(padding | (place >= length - length // 20), 0, ids)


def _extreme(key: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Every third token [B, T, ...] keeps all, nearly nothing, or nothing."""
    drawn = jax.random.choice(key, jnp.array([0.0, -50.0, -jnp.inf]), log_decay.shape[:2])
    drawn = drawn.reshape(*drawn.shape, *[1] * (log_decay.ndim - 2))
    third = jnp.arange(log_decay.shape[1]) % 3 == 0
    return jnp.where(third.reshape(1, -1, *[1] * (log_decay.ndim - 2)), drawn, log_decay)


def _with_state(op: Callable[..., Any]) -> Callable[[str, Arrays], Arrays]:
    """A run that returns outputs and the last state."""

    def run(implementation: str, inputs: Arrays) -> Arrays:
        o, state = op(**inputs, return_state=True, implementation=implementation)
        return {'o': o, 'state': state}

    return run


def _truth(length: int) -> str:
    return 'reference' if length <= LOOP else 'xla'


def recurrence(
    name: str,
    shape: tuple[int, int, int, int, int],
    decay: str | None,
    *,
    groups: int | None = None,
    bonus: bool = False,
    packed: bool = False,
    extreme: bool = False,
    trained: bool = True,
) -> Check:
    """A linear recurrence [B, T, H, K, V] in bfloat16 with an initial state.

    Args:
      name: of the check.
      shape: B, T, H, K, V.
      decay: 'head', 'scalar', 'vector' or None.
      groups: query heads, if fewer than H.
      bonus: with one.
      packed: with documents.
      extreme: with the strongest and weakest decays.
      trained: decays have a gradient.
    """
    b, t, h, k, v = shape
    sizes = {'head': (h,), 'scalar': (b, t, h), 'vector': (b, t, h, k)}
    # A head's gradient is a sum over all tokens: of both signs, rounding is all that may be left.
    positive = decay == 'head' and trained

    def make(key: jax.Array) -> tuple[Arrays, Arrays]:
        keys = jax.random.split(key, 8)
        q, key_ = (_half(_normal(x, (b, t, groups or h, k)) * k**-0.5) for x in keys[:2])
        inputs = {'q': q, 'k': key_, 'v': _half(_normal(keys[2], (b, t, h, v)))}
        inputs['initial_state'] = _normal(keys[3], (b, h, k, v))
        fixed: Arrays = {'segment_ids': documents(keys[4], b, t)} if packed else {}
        if bonus:
            inputs['bonus'] = _normal(keys[5], (h, k))
        if decay:
            log_decay = -jax.nn.softplus(_normal(keys[6], sizes[decay]) - 2)
            log_decay = _extreme(keys[7], log_decay) if extreme else log_decay
            (inputs if trained else fixed)['log_decay'] = log_decay
        if positive:
            inputs |= {n: jnp.abs(x) for n, x in inputs.items() if n != 'log_decay'}
        return inputs, fixed

    looser, why = {}, HALF
    if decay and trained:
        looser['dlog_decay'] = 0.04 if extreme else 0.02 if packed or bonus else 0.015
        why = f'{HALF}; {FLOW} (0.3 to 1.3 % was seen)'
    if extreme:
        why = f'{HALF}; {STRONG}'
    run = _with_state(linear_recurrence)
    bound = 0.02 if extreme else 0.01
    return Check(name, 'linear_recurrence', make, run, _truth(t), bound, why, looser, positive)


def delta(
    name: str,
    shape: tuple[int, int, int, int, int],
    *,
    gated: bool = False,
    packed: bool = False,
    extreme: bool = False,
    alike: bool = False,
) -> Check:
    """The delta rule [B, T, H, K, V] in bfloat16; `alike`: one key throughout."""
    b, t, h, k, v = shape

    def make(key: jax.Array) -> tuple[Arrays, Arrays]:
        keys = jax.random.split(key, 8)
        key_ = _normal(keys[1], (b, 1 if alike else t, h, k))
        key_ = key_ / jnp.linalg.norm(key_, axis=-1, keepdims=True)
        inputs = {
            'q': _half(_normal(keys[0], (b, t, h, k)) * k**-0.5),
            'k': _half(jnp.broadcast_to(key_, (b, t, h, k))),
            'v': _half(_normal(keys[2], (b, t, h, v))),
            'beta': _uniform(keys[3], (b, t, h), 0.05, 1.0 if alike else 1.9),
            'initial_state': _normal(keys[4], (b, h, k, v)),
        }
        if gated:
            log_decay = -jax.nn.softplus(_normal(keys[5], (b, t, h)) - 2)
            inputs['log_decay'] = _extreme(keys[6], log_decay) if extreme else log_decay
        return inputs, {'segment_ids': documents(keys[7], b, t)} if packed else {}

    looser = {'dbeta': 0.04 if alike else 0.02, 'dlog_decay': 0.06 if extreme else 0.03}
    why = f'{HALF}; {FLOW}; {STRONG}' if extreme else f'{HALF}; {FLOW}, that of beta too'
    if alike:
        why = f'{why}; each token takes away most of what the ones before wrote'
    bound = 0.02 if extreme or alike else 0.01
    run = _with_state(delta_rule)
    return Check(name, 'delta_rule', make, run, _truth(t), bound, why, looser)


def rank_one(
    name: str,
    shape: tuple[int, int, int, int, int],
    *,
    packed: bool = False,
    extreme: bool = False,
    alike: bool = False,
) -> Check:
    """RWKV-7's recurrence [B, T, H, K, V] in bfloat16; `alike`: one key throughout."""
    b, t, h, k, v = shape

    def make(key: jax.Array) -> tuple[Arrays, Arrays]:
        keys = jax.random.split(key, 9)
        read = _normal(keys[3], (b, 1 if alike else t, h, k))
        read = read / jnp.linalg.norm(read, axis=-1, keepdims=True)
        read = jnp.broadcast_to(read, (b, t, h, k))
        log_decay = -0.6 * jax.nn.sigmoid(_normal(keys[5], (b, t, h, k)))
        inputs = {
            'q': _half(_normal(keys[0], (b, t, h, k)) * k**-0.5),
            'k': _half(read if alike else _normal(keys[1], (b, t, h, k)) * k**-0.5),
            'v': _half(_normal(keys[2], (b, t, h, v))),
            'read': _half(read),
            'write': _half(-read * _uniform(keys[4], (b, t, h, k), 0.0, 1.0)),
            'log_decay': _extreme(keys[6], log_decay) if extreme else log_decay,
            'initial_state': _normal(keys[7], (b, h, k, v)),
        }
        return inputs, {'segment_ids': documents(keys[8], b, t)} if packed else {}

    looser = {'dlog_decay': 0.06 if extreme else 0.04 if alike else 0.03}
    why = f'{HALF}; {FLOW}; {STRONG}' if extreme else f'{HALF}; {FLOW}'
    if alike:
        why = f'{why}; each token takes away most of what the ones before wrote'
    bound = 0.02 if extreme or alike else 0.01
    run = _with_state(dplr)
    return Check(name, 'dplr', make, run, _truth(t), bound, why, looser)


def diagonal(
    name: str,
    shape: tuple[int, int, int],
    *,
    dtype: Any = jnp.float32,
    reverse: bool = False,
    packed: bool = False,
    extreme: bool = False,
) -> Check:
    """The elementwise recurrence [B, T, D]."""
    b, t, d = shape
    exact = dtype == jnp.float32 or jnp.issubdtype(dtype, jnp.complexfloating)

    def make(key: jax.Array) -> tuple[Arrays, Arrays]:
        keys = jax.random.split(key, 6)
        log_decay = -jax.nn.softplus(_normal(keys[1], shape) - 1)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            log_decay = jax.lax.complex(log_decay, _normal(keys[2], shape))
        inputs = {
            'x': _normal(keys[0], shape, dtype),
            'log_decay': _extreme(keys[3], log_decay) if extreme else log_decay,
            'initial_state': _normal(keys[4], (b, d), dtype if exact else jnp.float32),
        }
        return inputs, {'segment_ids': documents(keys[5], b, t)} if packed else {}

    run = _with_state(lambda **inputs: diagonal_scan(**inputs, reverse=reverse))
    bound, why = (2e-5, SINGLE) if exact else (5e-3, HALF)
    return Check(name, 'diagonal_scan', make, run, _truth(t), bound, why)


def mamba(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    dtype: Any = jnp.float32,
    packed: bool = False,
    extreme: bool = False,
) -> Check:
    """The selective scan [B, T, D, N]; steps are float32."""
    b, t, d, n = shape

    def make(key: jax.Array) -> tuple[Arrays, Arrays]:
        keys = jax.random.split(key, 8)
        u = _normal(keys[0], (b, t, d))
        dt = jax.nn.softplus(_normal(keys[1], (b, t, d)) - 2)
        if extreme:  # what a long step writes stays in bounds
            drawn = jax.random.choice(keys[7], jnp.array([0.0, 1e-6, 80.0]), (b, t, 1))
            step = jnp.where(jnp.arange(t)[:, None] % 3 == 0, drawn, dt)
            u, dt = u / jnp.maximum(step, 1.0), step
        inputs = {
            'u': u.astype(dtype),
            'dt': dt,
            'A': -jnp.exp(_normal(keys[2], (d, n))),
            'B': _normal(keys[3], (b, t, n), dtype),
            'C': _normal(keys[4], (b, t, n), dtype),
            'D': _normal(keys[5], (d,)),
            'initial_state': _normal(keys[6], (b, d, n)),
        }
        return inputs, {'segment_ids': documents(keys[7], b, t)} if packed else {}

    bound, why = 5e-3, HALF
    if dtype == jnp.float32:
        bound, why = 3e-4, f'{SINGLE}, over all channels, and fast exponentials (6e-5 was seen)'
    return Check(name, 'selective_scan', make, _with_state(selective_scan), _truth(t), bound, why)


def average(
    name: str, shape: tuple[int, int, int], *, packed: bool = False, extreme: bool = False
) -> Check:
    """RWKV-4's average [B, T, D] in float32; `extreme`: keys of hundreds and fast decays."""
    b, t, d = shape
    size = 100.0 if extreme else 1.0

    def make(key: jax.Array) -> tuple[Arrays, Arrays]:
        keys = jax.random.split(key, 8)
        decay = jnp.resize(jnp.array([-30.0, -3.0, -0.1, -1e-4, 0.0]), (d,))
        inputs = {
            'k': size * _normal(keys[0], (b, t, d)),
            'v': _normal(keys[1], (b, t, d)),
            'log_decay': decay if extreme else -jnp.exp(_normal(keys[2], (d,))),
            'bonus': _normal(keys[3], (d,)),
            'numerator': _normal(keys[4], (b, d)),
            'denominator': _uniform(keys[5], (b, d), 1.0, 2.0),
        }
        fixed = {'m': size * _normal(keys[6], (b, d))}
        if packed:
            fixed['segment_ids'] = documents(keys[7], b, t)
        return inputs, fixed

    def run(implementation: str, inputs: Arrays) -> Arrays:
        inputs = dict(inputs)
        state = tuple(inputs.pop(name) for name in ('numerator', 'denominator', 'm'))
        o, (numerator, denominator, m) = wkv(
            **inputs, initial_state=state, return_state=True, implementation=implementation
        )
        # Which m the sums go with is free, up to rounding.
        last = {'average': numerator / denominator, 'logarithm': m + jnp.log(denominator)}
        return {'o': o, **last}

    bound, why = 1e-4, SINGLE
    if extreme:
        bound, why = 2e-3, f'{SINGLE}; exponents of hundreds round by 1e-5'
    return Check(name, 'wkv', make, run, _truth(t), bound, why)


def experts(name: str, rows: int, groups: int, k: int, n: int, *, empty: bool = True) -> Check:
    """The grouped product in bfloat16: groups end at odd rows, one is empty, rows behind are NaN.

    Args:
      name: of the check.
      rows, groups, k, n: rows [M, K] and matrices [E, K, N].
      empty: else groups are whole blocks of 128 rows, none is empty, and no rows are behind.
    """

    def make(key: jax.Array) -> tuple[Arrays, Arrays]:
        keys = jax.random.split(key, 4)
        ends = jnp.arange(1, groups + 1) * (rows // groups)
        if empty:
            ends = jax.random.randint(keys[0], (groups,), 0, rows - rows // 16)
            ends = jnp.sort(ends // 2 * 2 + 1)
            ends = ends.at[1].set(ends[0])
        x = _normal(keys[1], (rows, k), jnp.bfloat16)
        x = jnp.where(jnp.arange(rows)[:, None] < ends[-1], x, jnp.nan)
        w = _half(_normal(keys[2], (groups, k, n)) * k**-0.5)
        sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
        return {'x_MK': x, 'w_EKN': w}, {'sizes_E': sizes}

    def run(implementation: str, inputs: Arrays) -> Arrays:
        return {'y': grouped_product(**inputs, implementation=implementation)}

    why = 'sums are float32, results are rounded once to bfloat16'
    return Check(name, 'grouped_product', make, run, 'reference', 4e-3, why)


def softmax(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    groups: int | None = None,
    keys: int | None = None,
    packed: bool = False,
    **call: Any,
) -> Check:
    """Attention [B, T, H, D] in bfloat16.

    Args:
      name: of the check.
      shape: B, T, H, D.
      groups: key-value heads, if fewer than H.
      keys: tokens of keys, if not T.
      packed: with documents.
      **call: what else `attention` takes.
    """
    b, t, h, d = shape

    def make(key: jax.Array) -> tuple[Arrays, Arrays]:
        split = jax.random.split(key, 4)
        sides = ((t, h), (keys or t, groups or h), (keys or t, groups or h))
        names = ('q_BTHD', 'k_BSGD', 'v_BSGD')
        inputs = {
            n: _normal(x, (b, *side, d), jnp.bfloat16)
            for n, x, side in zip(names, split[:3], sides, strict=True)
        }
        return inputs, {'segment_ids': documents(split[3], b, t)} if packed else {}

    def run(implementation: str, inputs: Arrays) -> Arrays:
        return {'o': attention(**inputs, **call, implementation=implementation)}

    return Check(name, 'attention', make, run, 'reference', 2.0**-7, HALF)


def checks(*, small: bool = False) -> tuple[Check, ...]:
    """Returns all checks; the first of each operation is the one that a sanitizer goes over."""

    def of(shape: tuple[int, ...], tiny: tuple[int, ...]) -> Any:
        return tiny if small else shape

    whole, odd = (4, 8192, 16, 128, 128), (2, 1003, 4, 128, 128)
    tiny, cut = (1, 70, 1, 64, 64), (1, 2048, 1, 64, 64)
    row, packed = (1, 130, 2, 64, 64), {'packed': True}
    steps, narrow, block = (2, 41, 5), (1, 21, 5, 4), (1, 200, 1, 64)
    globals_, both = MaskSpec(True, 100, global_tokens=3), MaskSpec(False, 90)
    complex_, half = {'dtype': jnp.complex64}, {'dtype': jnp.bfloat16}
    long = of((1, 8192, 4, 128, 64), cut)
    return (
        recurrence('scalar decay, documents', of(odd, row), 'scalar', groups=1, **packed),
        recurrence('scalar decay', of(whole, tiny), 'scalar'),
        recurrence('scalar decay, wide', of((1, 515, 2, 256, 512), tiny), 'scalar', **packed),
        recurrence('scalar decay, odd sides', of((2, 301, 3, 40, 72), tiny), 'scalar', **packed),
        recurrence('scalar decay, shared', of((2, 1003, 8, 128, 64), row), 'scalar', groups=1),
        recurrence('scalar decay, extreme', of(odd, tiny), 'scalar', extreme=True),
        recurrence('no decay', of(whole, tiny), None),
        recurrence('no decay, documents', of(odd, row), None, **packed),
        recurrence('head decay', of(odd, tiny), 'head'),
        recurrence('fixed decay', of(odd, tiny), 'head', trained=False),
        recurrence('fixed decay, documents', of(odd, row), 'scalar', trained=False, **packed),
        recurrence('stretches', of((1, 32768, 16, 128, 128), cut), 'scalar'),
        recurrence('stretches, documents', long, 'scalar', **packed),
        recurrence('stretches, head decay', long, 'head'),
        recurrence('stretches, no decay', long, None),
        recurrence('vector decay, documents', of(odd, row), 'vector', groups=1, **packed),
        recurrence('vector decay', of(whole, tiny), 'vector'),
        recurrence('vector decay, wide', of((1, 515, 2, 256, 256), tiny), 'vector', **packed),
        recurrence('vector decay, odd sides', of((2, 301, 3, 72, 40), tiny), 'vector'),
        recurrence('vector decay, extreme', of(odd, tiny), 'vector', extreme=True),
        recurrence('bonus', of((1, 1024, 8, 64, 64), tiny), 'vector', bonus=True),
        recurrence('bonus, documents', of(odd, row), 'vector', bonus=True, groups=2, **packed),
        recurrence('bonus, extreme', of(odd, tiny), 'vector', bonus=True, extreme=True),
        delta('gated delta rule, documents', of(odd, row), gated=True, **packed),
        delta('gated delta rule', of(whole, tiny), gated=True),
        delta('gated delta rule, wide', of((1, 515, 2, 256, 512), tiny), gated=True, **packed),
        delta('gated delta rule, odd sides', of((2, 301, 3, 40, 72), tiny), gated=True),
        delta('gated delta rule, extreme', of(odd, tiny), gated=True, extreme=True),
        delta('delta rule', of(odd, tiny)),
        delta('delta rule, documents', of(odd, row), **packed),
        delta('delta rule, one key', of(odd, tiny), alike=True),
        rank_one('diagonal and rank one, documents', of((2, 1003, 4, 64, 64), row), **packed),
        rank_one('diagonal and rank one', of((4, 8192, 16, 64, 64), tiny)),
        rank_one('diagonal and rank one, wide', of((1, 515, 2, 128, 256), tiny), **packed),
        rank_one('diagonal and rank one, odd sides', of((2, 301, 3, 40, 72), tiny)),
        rank_one('diagonal and rank one, extreme', of((2, 1003, 4, 64, 64), tiny), extreme=True),
        rank_one('diagonal and rank one, one key', of((2, 1003, 4, 64, 64), tiny), alike=True),
        diagonal('diagonal scan, documents', of((2, 1003, 300), steps), **packed),
        diagonal('diagonal scan', of((8, 4096, 2048), steps)),
        diagonal('diagonal scan, reverse', of((2, 1003, 300), steps), reverse=True, **packed),
        diagonal('diagonal scan, bfloat16', of((2, 1003, 300), steps), **half),
        diagonal('diagonal scan, extreme', of((2, 1003, 300), steps), extreme=True),
        diagonal('diagonal scan, complex', of((2, 1003, 300), steps), **complex_, **packed),
        diagonal(
            'diagonal scan, complex, reverse', of((2, 1003, 300), steps), **complex_, reverse=True
        ),
        mamba('selective scan, documents', of((2, 1003, 300, 16), narrow), **packed),
        mamba('selective scan', of((8, 2048, 4096, 16), narrow), **half),
        mamba('selective scan, more states', of((2, 515, 130, 19), narrow)),
        mamba('selective scan, extreme', of((2, 1003, 300, 16), narrow), extreme=True),
        average('wkv, documents', of((2, 1003, 300), steps), **packed),
        average('wkv', of((8, 4096, 2048), steps)),
        average('wkv, extreme', of((2, 1003, 300), steps), extreme=True),
        experts('grouped product, empty group', *of((1003, 5, 256, 384), (203, 4, 128, 128))),
        experts('grouped product, even', *of((1024, 4, 256, 256), (256, 2, 128, 128)), empty=False),
        experts('grouped product, many rows', *of((32765, 8, 2048, 4096), (203, 4, 128, 128))),
        experts('grouped product, many groups', *of((32763, 64, 2048, 1024), (331, 9, 128, 256))),
        softmax('attention, globals', of((2, 1003, 4, 128), block), mask=globals_, soft_cap=20.0),
        softmax('attention, causal', of((2, 2048, 8, 128), block)),
        softmax('attention, window', of((2, 1003, 4, 64), block), window=150),
        softmax('attention, shared keys', of((2, 1003, 8, 64), (1, 200, 2, 64)), groups=1),
        softmax('attention, documents', of((2, 1003, 4, 128), block), **packed),
        softmax(
            'attention, documents, both sides', of((2, 1003, 4, 64), block), mask=both, **packed
        ),
        softmax('attention, soft cap', of((2, 1003, 4, 128), block), soft_cap=2.0),
        softmax(
            'attention, other keys', of((2, 1003, 4, 128), block), keys=of((515,), (130,))[0],
            mask='full',
        ),
    )  # fmt: skip


def wide(arrays: Arrays) -> Arrays:
    """Returns float32 copies of bfloat16 arrays, as what is right is computed from.

    Log-decays are bounded, at numbers whose exponential is 0: the slope of an infinite one is none.
    """

    def copy(name: str, x: Any) -> Any:
        x = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
        bounded = name == 'log_decay' and not jnp.iscomplexobj(x)
        return jnp.maximum(x, np.float32(-1e4)) if bounded else x

    return {name: copy(name, x) for name, x in arrays.items()}
