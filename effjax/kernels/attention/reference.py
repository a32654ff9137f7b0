"""The truth: dense attention in float32 (float64 for float64 inputs), all heads repeated."""

import jax
import jax.numpy as jnp

from effjax.kernels.attention.problem import Extras, Problem, allowed, often


def refuse(problem: Problem) -> str | None:
    """The reference runs anything but dropout."""
    return 'it has no dropout' if problem.dropout else None


def attend(
    problem: Problem, extras: Extras, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array
) -> jax.Array:
    """Returns attention's output [B, T, H, D] in the dtype of q."""
    _, q_len, kv_len, heads, kv_heads, _ = problem.shape
    wide = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    k_BSHD = jnp.repeat(k_BSGD.astype(wide), heads // kv_heads, axis=2)
    v_BSHD = jnp.repeat(v_BSGD.astype(wide), heads // kv_heads, axis=2)
    s_BHTS = jnp.einsum('bthd,bshd->bhts', q_BTHD.astype(wide), k_BSHD, precision='highest')
    s_BHTS = s_BHTS * problem.scale
    if problem.soft_cap is not None:
        s_BHTS = problem.soft_cap * jnp.tanh(s_BHTS / problem.soft_cap)
    places = (jnp.arange(q_len), jnp.arange(kv_len))
    bias = often(problem, extras, *places)
    if bias is not None:
        s_BHTS = s_BHTS + (bias[..., None, :, :] if bias.ndim == 3 else bias).astype(wide)
    mask = allowed(problem, extras, *places)
    if mask is None:
        mask = jnp.ones((q_len, kv_len), bool)
    mask = jnp.broadcast_to(mask[..., None, :, :] if mask.ndim == 3 else mask, s_BHTS.shape)
    # A finite value, so that a row without any key has finite gradients; its weights are set to 0.
    s_BHTS = jnp.where(mask, s_BHTS, -0.7 * jnp.finfo(wide).max)
    p_BHTS = jnp.where(mask, jax.nn.softmax(s_BHTS, axis=-1), 0)
    o_BTHD = jnp.einsum('bhts,bshd->bthd', p_BHTS, v_BSHD, precision='highest')
    if extras.q_segments is not None:
        o_BTHD = jnp.where((extras.q_segments != 0)[:, :, None, None], o_BTHD, 0)
    return o_BTHD.astype(q_BTHD.dtype)
