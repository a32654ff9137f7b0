"""The encoder of text: a body that looks both ways, and a head for the tokens that were masked."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.layers.dropout import dropout as dropout_layer
from effjax.layers.ffn.dense import gelu
from effjax.layers.linear import Projection, initializer
from effjax.layers.norms import NORMS
from effjax.models import blocks
from effjax.models.setup import Setup
from effjax.models.text import TextModel

# The token id that stands for a masked token: it has a vector of its own outside the table, so
# that any tokenizer's vocabulary will do.
MASK = -1

LAYERNORM = MappingProxyType({'kind': 'layernorm', 'eps': 1e-12})
LEARNED = MappingProxyType({'kind': 'learned'})


class Encoder(TextModel):
    """A bidirectional model of text (BERT, Devlin et al., arXiv 1810.04805).

    The defaults are BERT's, without its token types and its next-sentence head. The head predicts
    the tokens that `tasks.masked_lm` hid: `logits(features(hidden))` of their places alone.

    Args:
      setup: dtypes, execution and the run's sequence length.
      vocab_size: entries of the vocabulary; the trainer fills in the tokenizer's.
      width: model width D.
      layers: blocks; 0 where `segments` say it.
      mixer: block of config of the sequence mixer, which must be able to look both ways.
      ffn: block of config of the feed-forward part; None for blocks without one.
      norm: block of config of every norm.
      positions: dict(kind='learned'), 'rope', 'sinusoidal' or 'none'.
      block: how mixer and ffn are wired: see `models.blocks`.
      tied: the head is the embedding's transpose.
      bias: projections carry a bias.
      dropout: rate on the embedding and on sub-block outputs.
      share: consecutive layers that use one copy of the parameters (ALBERT).
      segments: see `models.text.TextModel`.
      embed_norm: a norm on the embedding.
      final_norm: a norm behind the body, as pre-norm blocks want it.
      transform: a product, GELU and norm between the body and the head's product.
      max_len: longest sequence; 0 takes the run's.
      embed_width: width of the embedding and the head, see `models.text.TextModel`.
      globals: dict(tokens=, every=None), global tokens beside each row for the mixer 'etc', see
        `models.globals`; None: none.
      init: initialiser scheme, see `core.context`.

    Raises:
      ConfigError: values that do not fit together, naming the key.
    """

    causal = False

    def __init__(
        self,
        setup: Setup,
        *,
        vocab_size: int = 0,
        width: int,
        layers: int = 0,
        mixer: Mapping,
        ffn: Mapping | None,
        norm: Mapping = LAYERNORM,
        positions: Mapping = LEARNED,
        block: str = 'postnorm',
        tied: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        share: int = 1,
        segments: Sequence = (),
        embed_norm: bool = True,
        final_norm: bool = False,
        transform: bool = True,
        max_len: int = 0,
        embed_width: int = 0,
        init: str = 'gpt2',
        globals: Mapping | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            setup, vocab_size=vocab_size, width=width, layers=layers, mixer=mixer, ffn=ffn,
            norm=norm, positions=positions, block=block, tied=tied, bias=bias, dropout=dropout,
            share=share, segments=segments, final_norm=final_norm, max_len=max_len,
            embed_width=embed_width, init=init, globals=globals, rngs=rngs,
        )  # fmt: skip
        dtype = setup.policy.param_dtype
        ctx = Context(
            width=width, policy=setup.policy, causal=False, norm=dict(norm), bias=bias, init=init
        )
        narrow = (self.embed_width,)
        draw = initializer(ctx, self.embed_width)
        token = draw(branch(rngs, 'mask_token').params(), narrow, dtype)
        units = (None,) if embed_width else ('embed',)
        self.mask_token = param(token, ('embed',), role='table', units=units)
        zero = jnp.zeros(vocab_size, dtype)
        self.head_bias = param(zero, ('vocab',), no_decay=True, role='bias')
        self.embed_norm = _norm(ctx, rngs) if embed_norm else None
        self.transform = _transform(ctx, branch(rngs, 'transform')) if transform else None
        self.transform_norm = _norm(ctx, rngs) if transform else None

    def __call__(
        self, tokens_BT: jax.Array, info: SeqInfo
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """Returns (hidden [B, T, D], aux), of the row's own tokens; see `models.text.TextModel`."""
        hidden, aux = super().__call__(tokens_BT, info)
        return hidden, aux if self.globals is None else {**aux, **self.globals.metrics(info)}

    @property
    def norm_before_table(self) -> str | None:
        if self.transform_norm is None:
            return super().norm_before_table
        return 'transform_norm' if self.tied and self.embed_out is None else None

    def features(self, hidden: jax.Array) -> jax.Array:
        """Returns what the head's product reads, [..., E], of the body's output [..., D]."""
        with jax.named_scope('head'):
            if self.transform is not None and self.transform_norm is not None:
                hidden = self.transform_norm(gelu(self.transform(hidden)))
            return hidden if self.embed_out is None else self.embed_out(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., V] of the body's output [..., D]."""
        return super().logits(self.features(hidden)) + self.head_bias[...].astype(jnp.float32)

    def cost(self, batch: int, seq_len: int, predicted: int | None = None) -> dict[str, Cost]:
        """Returns the cost by part: 'embedding', each mixer's kind, 'ffn', 'norm', 'head'.

        Args:
          batch: rows.
          seq_len: tokens a row.
          predicted: tokens of a row whose logits are made; None is all of them.
        """
        out = super().cost(batch, seq_len)
        extra = self.embed_width  # the mask's vector
        itemsize = self.compute_dtype.itemsize
        out['embedding'] += Cost(params=extra, params_used=extra)
        if self.embed_norm is not None:
            rows = seq_len + (0 if self.globals is None else self.globals.tokens)
            out['norm'] += blocks.norm_cost(self.embed_norm, self.width, batch * rows, itemsize)
        out['head'] = self._head_cost(batch * (seq_len if predicted is None else predicted))
        return out

    def init_state(self, batch: int, max_len: int, dtype: Any = None) -> NoReturn:
        """Refuses: there is nothing to decode with.

        Raises:
          ConfigError: always.
        """
        del batch, max_len, dtype
        raise ConfigError(
            "config.model.kind 'encoder' generates no text: it looks both ways and needs the whole "
            "sequence at once; use a 'decoder' to generate."
        )

    def _forward(self, tokens_BT: jax.Array, info: SeqInfo, state: Any, return_state: bool):
        if self.globals is None:
            return super()._forward(tokens_BT, info, state, return_state)
        chex.assert_rank(tokens_BT, 2)
        chex.assert_equal_shape([tokens_BT, info.positions])
        self._check_length(tokens_BT.shape[1])
        first = self.globals.vector()
        first = first if self.embed_norm is None else self.embed_norm(first)
        x, beside = self.globals.join(first, self._embed(tokens_BT, info.positions), info)
        x = dropout_layer(x, self.rate, info.fold(blocks.EMBEDDING))
        x, _, aux = self.body(x, beside)
        return self._final(x[:, self.globals.tokens :]), None, aux

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = super()._embed(tokens, positions)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _vectors(self, tokens: jax.Array) -> jax.Array:
        hidden = (tokens == MASK)[..., None]
        token = self.policy.cast(self.mask_token[...])
        return jnp.where(hidden, token, self.embedding(jnp.maximum(tokens, 0)))

    def _final(self, x: jax.Array) -> jax.Array:
        with jax.named_scope('norm'):
            return x if self.norm is None else self.norm(x)

    def _head_cost(self, tokens: int) -> Cost:
        out = super()._head_cost(tokens) + Cost(params=self.vocab_size, params_used=self.vocab_size)
        if self.transform is None or self.transform_norm is None:
            return out
        size, itemsize = self.width, self.compute_dtype.itemsize
        params = size * size + (0 if self.transform.bias is None else size)
        return (
            out
            + Cost(
                matmul=matmul_flops(tokens, size, size),
                params=params,
                params_used=params,
                activation_bytes=2 * tokens * size * itemsize,
            )
            + blocks.norm_cost(self.transform_norm, size, tokens, itemsize)
        )


def _norm(ctx: Context, rngs: nnx.Rngs) -> Any:
    return blocks.make_part(NORMS, ctx.norm, 'config.model.norm', ctx, rngs=rngs)


def _transform(ctx: Context, rngs: nnx.Rngs) -> Projection:
    shape, axes = (ctx.width, ctx.width), ('embed', None)
    init = initializer(ctx, ctx.width)
    return Projection(
        ctx, '...d,de->...e', shape, axes,
        bias=ctx.bias, init=init, units=('embed', 'embed'), rngs=rngs,
    )  # fmt: skip
