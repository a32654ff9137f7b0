"""`python -m effjax.study.worker PARENT`: runs the orders that a study writes to standard input."""

import json
import os
import sys
import threading
import time

from effjax.core.command import quiet_platform
from effjax.study.stopping import Leaving, Stopped


def main() -> int:
    """Runs an order a line, and answers each with a line; standard output carries nothing else."""
    threading.Thread(target=_die_with, args=(int(sys.argv[1]),), daemon=True).start()
    with os.fdopen(os.dup(1), 'w') as answers:
        os.dup2(2, 1)  # what a run prints goes with the errors
        try:
            with Leaving():
                quiet_platform()
                from effjax.study.execute import worker

                for line in sys.stdin:
                    print(worker(json.loads(line)), file=answers, flush=True)
        except Stopped:
            print('stopped', file=answers, flush=True)
    return 0


def _die_with(parent: int) -> None:
    """Ends this process once the study's is gone, which may begin again at any moment."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os._exit(1)


if __name__ == '__main__':
    sys.exit(main())
