"""`python -m effjax.prepare --config=FILE[:VARIANT] --output=DIR [--config.KEY=VALUE ...]`.

Tokenises the text of a config's `data` block once, into shards that training maps into memory.
Train from them with

    config.data = dict(kind='prepared', path='DIR')

which needs neither the source nor the libraries that read it. A mixture becomes one folder a
source, DIR/NAME.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core.command import parse_with_overrides, run_command
from effjax.core.errors import ConfigError

_SECONDS = 5.0  # between two lines of progress


def prepare(
    block: Mapping[str, Any], output: str | pathlib.Path, *, quiet: bool = False
) -> dict[str, dict[str, Any]]:
    """Writes prepared shards for a `data` block.

    Args:
      block: the block, with its `kind`.
      output: a folder that does not exist yet; of a mixture, one that will hold a folder a source.
      quiet: no progress on stderr.

    Returns:
      Folder -> manifest.

    Raises:
      ConfigError: a bad block, or one that is not text.
      DataError: missing or empty data, or a folder that exists or cannot be written.
    """
    from effjax.core.config import as_dict
    from effjax.data import cache, dataset, shards
    from effjax.data.mixture import Mixture

    block = as_dict(block)
    source = dataset.build_source(block, 'config.data')
    if source.modality != 'text' or isinstance(source, shards.PreparedSource):
        raise ConfigError(
            f'config.data.kind {block["kind"]!r} is not text to be tokenised; prepare a text '
            'source, such as text, jsonl, parquet or stdlib.'
        )
    folder = pathlib.Path(block.get('cache') or cache.root()).expanduser()
    kept = dataset.build_tokenizer(source, block.get('tokenizer'), folder)
    output = pathlib.Path(output).expanduser()
    members = {output: source}
    if isinstance(source, Mixture):
        members = {output / name: member for name, member in source.members.items()}
    progress = None if quiet else _Lines()
    return {
        str(path): shards.prepare(member, kept, path, progress=progress)
        for path, member in members.items()
    }


def main(argv: Sequence[str]) -> int:
    """The command."""
    args, overrides = _parse(argv)
    from effjax.core.config import load
    from effjax.data.shards import summary

    config = load(args.config, overrides)
    for path, manifest in prepare(config.data, args.output, quiet=args.quiet).items():
        print(f'{path}\n{summary(manifest)}')
    return 0


class _Lines:
    """Progress as a line on stderr every few seconds: it reads well in a log and on a terminal."""

    def __init__(self) -> None:
        self._start = self._shown = time.monotonic()

    def __call__(self, split: str, documents: int, raw_bytes: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self._shown >= _SECONDS:
            self._shown = now
            print(
                f'{split}: {documents:,} documents, {raw_bytes / 1e6:,.1f} MB, {tokens:,} tokens '
                f'after {now - self._start:.0f} s',
                file=sys.stderr,
                flush=True,
            )


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog='python -m effjax.prepare',
        description="Tokenises a config's text once, into shards for training.",
        epilog='Any key of the config can be set: --config.data.path=books '
        '--config.data.tokenizer.vocab_size=8192.',
        allow_abbrev=False,
    )
    parser.add_argument('--config', required=True, metavar='FILE[:VARIANT]', help='config file')
    parser.add_argument('--output', required=True, metavar='DIR', help='new folder to write')
    parser.add_argument('--quiet', action='store_true', help='no progress on stderr')
    parser.add_argument(
        '--traceback', action='store_true', help='show the traceback of an error in the input'
    )
    return parse_with_overrides(parser, argv)


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
