"""Blocks: how a mixer and a feed-forward part are wired around the residual stream.

A block kind is one equation, its `wire`; calls, decoding steps, states, dropout and costs are the
same for all of them. `build` makes a block from a `BlockSpec`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.core.registry import arguments, check_block, lookup
from effjax.layers.dropout import dropout
from effjax.layers.ffn import FFNS
from effjax.layers.mixers import MIXERS
from effjax.layers.norms import NORMS
from effjax.parallel import constrain

BLOCKS = {
    'sequential': 'effjax.models.blocks:Sequential',
    'parallel': 'effjax.models.blocks:Parallel',
    'postnorm': 'effjax.models.blocks:PostNorm',
    'reversible': 'effjax.models.reversible:Reversible',
    'simplified': 'effjax.models.blocks:Simplified',
}

# Folded into the key of noise on the embedding; blocks fold their index.
EMBEDDING = 0x7FFFFFFF

Apply = Callable[[jax.Array], jax.Array]
Tree = Any
# The residual stream, or the streams of a block that has several.
Stream = Any


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One block of a period.

    Attributes:
      mixer: the sequence mixer's block of config.
      ffn: the feed-forward part's, or None for a block without one.
      block: the kind of wiring, from `BLOCKS`.
      path: where it stands in the config, for messages.
    """

    mixer: Mapping[str, Any]
    ffn: Mapping[str, Any] | None
    block: str = 'sequential'
    path: str = 'config.model'

    def check(self) -> Any:
        """Checks kinds and arguments; returns the mixer's class.

        Raises:
          ConfigError: unknown kind or argument, or a value of the wrong type.
        """
        mixer = check_block(MIXERS, self.mixer, 'mixer', f'{self.path}.mixer')
        if self.ffn is not None:
            check_block(FFNS, self.ffn, 'feed-forward part', f'{self.path}.ffn')
        lookup(BLOCKS, self.block, 'block', f'{self.path}.block')
        return mixer


def build(ctx: Context, spec: BlockSpec, *, rngs: nnx.Rngs) -> 'Block':
    """Returns one block.

    Raises:
      ConfigError: a part refused its arguments; the message says where they stand.
    """
    return lookup(BLOCKS, spec.block, 'block', spec.path)(ctx, spec, rngs=rngs)


def make_part(
    registry: Mapping[str, str], block: Mapping[str, Any], path: str, ctx: Context, **kw: Any
) -> Any:
    """Builds a registered part, turning what it refuses into an error that names the config key.

    Raises:
      ConfigError: the part refused its arguments.
    """
    component = lookup(registry, block['kind'], 'part', path)
    try:
        return component(ctx, **arguments(block), **kw)
    except ConfigError as e:
        raise ConfigError(_located(str(e), path)) from e


def placed(y_BTD: Stream, like: Stream) -> Stream:
    """Returns a block's output in the dtype of its input, laid out as the residual stream is."""

    def one(y: jax.Array, x: jax.Array) -> jax.Array:
        return constrain(y.astype(x.dtype), ('batch', 'sequence', 'embed'))

    return jax.tree.map(one, y_BTD, like)


def norm_cost(norm: nnx.Module, width: int, rows: int, itemsize: int) -> Cost:
    """Returns a norm's cost: its parameters and the input that the backward pass reads."""
    vectors = len(jax.tree.leaves(nnx.state(norm, nnx.Param)))
    return Cost(
        params=vectors * width,
        params_used=vectors * width,
        activation_bytes=rows * width * itemsize,
    )


def _located(message: str, path: str) -> str:
    """Returns a part's message with the place in the config in front, unless it names it."""
    return message if message.startswith('config.') else f'{path}: {message}'


