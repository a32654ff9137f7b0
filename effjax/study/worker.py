"""`python -m effjax.study.worker`: runs the orders that a study writes to standard input."""

import json
import os
import sys

from effjax.core.command import quiet_platform
from effjax.study.stopping import Leaving, Stopped


def main() -> int:
    """Runs an order a line, and answers each with a line; standard output carries nothing else."""
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


if __name__ == '__main__':
    sys.exit(main())
