"""Operators on depth: each slot of the body gets more layers, every one a copy of an old one.

A segment repeats a period of blocks, so an operator acts on its repeats: stacking 3 Mamba + 1
attention blocks twice gives two more such periods. With `share`, it acts on the copies of the
parameters. In all of them a layer's moments are copied with it.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import ConfigError
from effjax.growth import check
from effjax.growth.base import Kind, Operator, Rule
from effjax.growth.change import Change, LeafChange, Slot


class Depth(Operator):
    """What depth operators share; a subclass gives `sources`."""

    def bind(self, change: Change, seed: int) -> Rule:
        """See `Operator.bind`."""
        del seed
        check.depth_only(change, self.name)
        sources = {path: self.sources(slot) for path, slot in change.slots.items()}

        def rule(leaf: LeafChange, x: jax.Array, kind: Kind) -> jax.Array:
            if not leaf.meta.stacked or leaf.old == leaf.new:
                return x
            return self.fill(change, leaf, jnp.take(x, sources[leaf.slot], axis=0), kind)

        return rule

    def sources(self, slot: Slot) -> np.ndarray:
        """Returns for each layer of the large model the layer of the small one that it copies.

        Raises:
          ConfigError: a number of layers that the operator cannot make.
        """
        raise NotImplementedError

    def fill(self, change: Change, leaf: LeafChange, x: jax.Array, kind: Kind) -> jax.Array:
        """Returns a stacked leaf after its layers were copied."""
        del change, leaf, kind
        return x

    def multiple(self, slot: Slot) -> int:
        """Returns how many times as many layers a slot gets, an integer.

        Raises:
          ConfigError: not a multiple.
        """
        if slot.new % slot.old:
            near = max(1, round(slot.new / slot.old)) * slot.old
            raise ConfigError(
                f'{self.name!r} multiplies layers, but {slot.path} goes from {slot.old} to '
                f"{slot.new}, no multiple; use {near}, or 'append', 'midas' or 'identity'."
            )
        return slot.new // slot.old


class Stack(Depth):
    """The whole stack of layers, several times over: 1 2 3 -> 1 2 3 1 2 3.

    StackingBERT (Gong et al., ICML 2019); G_stack (Du et al., arXiv 2405.15319), which also starts
    a fresh optimizer and schedule: `moments='reset'`. `W'[i] = W[i mod L]`; does not preserve the
    function. Moments are copied with their layer.
    """

    name = 'stack'

    def sources(self, slot: Slot) -> np.ndarray:
        return np.tile(np.arange(slot.old), self.multiple(slot))


class Interpolate(Depth):
    """Each layer several times in a row: 1 2 3 -> 1 1 2 2 3 3.

    Chang et al., arXiv 1710.10348; 'interlace' in LiGO's code. `W'[i] = W[i // factor]`; does not
    preserve the function. Moments are copied with their layer.
    """

    name = 'interpolate'

    def sources(self, slot: Slot) -> np.ndarray:
        return np.repeat(np.arange(slot.old), self.multiple(slot))


class Append(Depth):
    """A copy of the last k layers on top: 1 2 3 4 -> 1 2 3 4 3 4.

    Gradual stacking (Reddi et al., ICML 2023). k is what the large model has more, at most the
    number of layers. Does not preserve the function. Moments are copied with their layer.
    """

    name = 'append'

    def sources(self, slot: Slot) -> np.ndarray:
        more = _at_most_double(self.name, slot)
        return np.concatenate([np.arange(slot.old), np.arange(slot.old - more, slot.old)])


class Midas(Depth):
    """The middle k layers twice, in place: 1 2 3 4 -> 1 2 3 2 3 4.

    MIDAS (Saunshi et al., arXiv 2409.19044). k is what the large model has more, at most the
    number of layers; of an odd rest the lower half is smaller. Does not preserve the function.
    Moments are copied with their layer.
    """

    name = 'midas'

    def sources(self, slot: Slot) -> np.ndarray:
        more = _at_most_double(self.name, slot)
        start = (slot.old - more) // 2
        end = start + more
        return np.concatenate([np.arange(end), np.arange(start, slot.old)])


class Identity(Depth):
    """New blocks that add nothing at first: copies whose last products (and biases) are zero.

    The function is preserved exactly: `x + 0 = x`. Unlike blocks whose norms are zero (Staged
    Training, arXiv 2203.06211), a zeroed product gets a gradient in the first step, and so do the
    other weights in the second. In new blocks first moments of zeroed leaves are zero; everything
    else, second moments too, is copied.

    Args:
      placement: 'alternate' spreads the new blocks evenly, each behind the block it copies; 'end'
        puts them behind all others, as copies of the last ones; 'start' before, of the first.
    """

    name = 'identity'
    preserves_function = True

    def __init__(self, *, placement: Literal['alternate', 'end', 'start'] = 'alternate'):
        check_placement(self.name, placement)
        self.placement = placement

    def bind(self, change: Change, seed: int) -> Rule:
        """See `Operator.bind`."""
        for slot in change.slots.values():
            if slot.old != slot.new:
                can_be_silent(self.name, slot, change)
        return super().bind(change, seed)

    def sources(self, slot: Slot) -> np.ndarray:
        return placed(slot, self.placement)[0]

    def fill(self, change: Change, leaf: LeafChange, x: jax.Array, kind: Kind) -> jax.Array:
        if kind == 'second' or not is_output(change, leaf.name):
            return x
        fresh = placed(change.slots[leaf.slot], self.placement)[1]
        return jnp.where(fresh.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros((), x.dtype), x)


def check_placement(name: str, placement: str) -> None:
    """Checks the name of a place for new blocks.

    Raises:
      ConfigError: an unknown one.
    """
    if placement not in ('alternate', 'end', 'start'):
        raise ConfigError(
            f"{name!r} places new blocks by 'alternate', 'end' or 'start', not {placement!r}."
        )


def placed(slot: Slot, placement: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (which old block each block of a slot copies, which blocks are new)."""
    old, more = slot.old, slot.new - slot.old
    if placement == 'alternate':
        sources = np.arange(slot.new) * old // slot.new
        return sources, np.concatenate([[False], sources[1:] == sources[:-1]])
    kept, fresh = np.arange(old), np.arange(more) % old
    flags = [np.zeros(old, bool), np.ones(more, bool)]
    if placement == 'start':
        return np.concatenate([fresh, kept]), np.concatenate(flags[::-1])
    last = np.arange(-more, 0) % old
    return np.concatenate([kept, last]), np.concatenate(flags)


def is_output(change: Change, name: str) -> bool:
    """Says whether a leaf belongs to a product whose zeros silence its part."""
    keys = name.split('/')
    part, inner = change.parts.get('/'.join(keys[:4])), '/'.join(keys[4:])
    return part is not None and any(inner.startswith(f'{out}/') for out in part.spec.outputs)


def can_be_silent(name: str, slot: Slot, change: Change) -> None:
    """Checks that a slot's block passes its input on where its parts add nothing.

    Raises:
      ConfigError: naming the block or the part that does not.
    """
    kind = slot.block.label.split('(')[0]
    if kind not in ('sequential', 'parallel', 'reversible'):
        raise ConfigError(
            f'{name!r} needs blocks that add to the residual stream, and {kind!r} ones '
            f"({slot.path}) do not pass it on unchanged; use 'stack' or 'append'."
        )
    for part in change.parts.values():
        if part.path.startswith(f'{slot.path}/') and not getattr(part.spec, 'outputs', ()):
            raise ConfigError(
                f'{name!r} cannot silence the {part.kind} ({part.path}): its growth_spec names '
                "no product whose zeros make its result zero; use 'stack' or 'append'."
            )


def _at_most_double(name: str, slot: Slot) -> int:
    """Returns how many layers a slot gets, checked to be no more than it has."""
    more = slot.new - slot.old
    if more > slot.old:
        raise ConfigError(
            f'{name!r} copies each layer at most once, but {slot.path} goes from {slot.old} to '
            f"{slot.new} layers; grow to {2 * slot.old} first, or use 'stack' or 'identity'."
        )
    return more
