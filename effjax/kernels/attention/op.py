"""The public function: checks the call, picks an implementation, runs it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.attention import cudnn, hopper, reference, splash, tokamax, xla
from effjax.kernels.attention.mask import MaskSpec
from effjax.kernels.attention.problem import Extras, Problem, check_ids, check_shapes

# What stands behind 'xla' runs by its name only: the Hopper kernels take 1.01 to 1.15 times cuDNN's
# time (experiments/benchmarks/kernels), and not all masks have been held to it on a GPU yet;
# tokamax has not been run on one here.
_IMPLEMENTATIONS = {
    'cudnn': cudnn, 'splash': splash, 'xla': xla, 'pallas_gpu': hopper, 'tokamax': tokamax,
    'reference': reference,
}  # fmt: skip


def attention(
    q_BTHD: jax.Array,
    k_BSGD: jax.Array,
    v_BSGD: jax.Array,
    *,
    mask: str | jax.Array | MaskSpec | Sequence[MaskSpec] = 'causal',
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
      mask: 'causal' (key j <= query i), 'full', a `MaskSpec`, or bool [T, S], True = may attend;
        a `MaskSpec` for each query head where they differ (the heads of one mask run together).
      window: with a causal mask, only i - window < j <= i.
      segment_ids: int32 [B, T], the document of each token; 0 is padding; an id does not come
        back in a row once another has followed it. None: one document a row.
      kv_segment_ids: int32 [B, S]; None means `segment_ids`.
      q_positions: int32 [B, T], places in order that replace the index in a causal mask; in a
        sparse one places in the document, which follow from `segment_ids` where they are not given,
        and step by one along the row where `kv_segment_ids` are not given.
      kv_positions: int32 [B, S]; given together with `q_positions`.
      scale: factor on the scores; None means 1 / sqrt(D).
      soft_cap: scores become cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118).
      dropout: rate at which attention weights are dropped; needs `rng`.
      rng: PRNG key for dropout.
      implementation: 'cudnn', 'splash', 'xla', 'pallas_gpu', 'tokamax' (effjax[tokamax]),
        'reference', or None for the best that can run.

    Returns:
      [B, T, H, D] in the dtype of q.

    Raises:
      ValueError: shapes that do not fit, a mask that cannot be, or an implementation that cannot
        run this call here.
    """
    if isinstance(mask, list | tuple):
        rest = {
            'window': window, 'segment_ids': segment_ids, 'kv_segment_ids': kv_segment_ids,
            'q_positions': q_positions, 'kv_positions': kv_positions, 'scale': scale,
            'soft_cap': soft_cap, 'dropout': dropout, 'rng': rng,
            'implementation': implementation,
        }  # fmt: skip
        return _by_head(q_BTHD, k_BSGD, v_BSGD, mask, rest)
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


def _by_head(
    q: jax.Array, k: jax.Array, v: jax.Array, masks: Sequence[MaskSpec], rest: dict[str, Any]
) -> jax.Array:
    """Attention with a mask for each query head: one call for each different mask."""
    heads, groups = q.shape[2], k.shape[2]
    if len(masks) != heads or heads % groups:
        raise ValueError(f'attention: {len(masks)} masks for {heads} heads; give one for each.')
    o = jnp.zeros_like(q)
    for n, mask in enumerate(dict.fromkeys(masks)):
        chosen = [h for h in range(heads) if masks[h] == mask]
        served = [h // (heads // groups) for h in chosen]
        key, value = (jnp.take(x, jnp.array(served), axis=2) for x in (k, v))
        if rest['rng'] is not None:
            rest = {**rest, 'rng': jax.random.fold_in(rest['rng'], n)}
        at = jnp.array(chosen)
        o = o.at[:, :, at].set(attention(q[:, :, at], key, value, mask=mask, **rest))
    return o


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
    if problem.spec is not None:
        facts['spec'] = problem.spec.words()
    if problem.window is not None:
        facts['window'] = problem.window
    return facts


def _problem(
    q, k, v, mask, window, segment_ids, kv_segment_ids, q_positions, kv_positions, scale,
    soft_cap, dropout, rng,
) -> tuple[Problem, Extras]:  # fmt: skip
    shape = check_shapes(q, k, v)
    batch, q_len, kv_len, *_, head_dim = shape
    spec = mask if isinstance(mask, MaskSpec) and not mask.plain else None
    if isinstance(mask, MaskSpec) and spec is None:
        window = mask.window if window is None else window
        mask = 'causal' if mask.causal else 'full'
    kind, array = ('sparse', None) if spec else _mask_kind(mask, q_len, kv_len)
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
    lengths = None
    if spec is not None and spec.branches and soft_cap is not None:
        raise ValueError('attention: a mask of branches takes no soft cap.')
    if spec is not None:
        q_positions, kv_positions, lengths = _places(
            spec, (q_len, kv_len), segment_ids if shared else None, q_positions, kv_positions
        )
    elif kind != 'causal':
        q_positions = kv_positions = None  # order matters to such a mask only
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
        spec=spec,
        packed=spec is not None and shared and q_positions is not None,
    )
    extras = Extras(segment_ids, kv_segment_ids, q_positions, kv_positions, array, lengths, rng)
    return problem, extras


def _places(
    spec: MaskSpec,
    lengths: tuple[int, int],
    ids: jax.Array | None,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Places of queries and keys in their documents, and lengths; None where indices serve."""
    ahead = spec.ahead
    if ids is not None and not spec.absolute:
        return None, None, None  # distances are the same in the row and in the document
    if ids is not None:
        if spec.table is not None:
            raise ValueError('attention: a mask with a table of blocks takes no documents.')
        same = jnp.concatenate([ids[:, :1] * 0, ids[:, 1:] - ids[:, :-1]], axis=1) == 0
        index = jnp.arange(ids.shape[1])
        first = jax.lax.cummax(jnp.where(same, 0, index), axis=1)
        ends = jnp.pad(~same[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        last = jax.lax.cummin(jnp.where(ends, index, ids.shape[1]), axis=1, reverse=True)
        if q_positions is None or kv_positions is None:
            q_positions = kv_positions = index - first
        return q_positions, kv_positions, last - first + 1 if ahead else None
    if q_positions is None and lengths[0] != lengths[1]:
        raise ValueError(
            f'attention: a sparse mask over {lengths[0]} queries and {lengths[1]} keys needs '
            'positions.'
        )
    if q_positions is not None and ahead:
        raise ValueError(
            'attention: last tokens, and random blocks ahead, need whole documents, without '
            'positions.'
        )
    return q_positions, kv_positions, None


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
