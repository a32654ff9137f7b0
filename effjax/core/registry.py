"""Registries: plain dicts `name -> 'module:attribute'`, imported on look-up.

A component block in a config is `dict(kind='retnet', heads=8)`: `kind` picks from a registry and
the other keys are the component's own keyword-only arguments. Its positional parameters, and
`rngs`, are given by the code that builds it, never by a config.
"""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from effjax.core.errors import ConfigError

_GIVEN_BY_CODE = frozenset({'rngs'})


def suggest(name: object, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` when one of `known` is close to `name`, else an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ''


def lookup(registry: Mapping[str, str], kind: object, what: str, path: str = '') -> Any:
    """Imports and returns the object registered as `kind`.

    Args:
      registry: `name -> 'module:attribute'`.
      kind: the name asked for.
      what: what the registry holds, for the message ("mixer", "optimizer").
      path: where in the config the name stands, for the message.

    Raises:
      ConfigError: unknown name, with the known ones and a suggestion.
    """
    if not isinstance(kind, str) or kind not in registry:
        where = f' at {path}' if path else ''
        raise ConfigError(
            f'unknown {what} {kind!r}{where}; known: {", ".join(sorted(registry))}.'
            + suggest(kind, registry)
        )
    module, _, attribute = registry[kind].partition(':')
    return getattr(importlib.import_module(module), attribute)


def parameters(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the component's config arguments: its keyword-only parameters except `rngs`."""
    # A class is asked for its __init__: NNX's metaclass hides it behind (*args, **kwargs).
    target = component.__init__ if inspect.isclass(component) else component
    signature = inspect.signature(target, eval_str=True)
    return {
        name: p
        for name, p in signature.parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and name not in _GIVEN_BY_CODE
    }


def arguments(block: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a block's arguments: everything but `kind`."""
    return {k: v for k, v in block.items() if k != 'kind'}


def check_arguments(
    component: Callable[..., Any], given: Mapping[str, Any], what: str, path: str
) -> None:
    """Checks names, presence and types of a block's arguments against a signature.

    Raises:
      ConfigError: unknown or missing argument, or a value of the wrong type.
    """
    allowed = parameters(component)
    for name, value in given.items():
        if name not in allowed:
            raise ConfigError(
                f'{path}.{name}: {what} takes no {name!r}; it takes: '
                f'{", ".join(sorted(allowed)) or "nothing"}.' + suggest(name, allowed)
            )
        annotation = allowed[name].annotation
        if not _fits(value, annotation):
            raise ConfigError(
                f'{path}.{name}: expected {_describe(annotation)}, got {value!r} '
                f'({type(value).__name__}).'
            )
    for name, p in allowed.items():
        if p.default is inspect.Parameter.empty and name not in given:
            raise ConfigError(f'{path}: {what} needs {name!r}; give {path}.{name}.')


def check_block(registry: Mapping[str, str], block: Any, what: str, path: str) -> Any:
    """Checks a component block against its registry and returns the component.

    Raises:
      ConfigError: not a block, unknown kind, or arguments that do not fit.
    """
    if not isinstance(block, Mapping) or 'kind' not in block:
        raise ConfigError(f"{path}: expected a block such as dict(kind='...'), got {block!r}.")
    component = lookup(registry, block['kind'], what, path)
    check_arguments(component, arguments(block), f'{what} {block["kind"]!r}', path)
    return component


def _fits(value: Any, annotation: Any) -> bool:
    if annotation in (inspect.Parameter.empty, Any):
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or annotation
    if isinstance(kind, type):
        if issubclass(kind, Mapping):
            return isinstance(value, Mapping)
        if kind in (tuple, list):
            return isinstance(value, tuple | list)
        return isinstance(value, kind)
    return True


def _describe(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(_describe(a) for a in typing.get_args(annotation))
    if origin is typing.Literal:
        return 'one of ' + ', '.join(repr(a) for a in typing.get_args(annotation))
    if annotation is type(None):
        return 'None'
    return getattr(annotation, '__name__', str(annotation))
