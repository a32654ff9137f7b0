"""The recurrence as the Pallas kernels take it: channels side by side, complex numbers in planes.

A call is [B, T, D] in whole blocks of a plan: what is filled up decays by 1 and writes 0, which
changes no state. A real array is one plane, a complex one two. Real decays come as logarithms, and
the kernels take the exponential: outside it would go over memory once more. One kernel makes h, a
second, which goes the other way, all gradients: with c_t the gradient of h_{t-1} that comes through
token t,

    g_t = dh_t + c_{t+1},    c_t = a_t' g_t,    dx_t = g_t,    da_t = g_t h_{t-1}',

and c_t h_{t-1} the gradient of log a_t, 0 where a_t is. So h and the decays are all that is kept;
' is the complex conjugate, since gradients of planes are those of two real numbers.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.diagonal_scan.plan import BLOCKS, Plan
from effjax.kernels.sizes import tuned

Planes = tuple[jax.Array, ...]


def refuse(x: Any, wide: Any) -> str | None:
    """Returns why no kernel takes x [B, T, ...] with arithmetic in a dtype, or None."""
    takes = ('float32', 'bfloat16', 'complex64')
    if x.dtype.name not in takes or wide.name not in takes:
        return f'it takes float32, bfloat16 or complex64, not {x.dtype.name} in {wide.name}'
    if not x.size:
        return f'it takes no empty arrays, as {list(x.shape)}'
    return None


def longest(implementation: str, decay: Any) -> Plan:
    """Returns the longest blocks that an implementation cuts a call into."""
    rule = dataclasses.asdict(BLOCKS[implementation])
    return Plan(**tuned('diagonal_scan', f'decay={decay.dtype.name}', rule))


def scan(
    kernels: str, plan: Plan, decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Runs kernels.

    Args:
      kernels: the module beside this one with `forward` and `backward`; Pallas takes long to
        import, so that it is not imported before.
      plan: how they cut up the call.
      decay: [B, T, ...], complex64; or the logarithms of real ones, float32 or bfloat16.
      x: [B, T, ...], complex64 with complex decays, else float32 or bfloat16.
      state: [B, ...], complex64 or float32.
      reverse: from the last token to the first.

    Returns:
      (h [B, T, ...] in the dtype of x, the last state [B, ...] in that of the first).
    """
    batch, length = x.shape[:2]
    channels = state.size // batch
    fill = (0, -length % plan.size), (0, -channels % plan.width)

    def planes(a: jax.Array, value: int, *ends: tuple[int, int]) -> Planes:
        a = a.reshape(batch, -1, channels)
        a = jnp.pad(a, ((0, 0), *ends), constant_values=value)
        return (a.real, a.imag) if jnp.iscomplexobj(a) else (a,)

    out = _recurrence(
        kernels,
        plan,
        reverse,
        planes(decay, int(jnp.iscomplexobj(decay)), *fill),  # 1, or its logarithm
        planes(x, 0, *fill),
        planes(state, 0, (0, 0), fill[1]),
    )
    h, last = (a[0] if len(a) == 1 else jax.lax.complex(*a) for a in out)
    h, last = h[:, :length, :channels], last[:, :, :channels]
    return h.reshape(x.shape), last.reshape(state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _recurrence(
    kernels: str, plan: Plan, reverse: bool, decay: Planes, x: Planes, state: Planes
) -> tuple[Planes, Planes]:
    """(h, last state [B, 1, D]) of decays and x [B, T, D] and a state [B, 1, D]."""
    return _module(kernels).forward(plan, reverse, decay, x, state)


def _forward(kernels, plan, reverse, decay, x, state):
    h, last = _module(kernels).forward(plan, reverse, decay, x, state)
    h = tuple(checkpoint_name(a, 'diagonal_scan_out') for a in h)
    return (h, last), (decay, h, state)


def _backward(kernels, plan, reverse, kept, gradients):
    return _module(kernels).backward(plan, reverse, *kept, *gradients)


_recurrence.defvjp(_forward, _backward)


def _module(name: str) -> Any:
    return importlib.import_module(f'effjax.kernels.diagonal_scan.{name}')


def times(a: Planes, b: Planes) -> Planes:
    """The product of two numbers in planes."""
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def plus(a: Planes, b: Planes) -> Planes:
    """The sum of two numbers in planes."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def conjugate(a: Planes) -> Planes:
    """The conjugate of a number in planes."""
    return (a[0], *(-p for p in a[1:]))


def decays(a: Planes) -> Planes:
    """Decays in float32 from what a kernel reads: the logarithm where they are real."""
    return (jnp.exp(a[0]),) if len(a) == 1 else a


def decay_gradient(c: Planes, g: Planes, before: Planes) -> Planes:
    """The gradient of what `decays` takes; `before` is h of the token before."""
    return times(c if len(c) == 1 else g, conjugate(before))


def exponentials(x: Planes) -> int:
    """Exponentials that a kernel takes over planes [B, T, D]."""
    return x[0].size if len(x) == 1 else 0


def flops(x: Planes) -> int:
    """FLOPs of the recurrence over planes [B, T, D]."""
    return x[0].size * (2 if len(x) == 1 else 8)
