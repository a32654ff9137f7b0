"""What every command does alike: quiet devices, one-line errors, exit codes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from effjax.core.errors import ConfigError, EffjaxError
from effjax.core.registry import suggest


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Runs a command's `main(argv)`; an `EffjaxError` becomes one line on stderr and exit code 1.

    `--traceback` anywhere in `argv` shows the traceback instead.
    """
    try:
        return main([a for a in argv if a != '--traceback']) or 0
    except EffjaxError as error:
        if '--traceback' in argv:
            raise
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command that takes `--config.KEY=VALUE` beside its own arguments.

    Returns:
      The arguments, and the overrides as 'KEY=VALUE'.

    Raises:
      ConfigError: an argument that is neither, or a value that it does not take.
    """

    def fail(message: str) -> NoReturn:
        raise ConfigError(f'{message}; see --help.')  # argparse's own way fills a screen

    parser.error = fail  # type: ignore[method-assign]
    prefix = '--config.'
    args, unknown = parser.parse_known_args([a for a in argv if not a.startswith(prefix)])
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigError(
            f'unknown argument {unknown[0]!r}; keys of the config are set as --config.KEY=VALUE.'
            + suggest(unknown[0].partition('=')[0], flags)
        )
    return args, [a.removeprefix(prefix) for a in argv if a.startswith(prefix)]


def quiet_platform() -> None:
    """Keeps jax from probing TPUs on a machine without one, and from logging about it.

    With `libtpu` installed beside a CPU or GPU build, jax prints start-up errors of the TPU that
    is not there. The choice is left alone when the user has made one.
    """
    if 'JAX_PLATFORMS' not in os.environ and not _has_accelerator():
        os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


def _has_accelerator() -> bool:
    return any(
        os.path.exists(path)
        for path in (
            '/dev/nvidiactl',
            '/dev/nvidia0',
            '/dev/accel0',
            '/dev/vfio/0',
            '/dev/kfd',
            '/dev/dxg',
        )
    )
