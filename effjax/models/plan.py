"""The body's plan: which blocks stand where, how often they repeat, what they share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core.errors import ConfigError
from effjax.core.registry import parameters, suggest
from effjax.models.blocks import BlockSpec

_SEGMENT_KEYS = ('pattern', 'repeat', 'share')
_BLOCK_KEYS = ('mixer', 'ffn', 'block')


@dataclasses.dataclass(frozen=True)
class SegmentSpec:
    """One segment: the blocks of its period, how often they repeat, and sharing.

    Attributes:
      pattern: the period's blocks.
      repeat: how many times the period runs.
      share: how many consecutive repeats use one copy of the parameters.
    """

    pattern: tuple[BlockSpec, ...]
    repeat: int
    share: int = 1

    @property
    def depth(self) -> int:
        """Number of blocks that a token passes."""
        return self.repeat * len(self.pattern)


def plan_segments(
    segments: Sequence[Mapping[str, Any]],
    layers: int,
    share: int,
    default: Mapping[str, Any],
    implementation: str | None = None,
) -> tuple[SegmentSpec, ...]:
    """Returns the checked plan of a model's config.

    Args:
      segments: the config's segments; empty means one block `layers` times.
      layers: the config's `layers`, 0 where segments say it.
      share: the config's `share`.
      default: `mixer`, `ffn` and `block` of blocks that do not say their own.
      implementation: of attention, for mixers that have a choice and do not say their own.

    Raises:
      ConfigError: an unknown key, kind or argument, or counts that do not fit.
    """
    if not segments:
        if layers < 1:
            raise ConfigError(
                f'config.model.layers must be at least 1 where there are no segments, got {layers}.'
            )
        block = {'pattern': ({},), 'repeat': layers, 'share': share}
        plan = [_segment(block, default, '')]
    else:
        plan = [_segment(s, default, f'.segments.{i}') for i, s in enumerate(segments)]
        depth = sum(s.depth for s in plan)
        if layers and layers != depth:
            raise ConfigError(
                f'config.model.layers is {layers}, but config.model.segments have {depth} blocks; '
                'leave layers at 0.'
            )
        if share != 1:
            raise ConfigError(
                'config.model.share is for models without segments; give '
                'config.model.segments.0.share instead.'
            )
    return tuple(
        dataclasses.replace(s, pattern=tuple(_checked(b, implementation) for b in s.pattern))
        for s in plan
    )


def _checked(spec: BlockSpec, implementation: str | None) -> BlockSpec:
    mixer = spec.check()
    if implementation is None or 'implementation' not in parameters(mixer):
        return spec
    return dataclasses.replace(spec, mixer={'implementation': implementation, **spec.mixer})


def _segment(block: Any, default: Mapping[str, Any], where: str) -> SegmentSpec:
    path = f'config.model{where}'
    _check_keys(block, _SEGMENT_KEYS, path)
    pattern, repeat, share = block.get('pattern'), block.get('repeat', 1), block.get('share', 1)
    if not isinstance(pattern, list | tuple) or not pattern:
        raise ConfigError(f'{path}.pattern must list at least one block, got {pattern!r}.')
    for key, value in (('repeat' if where else 'layers', repeat), ('share', share)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f'{path}.{key} must be an integer of at least 1, got {value!r}.')
    if repeat % share:
        raise ConfigError(
            f'{path}.share {share} does not divide the {repeat} repeats that it groups.'
        )
    specs = []
    for i, entry in enumerate(pattern):
        inner = f'{path}.pattern.{i}' if where else path
        _check_keys(entry, _BLOCK_KEYS, inner)
        specs.append(BlockSpec(**{**default, **entry}, path=inner))
    return SegmentSpec(tuple(specs), repeat, share)


def _check_keys(block: Any, known: Sequence[str], path: str) -> None:
    if not isinstance(block, Mapping):
        raise ConfigError(f'{path} must be a block, got {block!r}.')
    for key in block:
        if key not in known:
            raise ConfigError(f'unknown key {path}.{key}.' + suggest(key, known))
