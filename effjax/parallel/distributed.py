"""Several processes: starting, telling the first one, sending its values to the others."""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from effjax.core.errors import ConfigError, DeviceError

_VARIABLES = ('EFFJAX_COORDINATOR', 'EFFJAX_PROCESSES', 'EFFJAX_PROCESS_ID')


def initialize(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> bool:
    """Connects this process to the others of its run; call it before any other use of jax.

    The three arguments come from the caller, else from EFFJAX_COORDINATOR, EFFJAX_PROCESSES and
    EFFJAX_PROCESS_ID; without them jax finds them itself under Slurm (inside `srun`), Open MPI
    and where TPU_WORKER_HOSTNAMES names several hosts. A single process does nothing.

    Args:
      coordinator: `host:port` of process 0; 'auto' lets jax find all three (plain TPU VMs, which
        nothing in the environment gives away).
      processes: number of processes.
      process_id: this process's number.

    Returns:
      Whether there are several processes.

    Raises:
      ConfigError: some of the three are missing or make no sense.
      DeviceError: the other processes could not be reached.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    given: list[Any] = [coordinator, processes, process_id]
    given = [os.environ.get(v) if g is None else g for g, v in zip(given, _VARIABLES, strict=True)]
    options: dict[str, Any] = {}
    if given[0] == 'auto':
        pass
    elif any(g is not None for g in given):
        host, count, number = _check(given)
        if count == 1:
            return False
        options = {'coordinator_address': host, 'num_processes': count, 'process_id': number}
    elif not _cluster():
        return False
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DeviceError(f'the processes of this run could not be joined: {reason}') from e
    return True


def is_primary() -> bool:
    """Returns whether this is process 0, the one that writes files and prints."""
    return jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """Returns process 0's value in every process; all must call it, at the same point.

    Args:
      value: a float (sent exactly, in one exchange), or anything JSON can hold (in two). All
        processes must pass a float, or none.
    """
    if jax.process_count() == 1:
        return value
    if isinstance(value, float):
        return float(_exchange(np.frombuffer(np.float64(value).tobytes(), np.uint8)).view('f8')[0])
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(_exchange(np.frombuffer(np.int64(len(text)).tobytes(), np.uint8)).view('i8')[0])
    padded = np.resize(text, size) if len(text) else np.zeros(size, np.uint8)
    return json.loads(_exchange(padded).tobytes().decode())


def _exchange(data: np.ndarray) -> np.ndarray:
    """Sends bytes: jax would round float64 and int64 to 32 bits."""
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).astype(np.uint8)


def _check(given: list[Any]) -> tuple[str, int, int]:
    missing = [v for g, v in zip(given, _VARIABLES, strict=True) if g is None]
    if missing:
        raise ConfigError(
            f'several processes need all of {", ".join(_VARIABLES)}; give {missing[0]}.'
        )
    host, count, number = given
    try:
        count, number = int(count), int(number)
    except ValueError as e:
        raise ConfigError(
            f'EFFJAX_PROCESSES and EFFJAX_PROCESS_ID must be numbers, got {count!r} and {number!r}.'
        ) from e
    if count < 1 or not 0 <= number < count or ':' not in str(host):
        raise ConfigError(
            'several processes need a coordinator host:port and a process id below the number of '
            f'processes, got {host!r}, id {number} of {count}.'
        )
    return str(host), count, number


def _cluster() -> bool:
    """Returns whether a launcher that jax understands started several processes."""
    for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'):
        if os.environ.get(name, '1').isdigit() and int(os.environ.get(name, '1')) > 1:
            return True
    return ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
