"""What cannot grow, each in one sentence that says what can."""

from collections.abc import Iterable, Mapping
from typing import Any

from effjax.core.errors import ConfigError
from effjax.core.registry import lookup, parameters
from effjax.core.trees import flatten
from effjax.growth.change import Change, LeafChange, Part
from effjax.layers.ffn import FFNS
from effjax.layers.mixers import MIXERS
from effjax.layers.norms import NORMS
from effjax.layers.positions import POSITIONS, Sinusoidal
from effjax.models import MODELS

# Keys of a model's config that may differ: its sizes, and what concerns training only.
_SIZES = frozenset({'width', 'layers', 'heads', 'kv_heads', 'head_dim', 'hidden', 'repeat'})
_FREE = _SIZES | {
    'eps', 'embed_scale', 'max_len', 'dropout', 'embed_dropout', 'attention_dropout', 'init',
    'implementation',
}  # fmt: skip
_REGISTRIES: dict[str, Mapping[str, str]] = {
    'mixer': MIXERS, 'ffn': FFNS, 'norm': NORMS, 'positions': POSITIONS, 'model': MODELS,
}  # fmt: skip
_KEYS = {
    'embed': 'config.model.width',
    'layers': 'the number of layers',
    'mlp': "the feed-forward part's hidden",
    'heads': "the mixer's heads",
    'kv_heads': "the mixer's kv_heads",
    'head_dim': "the mixer's head_dim",
    'position': 'config.model.max_len or the image size',
    'vocab': 'config.model.vocab_size',
}
_WIDENED = ('embed', 'heads', 'kv_heads', 'mlp')


