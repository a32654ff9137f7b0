"""Which implementation of an operation ran, and why the others were refused.

An operation describes its inputs, each implementation answers with a reason to refuse them or
None, and `pick` takes the first that accepts. Picking happens while jax traces, so a compiled
step records its choices once.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from effjax.core.errors import ConfigError

_last: dict[str, Any] = {}
_by_op: dict[str, list[dict[str, Any]]] = {}
_targets: list[str] = []
_listeners: list[dict[str, str]] = []


def last_choice(op: str | None = None) -> dict[str, Any]:
    """Returns the newest choice, of one operation or of any.

    Returns:
      `{'op': 'attention', 'implementation': 'xla', 'refused': {'cudnn': 'why', ...}, ...}`, or an
      empty dict when nothing was picked yet.
    """
    if op is None:
        return dict(_last)
    return dict(_by_op[op][-1]) if _by_op.get(op) else {}


def choices() -> dict[str, list[dict[str, Any]]]:
    """Returns every different choice of this process by operation, for a run's record."""
    return {op: [dict(c) for c in made] for op, made in _by_op.items()}


def pick(
    op: str,
    implementation: str | None,
    refusals: Mapping[str, str | None],
    forms: Mapping[str, str] | None = None,
    **facts: Any,
) -> str:
    """Picks an implementation and records the choice.

    Args:
      op: the operation's name.
      implementation: the one asked for; None takes the first that does not refuse.
      refusals: `name -> reason why it cannot run, or None`, best first.
      forms: `name -> form` that each implementation takes for these inputs, where it has several.
      **facts: what else the record should say, such as a shape.

    Raises:
      ConfigError: (a ValueError) an unknown name, or one that cannot run here, with the reason.
    """
    refused = {name: why for name, why in refusals.items() if why is not None}
    if implementation is None:
        chosen = next(name for name in refusals if name not in refused)
    elif implementation not in refusals:
        raise ConfigError(
            f'{op} has no implementation {implementation!r}; it has {", ".join(refusals)}.'
        )
    elif implementation in refused:
        able = [name for name in refusals if name not in refused]
        raise ConfigError(
            f'{op} cannot run as {implementation!r}: {refused[implementation]}; '
            f'use {" or ".join(repr(name) for name in able)}, or None to let effjax pick.'
        )
    else:
        chosen = implementation
    if forms and chosen in forms:
        facts['form'] = forms[chosen]
    _record({'op': op, 'implementation': chosen, 'refused': refused, **facts})
    return chosen


def _record(choice: dict[str, Any]) -> None:
    _last.clear()
    _last.update(choice)
    made = _by_op.setdefault(choice['op'], [])
    if choice in made:
        made.remove(choice)  # so that the newest stands last, each only once
    made.append(choice)
    for heard in _listeners:
        heard[choice['op']] = choice['implementation']


def platform() -> str:
    """Returns the platform traced for: 'cpu', 'gpu' or 'tpu'."""
    return _targets[-1] if _targets else jax.default_backend()


@contextlib.contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Yields a dict that fills with `operation -> implementation` as choices are made inside."""
    heard: dict[str, str] = {}
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners[:] = [h for h in _listeners if h is not heard]


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
    """Picks implementations for another platform, as when a plan is compiled ahead for a pod.

    Args:
      name: 'cpu', 'gpu' or 'tpu'.
    """
    _targets.append(name)
    try:
        yield
    finally:
        _targets.pop()
