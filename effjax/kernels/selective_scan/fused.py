"""The selective scan as the Pallas kernels take it, skip included.

What a call lacks to whole blocks of a plan is filled up with zeros: steps of 0 neither decay nor
write. States lie as [N, D], channels side by side. Going forward one state a chunk is kept, those
of its tokens are computed again by the backward kernel. With g_t the gradient of h_t, b_t that of
dt_t u_t and p_t = a_t h_{t-1},

    g_t = C_t dy_t + a_{t+1} g_{t+1},    b_t = sum_n B_t g_t,    q_t = g_t p_t,
    du_t = b_t dt_t + D dy_t,    ddt_t = b_t u_t + sum_n A q_t,    dA = sum_t dt_t q_t,
    dB_t = sum_d g_t dt_t u_t,    dC_t = sum_d h_t dy_t.
"""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.selective_scan.plan import Plan


class Inputs(NamedTuple):
    """What moves through the kernels, in whole blocks.

    Attributes:
      u, dt: [B, T, D], float32 or bfloat16.
      A: [N, D], float32 as all that follows.
      B, C: [B, T, N].
      skip: [1, D].
      state: [B, N, D].
      keep: [B, T], 0 where a document begins, else 1; None where there is one document a row.
    """

    u: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    skip: jax.Array
    state: jax.Array
    keep: jax.Array | None


def refuse(u: Any, dt: Any, states: int, most: int) -> str | None:
    """Returns why no kernel takes u and dt [B, T, D] with so many states, or None."""
    for x in (u, dt):
        if x.dtype.name not in ('float32', 'bfloat16'):
            return f'it takes float32 or bfloat16, not {x.dtype.name}'
    if not u.size * states:
        return f'it takes no empty arrays, as {[*u.shape, states]}'
    if states > most:
        return f'it takes at most {most} states a channel, not {states}'
    return None


def run(
    kernels: str,
    plan: Plan,
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    state: jax.Array,
    fresh: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Runs kernels.

    Args:
      kernels: the module beside this one with `forward` and `backward`; Pallas takes long to
        import, so that it is not imported before.
      plan: how they cut up the call.
      u, dt, A, B, C, D, state: as of the public function; padding has zeros in u, dt, B and C.
      fresh: bool [B, T], where a document begins that is not the row's first.

    Returns:
      (y [B, T, D] in the dtype of u, the last state [B, D, N]).
    """
    (_, length, channels), states = u.shape, A.shape[1]
    tokens, lanes = -length % plan.size, -channels % plan.width
    more = plan.states - states

    def whole(x: jax.Array, *ends: int, value: int = 0) -> jax.Array:
        return jnp.pad(x, [(0, n) for n in ends], constant_values=value)

    B, C = (whole(x.astype(jnp.float32), 0, tokens, more) for x in (B, C))
    skip = jnp.zeros((channels,), jnp.float32) if D is None else D.astype(jnp.float32)
    keep = None if fresh is None else 1 - fresh.astype(jnp.float32)
    y, last = _scan(
        kernels,
        plan,
        Inputs(
            whole(u, 0, tokens, lanes),
            whole(dt, 0, tokens, lanes),
            whole(A.T, more, lanes),
            B,
            C,
            whole(skip[None], 0, lanes),
            whole(jnp.swapaxes(state, 1, 2), 0, more, lanes),
            keep if keep is None else whole(keep, 0, tokens, value=1),
        ),
    )
    return y[:, :length, :channels], jnp.swapaxes(last, 1, 2)[:, :channels, :states]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(kernels: str, plan: Plan, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, D], last state [B, N, D])."""
    y, last, _ = _module(kernels).forward(plan, inputs, save=False)
    return y, last


def _forward(kernels, plan, inputs):
    y, last, starts = _module(kernels).forward(plan, inputs, save=True)
    y = checkpoint_name(y, 'selective_scan_out')
    return (y, last), (inputs, checkpoint_name(starts, 'selective_scan_states'))


def _backward(kernels, plan, kept, gradients):
    inputs, starts = kept
    grads = _module(kernels).backward(plan, inputs, starts, *gradients)
    keep = None if inputs.keep is None else jnp.zeros_like(inputs.keep)
    return (Inputs(*grads, keep),)


_scan.defvjp(_forward, _backward)


def _module(name: str) -> Any:
    return importlib.import_module(f'effjax.kernels.selective_scan.{name}')
