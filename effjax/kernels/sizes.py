"""Sizes that a kernel runs with: the fastest measured on a device, else those of its own rule.

`tables/<device>.json` holds what `python -m effjax.kernels.tune` found there: an entry for each
kernel and class of shapes that its rule was not the best for, or was confirmed for.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from effjax.core.errors import DataError
from effjax.kernels import choice

TABLES = pathlib.Path(__file__).with_name('tables')
Sizes = Mapping[str, int]
_trying: dict[str, Sizes] = {}


def tuned(kernel: str, shapes: str, rule: Sizes) -> Sizes:
    """Returns the sizes that a kernel runs with.

    Args:
      kernel: operation and kernel, such as 'attention.forward'.
      shapes: what is alike in the shapes that an entry is for, such as 'head_dim=128'.
      rule: name -> size by the kernel's rule, for devices and shapes without an entry.

    Raises:
      DataError: a table that cannot be read, or an entry of other sizes than the rule's.
    """
    if kernel in _trying:
        return _trying[kernel]
    # A table is for the device at hand, and not for one that is planned for.
    if choice.platform() != jax.default_backend():
        return rule
    file = file_of(jax.local_devices()[0].device_kind)
    entry = read(file)['entries'].get(f'{kernel} {shapes}')
    if entry is None:
        return rule
    if set(entry['sizes']) != set(rule):
        raise DataError(
            f'{file}: "{kernel} {shapes}" has the sizes {sorted(entry["sizes"])}, but the kernel '
            f'takes {sorted(rule)}; measure anew with python -m effjax.kernels.tune.'
        )
    return entry['sizes']


@contextlib.contextmanager
def trying(kernel: str, found: Sizes) -> Iterator[None]:
    """Has a kernel run with given sizes, whatever table and rule say: for who measures them."""
    _trying[kernel] = found
    try:
        yield
    finally:
        del _trying[kernel]


def file_of(device: str) -> pathlib.Path:
    """Returns the table's file of a kind of device, such as 'NVIDIA H200', there or not."""
    return TABLES / ('_'.join(device.lower().split()) + '.json')


@functools.cache
def read(file: pathlib.Path) -> dict[str, Any]:
    """Returns a table, without entries where there is no file.

    Raises:
      DataError: it is damaged.
    """
    if not file.exists():
        return {'entries': {}}
    try:
        table = json.loads(file.read_text())
        if not all(isinstance(entry['sizes'], dict) for entry in table['entries'].values()):
            raise TypeError
        return table
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(
            f'{file} is damaged; delete it, and measure with python -m effjax.kernels.tune.'
        ) from e
