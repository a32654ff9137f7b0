"""TFDS builders of the two embedded sets, written as array_record without TensorFlow.

    from effjax.data import builders
    builders.prepare('effjax_digits').as_data_source(split='train')

Importing this package imports nothing; `register` imports a builder, and with it
tensorflow-datasets, after which `tfds.builder('effjax_digits', file_format='array_record')` works
too. The file format must be named: the default one needs TensorFlow when it is written.
"""

import contextlib
import importlib
import io
import pathlib
import sys
from typing import Any

from effjax.core.registry import lookup
from effjax.data import cache

BUILDERS = {
    'effjax_digits': 'effjax.data.builders.digits:EffjaxDigits',
    'effjax_stdlib': 'effjax.data.builders.stdlib:EffjaxStdlib',
}


def register(name: str) -> None:
    """Makes tensorflow-datasets know one of our builders.

    Raises:
      ConfigError: no such builder.
    """
    lookup(BUILDERS, name, 'TFDS builder')


def prepare(name: str, data_dir: str | pathlib.Path = '') -> Any:
    """Returns one of our builders, its files written if they were not yet.

    Args:
      name: a key of `BUILDERS`.
      data_dir: where datasets are kept; '' is a folder of effjax's cache.

    Raises:
      ConfigError: no such builder.
    """
    register(name)
    tfds = importlib.import_module('tensorflow_datasets')
    builder = tfds.builder(name, data_dir=folder(data_dir), file_format='array_record')
    # Written in a moment, so what tfds says and draws meanwhile is noise; an error is raised.
    with contextlib.redirect_stderr(io.StringIO()):
        download_and_prepare(builder)
    return builder


def download_and_prepare(builder: Any) -> None:
    """Writes a dataset's files if they were not yet; what tfds prints goes to stderr."""
    tfds = importlib.import_module('tensorflow_datasets')
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )


def folder(data_dir: str | pathlib.Path) -> str:
    """Returns where datasets are kept: `data_dir`, or a folder of the cache when it is ''."""
    return str(pathlib.Path(data_dir).expanduser() if data_dir else cache.root() / 'tfds')
