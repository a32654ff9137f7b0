"""ETC: a long text that sees what is near, and global tokens beside it that see all of it."""

import dataclasses
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import GrowthSpec, param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import Others, labelled_attention
from effjax.kernels.labelled_attention.cost import model_flops
from effjax.layers.linear import initializer
from effjax.layers.mixers.attention import Attention, State

# Labels of a long token with a global one: of another group, and of its own.
LABELS = 2


class ETC(Attention):
    """Attention in four pieces, by trained labels of pairs (Ainslie et al., arXiv 2004.08483).

    The model puts `ctx.globals` global tokens in front of a row's own, the long ones, and says by
    `info.groups` which long token belongs to which global one (`models.globals` does both). Long
    tokens see the long ones within `radius` (l2l) and all global ones (l2g); global tokens see all
    long ones (g2l) and each other (g2g); each kind of token has one softmax over its two pieces. A
    pair's score is `q_i (k_j + a_label)^T / sqrt(D)`, the label being the clipped distance in l2l
    and g2g, and in l2g and g2l whether the long token belongs to the global one. Nothing passes
    from one document to another. Order is known by these labels alone: positions of the model are
    not read here. Without global tokens it is attention within the radius, by distance.

    Args:
      ctx: the model's context, which must not be causal.
      heads: heads H.
      radius: how far a long token sees to either side.
      clip: the largest distance with a vector of its own, among long and among global tokens.
      g2l: 'all': a global token sees its document; 'group': the long tokens of its group only, the
        paper's hard g2l.
      l2l: 'all': a long token sees its document within the radius; 'group': of that its own group
        only, for groups without an order.
      shared: whether all pieces and both kinds of tokens have one set of projections, as a model
        that takes over a BERT's has; else both kinds have queries and outputs of their own and each
        piece keys and values, as in the paper's models.
      head_dim: dimensions of a head; None means width / heads.
      bias: whether projections carry a bias; None asks the model.
      attention_dropout: rate at which attention weights are dropped while training.
      implementation: of the attention kernel; None picks the best that can run.

    Raises:
      ConfigError: a causal model, or sizes that cannot be.
    """

    causal = False
    supports = frozenset({'packing', 'bidirectional', 'globals'})
    growth_spec = GrowthSpec(outputs=('out', 'global_out'))
    directed = True
    name = 'etc'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        radius: int = 84,
        clip: int = 12,
        g2l: Literal['all', 'group'] = 'all',
        l2l: Literal['all', 'group'] = 'all',
        shared: bool = False,
        head_dim: int | None = None,
        bias: bool | None = None,
        attention_dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check(ctx, radius, clip)
        super().__init__(
            dataclasses.replace(ctx, positions={'kind': 'none'}), heads=heads, head_dim=head_dim,
            bias=bias, attention_dropout=attention_dropout, implementation=implementation,
            rngs=rngs,
        )  # fmt: skip
        self.radius, self.clip, self.g2l, self.l2l = radius, clip, g2l, l2l
        self.globals, self.apart = ctx.globals, bool(ctx.globals and not shared)
        self.l2l_label = self._labels(ctx, 2 * clip + 1, branch(rngs, 'l2l_label'))
        if self.globals:
            self.g2g_label = self._labels(ctx, 2 * clip + 1, branch(rngs, 'g2g_label'))
            self.l2g_label = self._labels(ctx, LABELS, branch(rngs, 'l2g_label'))
            self.g2l_label = self._labels(ctx, LABELS, branch(rngs, 'g2l_label'))
        if self.apart:
            self.global_query = self._inward(ctx, 'heads', branch(rngs, 'global_query'))
            self.global_out: Any = self._outward(ctx, branch(rngs, 'global_out'))
            self.l2g_key = self._inward(ctx, 'kv_heads', branch(rngs, 'l2g_key'))
            self.l2g_value = self._inward(ctx, 'kv_heads', branch(rngs, 'l2g_value'))
            self.g2g_key = self._inward(ctx, 'kv_heads', branch(rngs, 'g2g_key'))
            self.g2g_value = self._inward(ctx, 'kv_heads', branch(rngs, 'g2g_value'))
            self.g2l_key = self._inward(ctx, 'kv_heads', branch(rngs, 'g2l_key'))
            self.g2l_value = self._inward(ctx, 'kv_heads', branch(rngs, 'g2l_value'))

    def _labels(self, ctx: Context, count: int, rngs: nnx.Rngs) -> nnx.Param:
        """A vector a head for each label, drawn as the weights of keys are."""
        shape = (count, self.heads, self.head_dim)
        draw = initializer(ctx, ctx.width)(rngs.params(), shape, ctx.policy.param_dtype)
        return param(draw, ('position', 'heads', 'head_dim'), no_decay=True)

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        info: SeqInfo,
        context: Any = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[jax.Array, State | None, dict[str, Any]]:
        """Returns (y [B, T, D], None, {}), global tokens in front; see `layers.mixers`.

        Raises:
          ConfigError: a context, a state, or global tokens without `info.groups`.
        """
        if context is not None:
            self._across(x_BTD, info, context, state, return_state)
        if state is not None or return_state:
            self._need_causal('decoding state')
        if info.groups is None and (self.globals or self.l2l == 'group'):
            raise ConfigError(
                'etc: no groups say which tokens belong together; set config.model.globals, or '
                "leave l2l at 'all'."
            )
        if self.globals:
            return self._both(x_BTD, info), None, {}
        q, k, v = self._project(x_BTD, info)
        ids = self._near_ids(info.segment_ids, info.groups)
        return self.out(self._attend(q, k, v, self.l2l_label, self.radius, info, ids)), None, {}

    def _both(self, x_BTD: jax.Array, info: SeqInfo) -> jax.Array:
        """Long and global tokens, each with the other as what they may read beside themselves."""
        few, groups = self.globals, info.groups
        assert groups is not None
        ids = jnp.ones(x_BTD.shape[:2], jnp.int32) if info.segment_ids is None else info.segment_ids
        groups = groups[:, few:]
        (global_q, q), piece = self._projected(x_BTD, info)
        l2g, g2l = self._pair_labels(ids, groups)
        cast = self.policy.cast
        o = self._attend(
            q, *piece['l2l'], self.l2l_label, self.radius, info,
            self._near_ids(ids[:, few:], groups),
            Others(*piece['l2g'], cast(self.l2g_label[...]), l2g),
        )  # fmt: skip
        global_o = self._attend(
            global_q, *piece['g2g'], self.g2g_label, None, info.fold(1), ids[:, :few],
            Others(*piece['g2l'], cast(self.g2l_label[...]), g2l),
        )  # fmt: skip
        if self.apart:
            return jnp.concatenate([self.global_out(global_o), self.out(o)], axis=1)
        return self.out(jnp.concatenate([global_o, o], axis=1))

    def _projected(
        self, x_BTD: jax.Array, info: SeqInfo
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
        """Queries of global and of long tokens; keys and values by piece."""
        few = self.globals
        if not self.apart:
            q, k, v = self._project(x_BTD, info)
            short, long = (k[:, :few], v[:, :few]), (k[:, few:], v[:, few:])
            own = (q[:, :few], q[:, few:])
            return own, {'l2l': long, 'g2l': long, 'l2g': short, 'g2g': short}
        x_short, x_long = x_BTD[:, :few], x_BTD[:, few:]
        return (self.global_query(x_short), self.query(x_long)), {
            'l2l': (self.key(x_long), self.value(x_long)),
            'l2g': (self.l2g_key(x_short), self.l2g_value(x_short)),
            'g2g': (self.g2g_key(x_short), self.g2g_value(x_short)),
            'g2l': (self.g2l_key(x_long), self.g2l_value(x_long)),
        }

    def _pair_labels(self, ids: jax.Array, groups: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Labels of long with global tokens [B, T, G], and the other way; -1 where unseen."""
        few = self.globals
        long, short = ids[:, few:, None], ids[:, None, :few]
        own = groups[:, :, None] == jnp.arange(few)
        l2g = jnp.where((long == short) & (long != 0), own.astype(jnp.int32), -1)
        g2l = jnp.where(own, l2g, -1) if self.g2l == 'group' else l2g
        return l2g, g2l.swapaxes(1, 2)

    def _near_ids(self, ids: jax.Array | None, groups: jax.Array | None) -> jax.Array | None:
        """What long tokens must have in common to see each other: a document, or also a group."""
        if self.l2l == 'all':
            return ids
        assert groups is not None
        if ids is None:
            ids = jnp.ones_like(groups)
        # Groups are numbered along the row; tokens without one are apart by document.
        return jnp.where(ids == 0, 0, jnp.where(groups >= 0, groups + 1, -ids))

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        table: nnx.Param,
        radius: int | None,
        info: SeqInfo,
        ids: jax.Array | None,
        others: Others | None = None,
    ) -> jax.Array:
        dropout = self.attention_dropout if info.train else 0.0
        return labelled_attention(
            q, k, v, self.policy.cast(table[...]), radius=radius, others=others, segment_ids=ids,
            dropout=dropout, rng=info.rng if dropout else None, implementation=self.implementation,
        )  # fmt: skip

    def _need_causal(self, what: str) -> NoReturn:
        raise ConfigError(
            f'etc looks in both directions and has no {what}: it needs the whole sequence at once; '
            'use a causal mixer to decode.'
        )

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass over `seq_len` tokens, of which the first are the global ones.

        Scores and values count the pairs within the radius and those with a global token, and each
        query counts its products with the labels that can occur.
        """
        tokens, inner = batch * seq_len, self.heads * self.head_dim
        few, vectors = min(self.globals, seq_len), 2 * self.clip + 1
        # Apart, a token has a query, an output, and keys and values for either kind of reader.
        each, sets = (6, 2) if self.apart else (4, 1)
        params = sets * (each * self.width * inner + self.with_bias * self._biases(each))
        params += vectors * inner
        if self.globals:
            params += (vectors + 2 * LABELS) * inner
        shape, item = (self.heads, self.head_dim), self.policy.compute_dtype.itemsize
        scored = model_flops(
            batch, seq_len - few, *shape, radius=self.radius, clip=self.clip, others=few,
            labels=LABELS,
        ) + model_flops(
            batch, few, *shape, radius=None, clip=self.clip, others=seq_len - few, labels=LABELS
        )  # fmt: skip
        return Cost(
            matmul=matmul_flops(tokens, self.width, each * inner) + scored,
            params=params,
            params_used=params,
            # The input, queries, keys, values and the output.
            activation_bytes=tokens * (self.width + each * inner) * item,
        )

    def _biases(self, each: int) -> int:
        return (each - 1) * self.heads * self.head_dim + self.width


def _check(ctx: Context, radius: int, clip: int) -> None:
    if ctx.causal:
        raise ConfigError(
            'etc looks in both directions, so that in a causal model a token would see what it has '
            'to predict; use it in an encoder, or a causal mixer such as longformer.'
        )
    for key, value in (('radius', radius), ('clip', clip)):
        if value < 0:
            raise ConfigError(f'etc: {key} must not be negative, got {value}.')
