"""`python -m effjax.study.worker`: runs the orders that a study writes to standard input."""

import json
import os
import sys

from effjax.core.command import quiet_platform


def main() -> int:
    """Runs an order a line, and answers each with a line; standard output carries nothing else."""
    quiet_platform()
    from effjax.study.execute import worker

    with os.fdopen(os.dup(1), 'w') as answers:
        os.dup2(2, 1)  # what a run prints goes with the errors
        for line in sys.stdin:
            answer = worker(json.loads(line))
            print(answer, file=answers, flush=True)
            if answer == 'stopped':
                break
    return 0


if __name__ == '__main__':
    sys.exit(main())
