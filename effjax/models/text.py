"""What models of text share: an embedding, a body, and a head over the vocabulary."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops, total
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.core.registry import check_block
from effjax.layers.dropout import dropout as dropout_layer
from effjax.layers.embeddings import TokenEmbedding
from effjax.layers.linear import Projection, initializer
from effjax.layers.norms import NORMS
from effjax.layers.positions import POSITIONS, Learned, additive
from effjax.models import blocks
from effjax.models import body as bodies
from effjax.models import globals as beside
from effjax.models import memory as recurrent
from effjax.models.plan import plan_segments
from effjax.models.setup import Setup

RMSNORM = MappingProxyType({'kind': 'rmsnorm'})
ROPE = MappingProxyType({'kind': 'rope', 'base': 10000.0})

Tree = Any


class TextModel(nnx.Module):
    """An embedding, a body and a head; a subclass says whether it is causal.

    Args:
      setup: dtypes, execution and the run's sequence length.
      vocab_size: entries of the vocabulary; the trainer fills in the tokenizer's.
      width: model width D.
      layers: blocks; 0 where `segments` say it.
      mixer: block of config of the sequence mixer.
      ffn: block of config of the feed-forward part; None for blocks without one.
      norm: block of config of every norm.
      positions: dict(kind='rope', base=), 'learned', 'sinusoidal' or 'none'.
      block: how mixer and ffn are wired: see `models.blocks`.
      tied: the head is the embedding's transpose.
      soft_cap: bounds the logits by `cap * tanh(logits / cap)`; None leaves them.
      bias: projections carry a bias.
      dropout: rate on the embedding and on sub-block outputs.
      embed_dropout: rate on the embedding; None takes `dropout`.
      share: consecutive layers that use one copy of the parameters (ALBERT).
      segments: `dict(pattern=(dict(mixer=, ffn=, block=), ...), repeat=, share=)`; each block
        takes what it does not say from the arguments above. Empty: one block, `layers` times.
      final_norm: a norm before the head.
      max_len: longest sequence; 0 takes the run's.
      embed_width: width E of the embedding and the head, with a product [E, D] behind the one and
        [D, E] before the other (ALBERT, arXiv 1909.11942); 0 is D, without products.
      embed_scale: factor on the token embedding; 0 is sqrt(width) (arXiv 1706.03762).
      init: initialiser scheme, see `core.context`.
      memory: dict(tokens=, segment=, truncate=None) of a causal model cuts rows into segments that
        hand on tokens of memory, see `models.memory`; None: a row is one sequence.
      globals: dict(tokens=, every=None) of a model that looks both ways puts global tokens beside
        each row, see `models.globals`; None: it has none.

    Raises:
      ConfigError: values that do not fit together, naming the key.
    """

    causal: bool

    def __init__(
        self,
        setup: Setup,
        *,
        vocab_size: int = 0,
        width: int,
        layers: int = 0,
        mixer: Mapping,
        ffn: Mapping | None,
        norm: Mapping = RMSNORM,
        positions: Mapping = ROPE,
        block: str = 'sequential',
        tied: bool = True,
        soft_cap: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        embed_dropout: float | None = None,
        share: int = 1,
        segments: Sequence = (),
        final_norm: bool = True,
        max_len: int = 0,
        embed_width: int = 0,
        embed_scale: float = 1.0,
        init: str = 'gpt2',
        memory: Mapping | None = None,
        globals: Mapping | None = None,
        rngs: nnx.Rngs,
    ):
        first_rate = dropout if embed_dropout is None else embed_dropout
        rates = {'dropout': dropout, 'embed_dropout': first_rate}
        _check(vocab_size, width, embed_width, rates, soft_cap)
        _check_lengths(max_len, setup.seq_len)
        check_block(POSITIONS, positions, 'positions', 'config.model.positions')
        check_block(NORMS, norm, 'norm', 'config.model.norm')
        default = {'mixer': mixer, 'ffn': ffn, 'block': block}
        plan = plan_segments(segments, layers, share, default, setup.execution.attention)
        self.max_len = max_len or setup.seq_len
        if memory is not None:
            recurrent.check(memory, self.max_len)
        if globals is not None:
            beside.check(globals, self.max_len, self.causal, plan)
        ctx = Context(
            width=width,
            policy=setup.policy,
            causal=self.causal,
            depth=sum(s.depth for s in plan),
            max_len=self.max_len if memory is None else memory['segment'] + 2 * memory['tokens'],
            positions=dict(positions),
            norm=dict(norm),
            bias=bias,
            dropout=dropout,
            init=init,
            globals=0 if globals is None else globals['tokens'],
        )
        self.vocab_size, self.width, self.places = vocab_size, width, ctx.max_len
        self.tied, self.soft_cap, self.rate = tied, soft_cap, float(first_rate)
        self.embed_scale = float(embed_scale or width**0.5)
        self.policy = setup.policy
        self.embed_width = embed_width or width
        narrow = dataclasses.replace(ctx, width=self.embed_width)
        units = None if embed_width else 'embed'
        self.embedding = TokenEmbedding(
            narrow, vocab_size, units=units, rngs=branch(rngs, 'embedding')
        )
        self.embed_in = _product(ctx, embed_width, width, (None, 'embed'), branch(rngs, 'embed_in'))
        self.positions = additive(ctx, rngs=branch(rngs, 'positions'))
        self.memory = (
            None
            if memory is None
            else recurrent.RecurrentMemory(ctx, **memory, rngs=branch(rngs, 'memory'))
        )
        self.globals = (
            None
            if globals is None
            else beside.GlobalTokens(ctx, **globals, rngs=branch(rngs, 'globals'))
        )
        self.embed_out = _product(
            ctx, width, embed_width, ('embed', None), branch(rngs, 'embed_out')
        )
        self.head = None if tied else _make_head(narrow, vocab_size, units, branch(rngs, 'head'))
        self.body = bodies.Body(ctx, setup.execution, plan, rngs=branch(rngs, 'body'))
        self.norm = (
            blocks.make_part(NORMS, norm, 'config.model.norm', ctx, rngs=rngs)
            if final_norm
            else None
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations and of the head's product."""
        return self.policy.compute_dtype

    @property
    def norm_before_table(self) -> str | None:
        """Name of the norm whose output a tied table reads; None where nothing is tied to it."""
        return 'norm' if self.tied and self.embed_out is None and self.norm is not None else None

    def __call__(
        self, tokens_BT: jax.Array, info: SeqInfo
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """Returns (hidden [B, T, D] before the head's product, aux: name -> (sum, weight)).

        With `embed_width` E, hidden is [B, T, E].

        Args:
          tokens_BT: int32.
          info: positions and documents of the batch.

        Raises:
          ConfigError: more tokens a row than the model was built for.
        """
        hidden, _, aux = self._forward(tokens_BT, info, None, False)
        return hidden, bodies.metrics(aux)

    def head_weight(self) -> jax.Array:
        """Returns the head's weight [D, V] ([E, V] with `embed_width`) in the compute dtype."""
        if self.head is None:
            return self.embedding.head_weight()
        return self.policy.cast(self.head[...])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., V] of hidden [..., D]; training never holds them whole."""
        with jax.named_scope('head'):
            out = jnp.einsum(
                '...D,DV->...V', hidden, self.head_weight(), preferred_element_type=jnp.float32
            )
            return self.soft_cap * jnp.tanh(out / self.soft_cap) if self.soft_cap else out

    def cost(self, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the cost by part: 'embedding', each mixer's kind, 'ffn', 'norm', 'head'."""
        tokens, itemsize = batch * seq_len, self.compute_dtype.itemsize
        product = 0 if self.embed_in is None else self.width * self.embed_width
        positions = self.places * self.width if isinstance(self.positions, Learned) else 0
        # A look-up reads one row of each table.
        used = self.embed_width + product + (self.width if positions else 0)
        few = 0 if self.globals is None else self.globals.tokens
        out, rows = self.body.cost(batch, seq_len + few), seq_len
        remembered = self.width if few else 0
        if self.memory is not None:
            out = self.memory.cost(lambda length: self.body.cost(batch, length), seq_len)
            rows, remembered = self.memory.rows(seq_len), self.memory.tokens * self.width
        if self.norm is not None:
            out['norm'] += blocks.norm_cost(self.norm, self.width, batch * rows, itemsize)
        return {
            'embedding': Cost(
                matmul=2.0 * tokens * product,
                params=self.vocab_size * self.embed_width + product + positions + remembered,
                params_used=used + remembered,
                activation_bytes=batch * (rows + few) * self.width * itemsize,
                state_bytes=(4 + remembered * itemsize) * batch if self.causal else 0,
            ),
            **out,
            'head': self._head_cost(tokens),
        }

    def _head_cost(self, tokens: int) -> Cost:
        """Cost of the products behind the body for so many tokens."""
        table = self.vocab_size * self.embed_width
        product = 0 if self.embed_out is None else self.width * self.embed_width
        return Cost(
            matmul=matmul_flops(tokens, self.embed_width, self.vocab_size) + 2.0 * tokens * product,
            params=product + (0 if self.tied else table),
            params_used=table + product,
            activation_bytes=tokens * self.embed_width * self.compute_dtype.itemsize,
        )

    def param_count(self) -> int:
        """Returns the number of parameters."""
        return total(self.cost(1, 1).values()).params

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self._placed(self._scaled(tokens), positions)

    def _scaled(self, tokens: jax.Array) -> jax.Array:
        with jax.named_scope('embedding'):
            x = self._vectors(tokens)
            if self.embed_in is not None:
                x = self.embed_in(x)
            return x if self.embed_scale == 1.0 else x * self.embed_scale

    def _placed(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        with jax.named_scope('embedding'):
            return x if self.positions is None else x + self.positions(positions)

    def _vectors(self, tokens: jax.Array) -> jax.Array:
        """Returns the table's rows."""
        return self.embedding(tokens)

    def _forward(self, tokens_BT: jax.Array, info: SeqInfo, state: Tree, return_state: bool):
        chex.assert_rank(tokens_BT, 2)
        chex.assert_equal_shape([tokens_BT, info.positions])
        self._check_length(tokens_BT.shape[1])
        x_BTD = self._embed(tokens_BT, info.positions)
        x_BTD = dropout_layer(x_BTD, self.rate, info.fold(blocks.EMBEDDING))
        x_BTD, state, aux = self.body(x_BTD, info, state, return_state)
        return self._final(x_BTD), state, aux

    def _final(self, x: jax.Array) -> jax.Array:
        return self._narrowed(self._normed(x))

    def _normed(self, x: jax.Array) -> jax.Array:
        with jax.named_scope('norm'):
            return x if self.norm is None else self.norm(x)

    def _narrowed(self, x: jax.Array) -> jax.Array:
        with jax.named_scope('head'):
            return x if self.embed_out is None else self.embed_out(x)

    def _check_length(self, length: int) -> None:
        if length > self.max_len:
            raise ConfigError(
                f'a sequence of {length} tokens is longer than the {self.max_len} positions that '
                'the model was built for; raise config.model.max_len.'
            )


def _make_head(ctx: Context, vocab_size: int, units: str | None, rngs: nnx.Rngs) -> nnx.Param:
    init = initializer(ctx, ctx.width)
    shape = (ctx.width, vocab_size)
    value = init(rngs.params(), shape, ctx.policy.param_dtype)
    return param(value, ('embed', 'vocab'), role='product', inputs=(0,), units=(units, 'vocab'))


def _product(
    ctx: Context, inner: int, outer: int, axes: tuple[Any, ...], rngs: nnx.Rngs
) -> Projection | None:
    """A product between the width and a narrower embedding; None where there is none."""
    if not inner or not outer:
        return None
    init = initializer(ctx, inner)
    return Projection(ctx, '...a,ab->...b', (inner, outer), axes, bias=False, init=init, rngs=rngs)


def _check(
    vocab_size: int,
    width: int,
    embed_width: int,
    rates: Mapping[str, float],
    soft_cap: float | None,
) -> None:
    for key, value in (('vocab_size', vocab_size), ('width', width)):
        if value < 1:
            raise ConfigError(f'config.model.{key} must be at least 1, got {value}.')
    if embed_width < 0:
        raise ConfigError(f'config.model.embed_width must not be negative, got {embed_width}.')
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            raise ConfigError(f'config.model.{key} must be at least 0 and below 1, got {rate}.')
    if soft_cap is not None and soft_cap <= 0:
        raise ConfigError(f'config.model.soft_cap must be positive or None, got {soft_cap}.')


def _check_lengths(max_len: int, seq_len: int) -> None:
    if max_len and max_len < seq_len:
        raise ConfigError(
            f'config.seq_len {seq_len} is longer than the {max_len} positions of '
            'config.model.max_len; raise max_len, or set it to 0 to follow seq_len.'
        )
