"""Reversible residuals: the backward pass makes a block's input again from its output.

Nothing is kept of the layers between, so that what the backward pass holds does not grow with
depth; in return each layer's forward pass runs twice (Gomez et al., arXiv 1707.04585; Kitaev et
al., arXiv 2001.04451).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.models import blocks

Tree = Any
Streams = tuple[jax.Array, jax.Array]
# What `jax.checkpoint` calls what it recomputes, and what the walk of FLOPs books as such.
RECOMPUTED = 'rematted_computation'


class Reversible(blocks.Block):
    """Two streams that take turns: `a += mixer(norm(b)); b += ffn(norm(a))`.

    A segment of such blocks begins with its input as both streams and ends on their mean. The
    streams are float32 whatever the compute dtype: in 16 bits, adding and taking away again would
    lose what stands behind the point.

    Raises:
      ConfigError: a block without a feed-forward part, which has nothing for its second stream.
    """

    norms = ('norm_mixer', 'norm_ffn')

    def __init__(self, ctx: Context, spec: blocks.BlockSpec, *, rngs: nnx.Rngs):
        if spec.ffn is None:
            raise ConfigError(
                f"{spec.path}.block: a 'reversible' block adds the mixer to one stream and the ffn "
                "to the other, so that it needs an ffn; give one, or use block 'sequential'."
            )
        super().__init__(ctx, spec, rngs=rngs)
        self.compute_dtype = ctx.policy.compute_dtype

    def wire(self, x: Streams, mix: blocks.Apply, feed: blocks.Apply) -> Streams:
        a, b = x
        a = a + mix(self._normed('norm_mixer', b))
        return a, b + feed(self._normed('norm_ffn', a))

    def add_mixed(self, b: jax.Array, info: SeqInfo) -> tuple[jax.Array, Tree]:
        """Returns what the mixer adds to stream a, reading b, in b's dtype; and its aux."""
        y, _, aux = self.mixed(self._normed('norm_mixer', b), info)
        return y.astype(b.dtype), aux

    def add_fed(self, a: jax.Array, info: SeqInfo) -> tuple[jax.Array, Tree]:
        """Returns what the feed-forward part adds to stream b, reading a; and its aux."""
        y, aux = self.fed(self._normed('norm_ffn', a), info)
        return y.astype(a.dtype), aux

    def _normed(self, name: str, x: jax.Array) -> jax.Array:
        return self.norm(name, x).astype(self.compute_dtype)