class Block(nnx.Module):
    """A mixer and a feed-forward part; subclasses give `norms` and `wire`.

    Args:
      ctx: facts shared with the parts.
      spec: what it is made of.
    """

    norms: tuple[str, ...] = ()

    def __init__(self, ctx: Context, spec: BlockSpec, *, rngs: nnx.Rngs):
        mixer_rngs, ffn_rngs = branch(rngs, 'mixer'), branch(rngs, 'ffn')
        self.mixer = make_part(MIXERS, spec.mixer, f'{spec.path}.mixer', ctx, rngs=mixer_rngs)
        self.ffn: Any = (
            make_part(FFNS, spec.ffn, f'{spec.path}.ffn', ctx, rngs=ffn_rngs)
            if spec.ffn is not None
            else None
        )
        for name in self.norms:
            if self.ffn is not None or name != 'norm_ffn':
                path = 'config.model.norm'
                setattr(self, name, make_part(NORMS, ctx.norm, path, ctx, rngs=rngs))
        self.mixer_kind = str(spec.mixer['kind'])
        self.label = f'{spec.block}({self.mixer_kind}, {spec.ffn["kind"] if spec.ffn else None})'
        self.rate = float(ctx.dropout)
        self.width = ctx.width
        self.itemsize = ctx.policy.compute_dtype.itemsize

    def wire(self, x: Stream, mix: Apply, feed: Apply) -> Stream:
        """Returns the block's output for an input [..., D]; `feed` is None without an FFN."""
        raise NotImplementedError

    def __call__(
        self, x_BTD: Stream, *, info: SeqInfo, state: Tree = None, return_state: bool = False
    ) -> tuple[Stream, Tree, Tree]:
        """Returns (y [B, T, D], mixer state or None, aux by part)."""
        out: dict[str, Any] = {'state': None, 'aux': {}}

        def mix(h: jax.Array) -> jax.Array:
            y, out['state'], aux = self.mixed(h, info, state, return_state)
            if aux:
                out['aux']['mixer'] = aux
            return y

        def feed(h: jax.Array) -> jax.Array:
            y, aux = self.fed(h, info)
            if aux:
                out['aux']['ffn'] = aux
            return y

        y = placed(self.wire(x_BTD, mix, feed), x_BTD)
        return y, out['state'], out['aux']

    def mixed(
        self, h_BTD: jax.Array, info: SeqInfo, state: Tree = None, return_state: bool = False
    ) -> tuple[jax.Array, Tree, Tree]:
        """Returns the mixer's output behind dropout, its new state and its aux."""
        with jax.named_scope(self.mixer_kind):
            y, state, aux = self.mixer(
                h_BTD, info=info.fold(0), state=state, return_state=return_state
            )
        return dropout(y, self.rate, info.fold(1)), state, aux

    def fed(self, h_BTD: jax.Array, info: SeqInfo) -> tuple[jax.Array, Tree]:
        """Returns the feed-forward part's output behind dropout, and its aux."""
        with jax.named_scope('ffn'):
            y, aux = self.ffn(h_BTD, info=info.fold(2))
        return dropout(y, self.rate, info.fold(3)), aux

    def step(
        self, x_BD: Stream, state: Tree, *, reset: jax.Array | None = None
    ) -> tuple[Stream, Tree]:
        """Advances by one token; returns (y [B, D], state)."""
        out = {}
        info = SeqInfo.of(jax.tree.leaves(x_BD)[0].shape[0], 1)

        def mix(h: jax.Array) -> jax.Array:
            with jax.named_scope(self.mixer_kind):
                y, out['state'] = self.mixer.step(h, state, reset=reset)
            return y

        def feed(h: jax.Array) -> jax.Array:
            with jax.named_scope('ffn'):
                return self.ffn(h[:, None], info=info)[0][:, 0]

        y = self.wire(x_BD, mix, feed)
        return jax.tree.map(lambda y, x: y.astype(x.dtype), y, x_BD), out['state']

    def init_state(self, batch: int, max_len: int, dtype: Any) -> Tree:
        """Returns the mixer's decoding state."""
        return self.mixer.init_state(batch, max_len, dtype)

    def cost(self, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the cost by part: the mixer's kind, 'ffn' and 'norm'."""
        out = {self.mixer_kind: self.mixer.cost(batch, seq_len), 'norm': Cost()}
        if self.ffn is not None:
            out['ffn'] = self.ffn.cost(batch, seq_len)
        for name in self.norms:
            if hasattr(self, name):
                out['norm'] += norm_cost(
                    getattr(self, name), self.width, batch * seq_len, self.itemsize
                )
        return out

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        """Applies a norm under a scope of its own."""
        with jax.named_scope('norm'):
            return getattr(self, name)(x)


class Sequential(Block):
    """Pre-norm residual: `x += mixer(norm(x)); x += ffn(norm(x))` (GPT-2, LLaMA)."""

    norms = ('norm_mixer', 'norm_ffn')

    def wire(self, x: jax.Array, mix: Apply, feed: Apply) -> jax.Array:
        x = x + mix(self.norm('norm_mixer', x))
        return x if self.ffn is None else x + feed(self.norm('norm_ffn', x))


class Parallel(Block):
    """Both parts read one norm: `x + mixer(norm(x)) + ffn(norm(x))` (PaLM, arXiv 2204.02311)."""

    norms = ('norm_both',)

    def wire(self, x: jax.Array, mix: Apply, feed: Apply) -> jax.Array:
        h = self.norm('norm_both', x)
        return x + mix(h) if self.ffn is None else x + mix(h) + feed(h)


class PostNorm(Block):
    """Norm after the residual sum: `x = norm(x + mixer(x)); x = norm(x + ffn(x))` (GPT-1)."""

    norms = ('norm_mixer', 'norm_ffn')

    def wire(self, x: jax.Array, mix: Apply, feed: Apply) -> jax.Array:
        x = self.norm('norm_mixer', x + mix(x))
        return x if self.ffn is None else self.norm('norm_ffn', x + feed(x))


class Simplified(Block):
    """No skip connection: `a mixer(norm(x)) + b ffn(norm(x))` (He and Hofmann, arXiv 2311.01906).

    The paper's SAS-P block, with its norm. Scalars `a` and `b` are trained, `a` from 1 and `b`
    from 0.1 at the paper's 18 layers, scaled by 1 / sqrt(depth) as its authors advise. The mixer
    must pass its input on at initialisation, as 'shaped_attention' does. Unlike in their code, the
    first layer has no value projection and the last no output projection.
    """

    norms = ('norm_both',)

    def __init__(self, ctx: Context, spec: BlockSpec, *, rngs: nnx.Rngs):
        if spec.mixer['kind'] != 'shaped_attention' or spec.ffn is None:
            raise ConfigError(
                f"{spec.path}.block: a 'simplified' block has no skip connection, so that it needs "
                "mixer dict(kind='shaped_attention', heads=...), which starts as the identity, "
                'and an ffn.'
            )
        super().__init__(ctx, spec, rngs=rngs)
        dtype = ctx.policy.param_dtype
        self.mixer_gain = param(jnp.ones((), dtype), (), no_decay=True, keep_fp32=True)
        gain = 0.1 * (18 / ctx.depth) ** 0.5
        self.ffn_gain = param(jnp.full((), gain, dtype), (), no_decay=True, keep_fp32=True)

    def wire(self, x: jax.Array, mix: Apply, feed: Apply) -> jax.Array:
        h = self.norm('norm_both', x)
        mixer_gain, ffn_gain = self.mixer_gain[...], self.ffn_gain[...]
        return mixer_gain.astype(x.dtype) * mix(h) + ffn_gain.astype(x.dtype) * feed(h)

    def cost(self, batch: int, seq_len: int) -> dict[str, Cost]:
        out = super().cost(batch, seq_len)
        out['norm'] += Cost(params=2, params_used=2)  # the two gains
        return out
