"""A tokenizer together with what is needed to make it again elsewhere: its block and its files.

tokenizer.json   {'block': ..., 'learned': ...}, with a checksum
files/           copies of what a block's `path` names (GPT-2's two files, a tokenizer.json)
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from effjax.core.errors import DataError
from effjax.core.registry import arguments, check_block, parameters
from effjax.data import cache
from effjax.data.tokenizers import TOKENIZERS, Tokenizer, Training

_FILE = 'tokenizer.json'
_FILES = 'files'
_USUAL = ('tokenizer.json', 'vocab.txt')  # what tokenizers look for in a folder


@dataclasses.dataclass(frozen=True)
class KeptTokenizer:
    """A tokenizer that can be saved.

    Attributes:
      tokenizer: encodes and decodes.
      block: the config block it was built from.
      learned: what it learned from text, JSON; None where it learns nothing.
    """

    tokenizer: Tokenizer
    block: dict[str, Any]
    learned: Any

    def save(self, folder: pathlib.Path) -> None:
        """Writes all that `load` needs into a new folder.

        Raises:
          DataError: the folder cannot be written.
        """
        block = dict(self.block)
        if block.get('path'):
            block['path'] = _copy_files(block, folder / _FILES)
        cache.write_json(folder / _FILE, {'block': block, 'learned': self.learned})


class _Recording(Training):
    """Training that notes what was learned."""

    learned: Any = None

    def remember(self, kind: str, arguments: dict[str, Any], train: Callable[[], Any]) -> Any:
        value = super().remember(kind, arguments, train)
        object.__setattr__(self, 'learned', value)  # the base class is frozen
        return value


class _Replaying(Training):
    """Training that has been done before."""

    learned: Any = None

    def remember(self, kind: str, arguments: dict[str, Any], train: Callable[[], Any]) -> Any:
        return self.learned


def build(
    block: Mapping[str, Any],
    texts: Callable[[], Iterator[str]],
    cache_dir: pathlib.Path,
    digest: str,
) -> KeptTokenizer:
    """Builds a tokenizer, training it if it learns from text and is not in the cache.

    Args:
      block: dict(kind=..., arguments).
      texts: streams the training split's texts.
      cache_dir: where trained tokenizers are kept.
      digest: the text's digest.

    Raises:
      ConfigError: a block that does not fit.
      DataError: missing files, or text that the tokenizer cannot be made from.
    """
    component = check_block(TOKENIZERS, block, 'tokenizer', 'config.data.tokenizer')
    training = _Recording(texts, cache_dir, digest)
    tokenizer = component(training, **arguments(block))
    return KeptTokenizer(tokenizer, dict(block), training.learned)


def load(folder: pathlib.Path) -> KeptTokenizer:
    """Loads what `KeptTokenizer.save` wrote.

    Raises:
      DataError: nothing there, or damaged.
    """
    saved = cache.read_json(folder / _FILE)
    if saved is None:
        raise DataError(f'{folder / _FILE} is missing or damaged; prepare the data again.')
    block = dict(saved['block'])
    if block.get('path'):
        block['path'] = str(folder / block['path'])
    component = check_block(TOKENIZERS, block, 'tokenizer', f'{folder}')
    training = _Replaying(lambda: iter(()), folder)
    object.__setattr__(training, 'learned', saved['learned'])
    return KeptTokenizer(component(training, **arguments(block)), block, saved['learned'])


def _copy_files(block: Mapping[str, Any], folder: pathlib.Path) -> str:
    """Copies the files that a block names; returns the path to them from the folder above."""
    path = pathlib.Path(block['path']).expanduser()
    folder.mkdir(parents=True)
    if path.is_file():
        shutil.copyfile(path, folder / path.name)
        return f'{_FILES}/{path.name}'
    known = parameters(check_block(TOKENIZERS, block, 'tokenizer', 'config.data.tokenizer'))
    names = {str(block.get(name, p.default)) for name, p in known.items() if name != 'path'}
    for name in {*names, *_USUAL}:
        if name and (path / name).is_file():
            shutil.copyfile(path / name, folder / name)
    return _FILES