def opened(x: jax.Array) -> Streams:
    """Returns the two streams that a segment begins with, of its input [..., D]."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x, x


def closed(streams: Streams, dtype: Any) -> jax.Array:
    """Returns what a segment hands on: the mean of its streams."""
    return (0.5 * (streams[0] + streams[1])).astype(dtype)


def run(
    forward: Callable[..., tuple[Streams, Tree]],
    layout: 'Layout',
    weights: Tree,
    x: Streams,
    info: SeqInfo,
) -> tuple[Streams, Tree]:
    """Runs a segment, `forward(weights, x, info) -> (y, aux)`, with its own gradient rule.

    Kept for the backward pass are weights, `y` and `info`; there is no forward-mode gradient.

    Args:
      forward: the segment's plain way to run.
      layout: how its blocks lie and repeat.
      weights: by slot, stacked over copies.
      x: both streams, [B, T, D].
      info: what every block gets, folded by its layer.
    """

    @jax.custom_vjp
    def reversible(weights: Tree, x: Streams, info: SeqInfo) -> tuple[Streams, Tree]:
        return forward(weights, x, info)

    def keep(weights: Tree, x: Streams, info: SeqInfo) -> Any:
        y, aux = forward(weights, x, info)
        return (y, aux), (weights, y, info)

    def back(kept: Any, cotangents: Any) -> Any:
        weights, y, info = kept
        dy, daux = cotangents
        dx, dweights = layout.back(weights, y, info, dy, {n: _floats(a) for n, a in daux.items()})
        return dweights, dx, None

    reversible.defvjp(keep, back)
    return reversible(weights, x, info)


class Layout:
    """How the reversible blocks of a segment lie and repeat.

    Args:
      graphdefs: the blocks of a period, by slot in the order they run.
      layer: `(repeat, slot's place) -> index of the layer`, for keys.
      copies: copies of the parameters.
      share: repeats in a row that use one copy.
      unroll: whether loops are unrolled.
    """

    def __init__(
        self,
        graphdefs: Mapping[str, Any],
        layer: Callable[[jax.Array, int], jax.Array],
        copies: int,
        share: int,
        unroll: bool,
    ):
        self.graphdefs, self.layer = dict(graphdefs), layer
        self.copies, self.share, self.unroll = copies, share, unroll

    def back(
        self, weights: Tree, y: Streams, info: SeqInfo, dy: Streams, daux: Tree
    ) -> tuple[Streams, Tree]:
        """Goes from a segment's output back to its input; returns (dx, dweights).

        Args:
          weights: as in `run`.
          y: the segment's output.
          info: as in `run`.
          dy: gradient of y.
          daux: by slot, gradients of the floats in aux, stacked over repeats.
        """
        copies, share = self.copies, self.share
        index = jnp.arange(copies * share, dtype=jnp.int32).reshape(copies, share)
        daux = jax.tree.map(lambda a: a.reshape(copies, share, *a.shape[1:]), daux)

        def over_copies(carry: Any, inputs: Any) -> Any:
            own, daux, index = inputs

            def over_shared(carry: Any, inner: Any) -> Any:
                y, dy, total = carry
                x, dx, new = self._period(own, y, info, dy, *inner)
                return (x, dx, jax.tree.map(jnp.add, total, new)), None

            start = (*carry, jax.tree.map(jnp.zeros_like, own))
            unroll = share if self.unroll or share == 1 else 1
            (x, dx, dw), _ = jax.lax.scan(
                over_shared, start, (daux, index), reverse=True, unroll=unroll
            )
            return (x, dx), dw

        (_, dx), dweights = jax.lax.scan(
            over_copies, (y, dy), (weights, daux, index),
            reverse=True, unroll=copies if self.unroll else 1,
        )  # fmt: skip
        return dx, dweights

    def _period(
        self, weights: Tree, y: Streams, info: SeqInfo, dy: Streams, daux: Tree, repeat: jax.Array
    ) -> tuple[Streams, Streams, Tree]:
        """One period backwards: its input, the gradients of its input and of its weights."""
        dweights = {}
        for i, name in reversed(list(enumerate(self.graphdefs))):
            own = info.fold(self.layer(repeat, i))
            block = (self.graphdefs[name], weights[name])
            y, dy, dweights[name] = undo(*block, y, own, dy, daux[name])
        return y, dy, dweights


def undo(
    graphdef: Any, weights: Tree, y: Streams, info: SeqInfo, dy: Streams, daux: list[jax.Array]
) -> tuple[Streams, Streams, Tree]:
    """One block backwards; each part runs forward once, for its value and for its gradient.

    Args:
      graphdef: the block's structure.
      weights: its arrays.
      y: its output.
      info: as the block got it, so that dropout falls alike.
      dy: gradient of y.
      daux: gradients of the floats in its aux, in their order.

    Returns:
      (its input, the input's gradient, the weights' gradient).
    """

    def part(name: str) -> Callable[..., Any]:
        def added(weights: Tree, stream: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            y, aux = getattr(nnx.merge(graphdef, weights), name)(stream, info)
            return y, _floats(aux)

        return added

    (a, b), (da, db) = y, dy
    with jax.named_scope(RECOMPUTED):
        (fed, faux), back = jax.vjp(part('add_fed'), weights, a)
    b = b - fed
    # Keys of aux are in alphabetical order: the feed-forward part's come first.
    dweights, more = back((db, daux[: len(faux)]))
    da = da + more
    with jax.named_scope(RECOMPUTED):
        (mixed, _), back = jax.vjp(part('add_mixed'), weights, b)
    a = a - mixed
    others, more = back((da, daux[len(faux) :]))
    x, dx = blocks.placed((a, b), (a, b)), blocks.placed((da, db + more), (da, db))
    return x, dx, jax.tree.map(jnp.add, dweights, others)


def _floats(tree: Tree) -> list[jax.Array]:
    """The leaves that have gradients."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
