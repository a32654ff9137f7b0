"""What softmax attention over sparse masks shares: one mask for rows, documents and decoding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import GrowthSpec
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.kernels import MaskSpec, attention
from effjax.kernels.attention.mask import pairs
from effjax.layers.mixers import cache as kv
from effjax.layers.mixers.attention import Attention, State


class SparseAttention(Attention):
    """Attention whose mask is a `MaskSpec` a head, in places of a document.

    A subclass gives its `name`, sets what its masks need, and defines `mask`. Rows of one document
    gather blocks of keys, so that T x T is never formed; on a TPU one kernel visits the blocks that
    hold a pair, where a mask has one softmax. Rows of several gather too where masks
    are made of distances: windows, segments, strides, and at most 16 first tokens that are seen by
    all but, in a causal model, see nothing ahead. Where tokens are named by their place in a
    document (random blocks; tokens that see all; last tokens) they lie anywhere in a packed row, as
    many as it has documents, so that no plan of fixed size can name them: such rows are exact too,
    but over 1024 tokens their pairs of blocks are gone through one after another, at full
    attention's compute.

    Decoding keeps the document's global tokens and as many of the newest as a mask reaches back;
    the whole cache where it reaches back without end (random blocks, columns).
    """

    supports = frozenset({'packing', 'stepping', 'bidirectional'})
    growth_spec = GrowthSpec(outputs=('out',))  # heads may have masks of their own
    name: str

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        bias: bool | None = None,
        attention_dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            ctx, heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, bias=bias,
            attention_dropout=attention_dropout, implementation=implementation, rngs=rngs,
        )  # fmt: skip

    def mask(self) -> tuple[MaskSpec, ...]:
        """Returns the mask of each head."""
        raise NotImplementedError

    def _needs(self, least: int, **sizes: int) -> None:
        for what, size in sizes.items():
            if size < least:
                raise ConfigError(f'{self.name}: {what} must be at least {least}, got {size}.')

    def _scored(self, seq_len: int) -> float:
        return sum(pairs(mask, seq_len) for mask in self.mask()) / self.heads

    def _kept(self) -> tuple[int, int] | None:
        """First tokens of a document and newest ones that decoding needs; None: all tokens."""
        masks = self.mask()
        reaches = [mask.reach for mask in masks]
        if None in reaches:
            return None
        branches = [branch for mask in masks for branch in mask.branches or (mask,)]
        first = max(branch.global_tokens for branch in branches)
        return first, max(1, *(reach or 0 for reach in reaches))

    def _slots(self, max_len: int) -> int:
        kept = self._kept()
        return max_len if kept is None else min(max_len, sum(kept))

    def _layout(self, state: State) -> dict[str, Any]:
        """How the state's cache lies: as a ring, unless it has room for all tokens."""
        kept = self._kept()
        if kept is None or kv.size(state) < sum(kept):
            return {'ring': False}
        return {'ring': True, 'first': kept[0]}

    def _parallel(self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo) -> jax.Array:
        dropout = self.attention_dropout if info.train else 0.0
        mask = _one(self.mask())
        places = None if info.segment_ids is None else info.positions

        def kernel(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            ids: jax.Array | None,
            places: jax.Array | None,
            named: str | None,
        ) -> jax.Array:
            return attention(
                q,
                k,
                v,
                mask=mask,
                segment_ids=ids,
                q_positions=places,
                kv_positions=places,
                dropout=dropout,
                rng=info.rng if dropout else None,
                implementation=named,
            )

        alike = isinstance(mask, MaskSpec)
        return self._over_devices(kernel, (q, k, v), (info.segment_ids, places), by_head=alike)

    def _first_state(self, k: jax.Array, v: jax.Array, info: SeqInfo) -> State:
        state = self.init_state(k.shape[0], self.max_len, k.dtype)
        return kv.extend(state, k, v, info, **self._layout(state))

    def _continue(
        self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo, state: State
    ) -> tuple[jax.Array, State]:
        """New tokens attend to the cache and to each other, then enter the cache."""
        ids = kv.segments(state, info)
        number, old_ids = kv.slots(state, **self._layout(state))
        old = (old_ids, number - state['start'][:, None])
        key, value, kv_ids, place = (
            jnp.concatenate([a, b], axis=1)
            for a, b in zip(
                (*kv.contents(state, k.dtype), *old), (k, v, ids, info.positions), strict=True
            )
        )
        o = self._placed(q, key, value, (ids, info.positions), (kv_ids, place))
        return o, kv.extend(state, k, v, info, **self._layout(state))

    def _advance(
        self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo, state: State
    ) -> tuple[jax.Array, State]:
        """One token enters the cache, then attends to it."""
        state = kv.extend(state, k, v, info, **self._layout(state))
        key, value = kv.contents(state, q.dtype)
        number, ids = kv.slots(state, **self._layout(state))
        start = state['start'][:, None]
        now = (state['segment'][:, None], state['count'][:, None] - 1 - start)
        return self._placed(q, key, value, now, (ids, number - start)), state

    def _placed(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_place: tuple[jax.Array, jax.Array],
        kv_place: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        """Attention between (documents, places in them)."""
        return attention(
            q,
            k,
            v,
            mask=_one(self.mask()),
            segment_ids=q_place[0],
            kv_segment_ids=kv_place[0],
            q_positions=q_place[1],
            kv_positions=kv_place[1],
            implementation=self.implementation,
        )


def _one(masks: tuple[MaskSpec, ...]) -> Any:
    """One mask where all heads have the same, so that they run together."""
    return masks[0] if len(set(masks)) == 1 else masks
