"""`python -m effjax.study.worker`: runs the jobs that a study hands over on standard input."""

import json
import sys

from effjax.core.command import quiet_platform


def main() -> int:
    """Reads an order and runs it."""
    quiet_platform()
    from effjax.study.execute import worker

    return worker(json.load(sys.stdin))


if __name__ == '__main__':
    sys.exit(main())
