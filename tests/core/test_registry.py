"""Registries: look-up, and the check of a block against a signature."""

import pytest

from effjax.core import registry
from effjax.core.errors import ConfigError

KNOWN = {'counter': 'collections:Counter', 'path': 'pathlib:Path'}


def part(ctx, *, heads: int, window: int | None = None, scale: float = 1.0, kind2: str = '', rngs):
    """A component as registries hold them."""


def test_lookup_imports_and_suggests():
    import collections

    assert registry.lookup(KNOWN, 'counter', 'part') is collections.Counter
    with pytest.raises(ConfigError) as error:
        registry.lookup(KNOWN, 'cuonter', 'part', 'config.model.mixer')
    assert str(error.value) == (
        "unknown part 'cuonter' at config.model.mixer; known: counter, path. "
        "Did you mean 'counter'?"
    )


def test_only_keyword_arguments_belong_to_the_config():
    assert list(registry.parameters(part)) == ['heads', 'window', 'scale', 'kind2']


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ({'heads': 2, 'windw': 3}, "p.windw: part takes no 'windw'"),
        ({'heads': 2, 'windw': 3}, "Did you mean 'window'?"),
        ({}, "p: part needs 'heads'; give p.heads"),
        ({'heads': '2'}, "p.heads: expected int, got '2' (str)"),
        ({'heads': True}, 'p.heads: expected int, got True'),
        ({'heads': 2, 'window': 1.5}, 'p.window: expected int or None, got 1.5'),
        ({'heads': 2, 'ctx': 1}, "p.ctx: part takes no 'ctx'"),
        ({'heads': 2, 'rngs': 1}, "p.rngs: part takes no 'rngs'"),
    ],
)
def test_arguments_are_checked(given, words):
    with pytest.raises(ConfigError) as error:
        registry.check_arguments(part, given, 'part', 'p')
    assert words in str(error.value)


def test_good_arguments_pass():
    registry.check_arguments(part, {'heads': 2, 'window': None, 'scale': 1}, 'part', 'p')


def test_a_block_needs_a_kind():
    with pytest.raises(ConfigError, match='expected a block such as dict'):
        registry.check_block(KNOWN, {'heads': 2}, 'part', 'config.x')
