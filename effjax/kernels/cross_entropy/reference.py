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
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)
    logits = jnp.matmul(x_ND.astype(wide), w_DV.astype(wide), precision='highest')
    if bias_V is not None:
        logits = logits + bias_V.astype(wide)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets_N[:, None], axis=-1)[:, 0]
    return lse - target, lse, target >= logits.max(-1)
