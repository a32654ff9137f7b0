"""The truth: full logits in float32 (float64 for float64 inputs), automatic differentiation."""

import jax
import jax.numpy as jnp


def row_losses(
    x_ND: jax.Array,
    w_DV: jax.Array,
    targets_N: jax.Array,
    bias_V: jax.Array | None,
    *,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns, for each row, the negative log-likelihood, the log-sum-exp and whether it is right.

    Returns:
      nll [N], lse [N] in the wide dtype, correct [N] bool (the target's logit is the largest).
    """
    logits = _logits(x_ND, w_DV, bias_V, soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets_N[:, None], axis=-1)[:, 0]
    return lse - target, lse, target >= logits.max(-1)


def row_divergences(
    logits_NV: jax.Array, teachers_NV: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Returns each row's KL(softmax(teachers / temperature) || softmax(logits / temperature)) [N].

    Args:
      logits_NV: the student's.
      teachers_NV: the teacher's, which get no gradient.
      temperature: above 0; larger ones flatten both distributions.
    """
    wide = jnp.promote_types(logits_NV.dtype, jnp.float32)
    teachers_NV = jax.lax.stop_gradient(teachers_NV)
    log_p = jax.nn.log_softmax(logits_NV.astype(wide) / temperature, axis=-1)
    log_q = jax.nn.log_softmax(teachers_NV.astype(wide) / temperature, axis=-1)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def head_divergences(student, teacher, temperature: float) -> jax.Array:
    """Returns `row_divergences` of the logits of two heads (`op.Head`)."""
    return row_divergences(_logits(*student), _logits(*teacher), temperature)


def _logits(x_ND, w_DV, bias_V, soft_cap):
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    logits = jnp.matmul(x_ND.astype(wide), w_DV.astype(wide), precision='highest')
    if bias_V is not None:
        logits = logits + bias_V.astype(wide)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits
