"""Sums up pytest's results: the slowest tests, what was skipped and why, and one closing line.

Usage: python tools/summary.py FOLDER       (FOLDER holds the JUnit XML of each tier)
"""

import pathlib
import sys
import xml.etree.ElementTree as ET
from collections import Counter

SLOWEST = 25


def outcome(case: ET.Element) -> str:
    """Returns 'passed', 'failed' or 'skipped'."""
    if case.find('failure') is not None or case.find('error') is not None:
        return 'failed'
    return 'skipped' if case.find('skipped') is not None else 'passed'


def main(folder: str) -> None:
    cases = []
    for path in sorted(pathlib.Path(folder).glob('*.xml')):
        cases += [(path.stem, case) for case in ET.parse(path).iter('testcase')]
    if not cases:
        print('No test ran.')
        return

    def name(case: ET.Element) -> str:
        return f'{case.get("classname")}::{case.get("name")}'

    print(f'\nThe slowest {SLOWEST} tests:')
    slow_first = sorted(cases, key=lambda pair: -float(pair[1].get('time', 0)))
    for tier, case in slow_first[:SLOWEST]:
        print(f'{float(case.get("time", 0)):7.1f} s  {tier:8s} {name(case)}')
    for tier, case in cases:
        if outcome(case) == 'skipped':
            print(f'skipped: {tier} {name(case)}: {case.find("skipped").get("message")}')
        if outcome(case) == 'failed':
            print(f'FAILED: {tier} {name(case)}')
    count = Counter(outcome(case) for _, case in cases)
    print(f'{count["passed"]} passed, {count["failed"]} failed, {count["skipped"]} skipped')


if __name__ == '__main__':
    main(sys.argv[1])
