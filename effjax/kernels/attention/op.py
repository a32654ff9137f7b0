"""The public function: checks the call, picks an implementation, runs it."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.attention import cudnn, reference, splash, xla
from effjax.kernels.attention.problem import Extras, MaskSpec, Problem, check_ids, check_shapes

_IMPLEMENTATIONS = {'cudnn': cudnn, 'splash': splash, 'xla': xla, 'reference': reference}


def attention(
    q_BTHD: jax.Array,
    k_BSGD: jax.Array,
    v_BSGD: jax.Array,
    *,
    mask: str | jax.Array | MaskSpec = 'causal',
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention (Vaswani et al., arXiv 1706.03762), multi-query and grouped too.

    Query head h reads key-value head h // (H / G). Softmax is float32 inside. A query that may
    see no key, and padding (segment 0), gives exactly 0 and finite gradients.

    Args:
      q_BTHD: queries [B, T, H, D].
      k_BSGD: keys [B, S, G, D]; H is a multiple of G (arXiv 1911.02150, 2305.13245).
      v_BSGD: values [B, S, G, D].
      mask: 'causal' (key j <= query i), 'full', a `MaskSpec`, or bool [T, S], True = may attend.
      window: with a causal mask, only i - window < j <= i.
      segment_ids: int32 [B, T], the document of each token; 0 is padding; an id does not come
        back in a row once another has followed it. None: one document a row.
      kv_segment_ids: int32 [B, S]; None means `segment_ids`.
      q_positions: int32 [B, T], places in order that replace the index in a causal mask.
      kv_positions: int32 [B, S]; given together with `q_positions`.
      scale: factor on the scores; None means 1 / sqrt(D).
      soft_cap: scores become cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118).
      dropout: rate at which attention weights are dropped; needs `rng`.
      rng: PRNG key for dropout.
      implementation: 'cudnn', 'splash', 'xla', 'reference', or None for the best that can run.

    Returns:
      [B, T, H, D] in the dtype of q.

    Raises:
      ValueError: shapes that do not fit, a mask that cannot be, or an implementation that cannot
        run this call here.
    """
    problem, extras = _problem(
        q_BTHD, k_BSGD, v_BSGD, mask, window, segment_ids, kv_segment_ids, q_positions,
        kv_positions, scale, soft_cap, dropout, rng,
    )  # fmt: skip
    refusals = {name: module.refuse(problem) for name, module in _IMPLEMENTATIONS.items()}
    forms = {
        name: module.form(problem)
        for name, module in (('cudnn', cudnn), ('xla', xla))
        if refusals[name] is None
    }
    chosen = choice.pick('attention', implementation, refusals, forms, **_facts(problem))
    run: Any = _IMPLEMENTATIONS[chosen]
    with jax.named_scope(f'attention_{chosen}'):
        return run.attend(problem, extras, q_BTHD, k_BSGD, v_BSGD)


def save_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """A rematerialisation policy that saves what attention's backward pass needs.

    For `jax.checkpoint(policy=...)`, alone or through `save_from_both_policies`. It saves the
    output and the log-sum-exp, those inside cuDNN's rule too, which carry no name: without them
    a rematerialised layer runs the whole attention forward again.
    """
    if primitive.name.startswith('dot_product_attention_fwd'):
        return True
    return primitive.name == 'name' and params['name'] in ('attention_out', 'attention_lse')


def _facts(problem: Problem) -> dict[str, Any]:
    facts: dict[str, Any] = {'shape': problem.shape, 'dtype': problem.dtype, 'mask': problem.mask}
    if problem.window is not None:
        facts['window'] = problem.window
    return facts


def _problem(
    q, k, v, mask, window, segment_ids, kv_segment_ids, q_positions, kv_positions, scale,
    soft_cap, dropout, rng,
) -> tuple[Problem, Extras]:  # fmt: skip
    shape = check_shapes(q, k, v)
    batch, q_len, kv_len, *_, head_dim = shape
    if isinstance(mask, MaskSpec):
        window = mask.window if window is None else window
        mask = 'causal' if mask.causal else 'full'
    kind, array = _mask_kind(mask, q_len, kv_len)
    if window is not None and (kind != 'causal' or window < 1):
        raise ValueError(f'attention: a window of {window} needs a causal mask and at least 1.')
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError('attention: kv_segment_ids needs segment_ids too.')
    shared = segment_ids is not None and kv_segment_ids is None
    if shared:
        kv_segment_ids = segment_ids
    if (q_positions is None) != (kv_positions is None):
        raise ValueError('attention: q_positions and kv_positions are given together or not.')
    if kind == 'causal' and q_len != kv_len and q_positions is None:
        raise ValueError(
            f'attention: a causal mask over {q_len} queries and {kv_len} keys needs positions.'
        )
    check_ids('segment_ids', segment_ids, (batch, q_len))
    check_ids('kv_segment_ids', kv_segment_ids, (batch, kv_len))
    check_ids('q_positions', q_positions, (batch, q_len))
    check_ids('kv_positions', kv_positions, (batch, kv_len))
    if kind != 'causal':
        q_positions = kv_positions = None  # order matters to a causal mask only
    if dropout and rng is None:
        raise ValueError('attention: dropout needs a PRNG key (rng).')
    problem = Problem(
        shape=shape,
        dtype=q.dtype.name,
        mask=kind,
        window=window,
        segments=segment_ids is not None,
        shared_segments=shared,
        positions=q_positions is not None,
        scale=head_dim**-0.5 if scale is None else float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        dropout=float(dropout),
    )
    extras = Extras(segment_ids, kv_segment_ids, q_positions, kv_positions, array, rng)
    return problem, extras


def _mask_kind(mask: Any, q_len: int, kv_len: int) -> tuple[str, jax.Array | None]:
    if isinstance(mask, str):
        if mask not in ('causal', 'full'):
            raise ValueError(
                f"attention: mask is 'causal', 'full', a MaskSpec or bool [T, S], not {mask!r}."
            )
        return mask, None
    mask = jnp.asarray(mask)
    if mask.shape != (q_len, kv_len) or mask.dtype != bool:
        raise ValueError(
            f'attention: a mask array is bool [{q_len}, {kv_len}], not {mask.dtype} {mask.shape}.'
        )
    return 'array', mask