def same_architecture(small: Mapping[str, Any], large: Mapping[str, Any]) -> None:
    """Checks that two configs' models differ in sizes only.

    Raises:
      ConfigError: naming the first key that differs.
    """
    for path, old, new in differences(small['model'], large['model']):
        raise ConfigError(
            f'{path} is {old!r} in the small model and {new!r} in the large one: growth changes '
            f'sizes ({", ".join(sorted(_SIZES))}) and nothing else; make them equal.'
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """Yields (path, old, new) of what two models' blocks say of the model, its sizes aside."""
    return _differences(old, new, 'model', 'config.model')


def _differences(old: Any, new: Any, name: str, path: str) -> Iterable[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get('kind') != new.get('kind'):  # then nothing else of it can be compared
            yield f'{path}.kind', old.get('kind'), new.get('kind')
            return
        defaults = _defaults(new, name)
        for key in sorted({*old, *new} - _FREE):
            before, after = (block.get(key, defaults.get(key)) for block in (old, new))
            yield from _differences(before, after, key, f'{path}.{key}')
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, name, f'{path}.{i}')
    elif old != new:
        yield path, old, new


def _defaults(block: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name not in _REGISTRIES or 'kind' not in block:
        return {}
    component = lookup(_REGISTRIES[name], block['kind'], name)
    return {key: p.default for key, p in parameters(component).items()}


def same_dtypes(small: Any, large: Any) -> None:
    """Checks that two built models keep each parameter in one dtype.

    Raises:
      ConfigError: naming the first parameter that differs.
    """
    old, new = (flatten(built.abstract_state['params']) for built in (small, large))
    for name in sorted({*old} & {*new}):
        if old[name].dtype != new[name].dtype:
            raise ConfigError(
                f'config.precision makes {name} {old[name].dtype} in the small model and '
                f'{new[name].dtype} in the large one: growth keeps dtypes; make them equal.'
            )


def sizes(change: Change, *, changes_eps: bool = False) -> None:
    """Checks what holds for every operator: nothing shrinks, and only what may grow does.

    Raises:
      ConfigError: naming the size.
    """
    for leaf in (*change.leaves.values(), *change.buffers.values()):
        for unit, old, new in zip(leaf.meta.units, leaf.old, leaf.new, strict=True):
            if new < old:
                raise ConfigError(
                    f'growth goes from small to large, but {_KEYS.get(unit or "", str(unit))} goes '
                    f'from {old} to {new} (in {leaf.name}); swap the configs or raise it.'
                )
    if change.widens:
        _width(change)
    if changes_eps:
        return
    for path, (small, large) in change.norms.items():
        if small.eps != large.eps:
            raise ConfigError(
                f'the norm {path} has eps {small.eps!r} in the small model and {large.eps!r} in '
                f'the large one; set config.model.norm.eps to {small.eps!r}.'
            )


def _width(change: Change) -> None:
    for part in change.parts.values():
        _part(part, change)
    for leaf in change.leaves.values():
        for dim in leaf.grown():
            _dimension(leaf, dim)
    for leaf in change.buffers.values():
        if leaf.grown():
            raise ConfigError(f'growth in width does not know the buffer {leaf.name}.')
    small, large = change.models
    if isinstance(getattr(large, 'positions', None), Sinusoidal) and small.width != large.width:
        raise ConfigError(
            "positions 'sinusoidal' cannot be widened: their vectors are fixed for a width, not "
            "copies of a narrower model's; use 'rope' or 'learned', or grow the depth."
        )
    scales = [getattr(model, 'embed_scale', 1.0) for model in (small, large)]
    if scales[0] != scales[1]:
        raise ConfigError(
            f'config.model.embed_scale is {scales[0]:g} in the small model and {scales[1]:g} in '
            f'the large one (0 means the root of the width); set it to {scales[0]:g} in both.'
        )
    untied = getattr(large, 'tied', False) and getattr(large, 'embed_out', None) is None
    if untied and small.width != large.width and large.norm_before_table is None:
        raise ConfigError(
            'a tied head without a norm before it cannot be widened: nothing can carry the '
            'weights of copies, which the table needs whole; set config.model.final_norm=True or '
            'tied=False.'
        )


def _part(part: Part, change: Change) -> None:
    """Checks that a part whose sizes change has said that it may."""
    prefix = f'{part.path}/'
    leaves = [leaf for name, leaf in change.leaves.items() if name.startswith(prefix)]
    changed = {str(leaf.meta.units[dim]) for leaf in leaves for dim in leaf.grown()}
    if 'head_dim' in changed and part.spec is not None and 'heads' in part.spec.widens:
        size = part.old.head_dim
        raise ConfigError(
            f'{part.kind} ({part.path}): head_dim goes from {size} to {part.new.head_dim}, but '
            f'growth adds heads of the same size, which keeps the scale of scores; set head_dim to '
            f'{size} and raise heads.'
        )
    missing = sorted(changed - (part.spec.widens if part.spec is not None else frozenset()))
    if missing:
        raise ConfigError(
            f'{part.kind} ({part.path}) cannot be widened: its growth_spec does not say that '
            f'copies of its units ({", ".join(missing)}) give copies of its results; grow its '
            "depth instead ('stack', 'identity'), which every part can."
        )


def _dimension(leaf: LeafChange, dim: int) -> None:
    unit = leaf.meta.units[dim]
    if unit not in _WIDENED:
        raise ConfigError(
            f'{leaf.name} goes from {leaf.old[dim]} to {leaf.new[dim]} along {unit!r}: growth '
            f'widens {", ".join(_WIDENED)} only; keep {_KEYS.get(str(unit), str(unit))} the same.'
        )
    if leaf.meta.role is None:
        raise ConfigError(
            f'{leaf.name} cannot be widened: it has no role that says what it does with {unit!r}; '
            "grow the depth instead ('stack', 'identity')."
        )


def depth_only(change: Change, name: str) -> None:
    """Checks that only the number of layers changes.

    Raises:
      ConfigError: naming what else does.
    """
    for leaf in change.leaves.values():
        for dim in leaf.grown():
            unit = str(leaf.meta.units[dim])
            raise ConfigError(
                f'{name!r} grows depth only, but {_KEYS[unit]} goes from {leaf.old[dim]} to '
                f"{leaf.new[dim]}; use 'compound' or 'ligo', or grow in two transitions."
            )


def width_only(change: Change, name: str) -> None:
    """Checks that the number of layers stays.

    Raises:
      ConfigError: naming the slot.
    """
    for slot in change.slots.values():
        if slot.old != slot.new:
            raise ConfigError(
                f'{name!r} grows width only, but {slot.path} goes from {slot.old} to {slot.new} '
                "layers; use 'compound' or 'ligo', or grow in two transitions."
            )
