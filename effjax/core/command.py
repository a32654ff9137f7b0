"""What every command does alike: quiet devices, one-line errors, exit codes."""

import os
import sys
from collections.abc import Callable, Sequence

from effjax.core.errors import EffjaxError


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
