"""What changes between a small model and a large one: sizes of leaves, counts of units and layers.

Everything that operators know of a model stands in a `Change`. It is read from the two abstract
models, their metadata and their parts' `growth_spec`, never from arrays.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from effjax.core.axes import Meta
from effjax.core.trees import flatten
from effjax.layers.norms import LayerNorm, RMSNorm

# Units that all parts of a model share. Others (heads, mlp, ...) belong to the part they are in.
_SHARED = frozenset({'embed', 'vocab', 'position', 'patch', 'classes'})


@dataclasses.dataclass(frozen=True)
class LeafChange:
    """One parameter (or buffer) in both models.

    Attributes:
      name: its path.
      meta: its metadata in the large model; a norm whose output a tied table reads has its
        dimension among the `inputs`, because its values carry the weights of copies.
      old: its shape in the small model.
      new: its shape in the large one.
      spaces: for each dimension the key of what it counts, `embed` or `PART:heads`; None for
        layers.
    """

    name: str
    meta: Meta
    old: tuple[int, ...]
    new: tuple[int, ...]
    spaces: tuple[str | None, ...]

    @property
    def slot(self) -> str:
        """The slot of the body that it belongs to, `body/segment_0/slot_0`; '' outside."""
        return '/'.join(self.name.split('/')[:3]) if self.meta.stacked else ''

    def grown(self) -> list[int]:
        """Returns the dimensions, layers aside, whose size changes."""
        first = int(self.meta.stacked)
        return [i for i in range(first, len(self.new)) if self.old[i] != self.new[i]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A mixer or feed-forward part of a slot.

    Attributes:
      path: `body/segment_0/slot_0/mixer`.
      kind: what errors call it: mixer 'retnet', or the class of a feed-forward part.
      old: the small model's module, abstract.
      new: the large model's.
    """

    path: str
    kind: str
    old: Any
    new: Any

    @property
    def spec(self) -> Any:
        """The part's `GrowthSpec`, or None."""
        return getattr(self.new, 'growth_spec', None)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place in a segment's period, stacked over copies of its parameters.

    Attributes:
      path: `body/segment_0/slot_0`.
      block: the large model's block, abstract.
      old: copies in the small model.
      new: copies in the large one.
    """

    path: str
    block: Any
    old: int
    new: int


@dataclasses.dataclass(frozen=True)
class Change:
    """A small model, a large one, and what lies between.

    Attributes:
      leaves: path -> change, of parameters.
      buffers: the same of buffers.
      slots: path -> slot of the body.
      parts: path -> part of a slot.
      spaces: key -> (old, new) number of units.
      norms: path -> (small, large) norm over the model's width.
      models: the small and the large model, abstract.
    """

    leaves: Mapping[str, LeafChange]
    buffers: Mapping[str, LeafChange]
    slots: Mapping[str, Slot]
    parts: Mapping[str, Part]
    spaces: Mapping[str, tuple[int, int]]
    norms: Mapping[str, tuple[Any, Any]]
    models: tuple[Any, Any]

    @property
    def deepens(self) -> bool:
        """Whether any slot gets more layers."""
        return any(slot.old != slot.new for slot in self.slots.values())

    @property
    def widens(self) -> bool:
        """Whether anything but the number of layers changes."""
        return any(leaf.grown() for leaf in self.leaves.values())

    def depth_part(self) -> 'Change':
        """Returns the change in layers alone: the large depth at the small width."""
        leaves = {
            name: dataclasses.replace(leaf, new=(*leaf.new[:1], *leaf.old[1:]))
            if leaf.meta.stacked
            else dataclasses.replace(leaf, new=leaf.old)
            for name, leaf in self.leaves.items()
        }
        spaces = {key: (old, old) for key, (old, _) in self.spaces.items()}
        return dataclasses.replace(self, leaves=leaves, spaces=spaces)

    def width_part(self) -> 'Change':
        """Returns the change in width alone, at the large depth."""
        leaves = {
            name: dataclasses.replace(leaf, old=(*leaf.new[:1], *leaf.old[1:]))
            if leaf.meta.stacked
            else leaf
            for name, leaf in self.leaves.items()
        }
        slots = {k: dataclasses.replace(slot, old=slot.new) for k, slot in self.slots.items()}
        return dataclasses.replace(self, leaves=leaves, slots=slots)


def between(small: Any, large: Any) -> Change:
    """Returns the change from one built model to another of the same parts.

    Args:
      small: what `models.build` returned for the small config.
      large: the same for the large one.

    Raises:
      KeyError: the models have not the same parameters (`check.same_architecture` says why).
    """
    leaves = _leaves(small, large, 'params')
    slots, parts = _body(small.model, large.model)
    return Change(
        leaves=leaves,
        buffers=_leaves(small, large, 'buffers'),
        slots=slots,
        parts=parts,
        spaces=_spaces(leaves),
        norms=_norms(small.model, large.model),
        models=(small.model, large.model),
    )


def _leaves(small: Any, large: Any, kind: str) -> dict[str, LeafChange]:
    old, new = (flatten(built.abstract_state[kind]) for built in (small, large))
    tied = getattr(large.model, 'norm_before_table', None)
    out = {}
    for name, meta in flatten(large.meta[kind]).items():
        if tied is not None and name.startswith(f'{tied}/'):
            meta = _with_inputs(meta)
        spaces = tuple(_space(name, unit) for unit in meta.units)
        out[name] = LeafChange(name, meta, old[name].shape, new[name].shape, spaces)
    return out


def _with_inputs(meta: Meta) -> Meta:
    inputs = tuple(unit == 'embed' for unit in meta.units)
    return Meta(
        meta.axes, meta.no_decay, meta.keep_fp32, meta.lr_scale, meta.role, inputs, meta.units
    )


def _space(name: str, unit: str | None) -> str | None:
    if unit == 'layers':
        return None
    if unit in _SHARED:
        return unit
    keys = name.split('/')
    owner = '/'.join(keys[:4] if keys[0] == 'body' else keys[:1])
    return f'{owner}:{unit}'


def _spaces(leaves: Mapping[str, LeafChange]) -> dict[str, tuple[int, int]]:
    out: dict[str, tuple[int, int]] = {}
    for leaf in leaves.values():
        for key, old, new in zip(leaf.spaces, leaf.old, leaf.new, strict=True):
            if key is not None:
                out.setdefault(key, (old, new))
    return out


def _body(small: Any, large: Any) -> tuple[dict[str, Slot], dict[str, Part]]:
    slots, parts = {}, {}
    for segment_name in large.body.names:
        old, new = small.body.segment(segment_name), large.body.segment(segment_name)
        for name in new.names:
            path, block = f'body/{segment_name}/{name}', new.slot(name)
            copies = [s.repeat // s.share for s in (old, new)]
            slots[path] = Slot(path, block, *copies)
            before = old.slot(name)
            kind = f'mixer {block.mixer_kind!r}'
            parts[f'{path}/mixer'] = Part(f'{path}/mixer', kind, before.mixer, block.mixer)
            if block.ffn is not None:
                kind = f'feed-forward part {type(block.ffn).__name__}'
                parts[f'{path}/ffn'] = Part(f'{path}/ffn', kind, before.ffn, block.ffn)
    return slots, parts


def _norms(small: Any, large: Any) -> dict[str, tuple[Any, Any]]:
    """Norms over the model's width, in both models."""
    found = [
        {
            '/'.join(map(str, path)): module
            for path, module in nnx.iter_graph(model)
            if isinstance(module, RMSNorm | LayerNorm)
            and module.scale.get_metadata()['units'] == ('embed',)
        }
        for model in (small, large)
    ]
    return {path: (found[0][path], norm) for path, norm in found[1].items()}
