"""The decoding benchmark runs, holds states to what is charged, and its table gives ratios."""

import json

import pytest

from experiments.benchmarks.decode import run


@pytest.mark.ci
def test_it_runs_small(tmp_path, capsys):
    out = tmp_path / 'rows.json'
    argv = ['--config=configs/lm.py', '--mixers=retnet,attention', '--contexts', '12', '40',
            '--batch=2', '--steps=3', '--rounds=2', '--piece=16', f'--out={out}']  # fmt: skip
    run.main(argv)
    rows = {(r['mixer'], r['context']): r for r in json.loads(out.read_text())}
    assert set(rows) == {(m, c) for m in ('retnet', 'attention') for c in (12, 40)}
    assert rows['retnet', 12]['state_bytes'] == rows['retnet', 40]['state_bytes']
    # Two layers of keys and values of 64 bfloat16 for each of 28 tokens more.
    more = rows['attention', 40]['state_bytes'] - rows['attention', 12]['state_bytes']
    assert more == 28 * 2 * 2 * 64 * 2
    printed = capsys.readouterr().out
    assert 'Measured on a CPU' in printed and '| 40 | attention |' in printed


def test_the_table_says_what_did_not_fit():
    rows = [
        {
            'mixer': 'a',
            'context': 8,
            'tokens_per_second': 50.0,
            'step_ms': 2.0,
            'state_bytes': 2048,
        },
        {
            'mixer': 'b',
            'context': 8,
            'tokens_per_second': 100.0,
            'step_ms': 1.0,
            'state_bytes': 1024,
        },
        {'mixer': 'b', 'context': 99, 'error': 'does not fit into memory'},
    ]
    shown = run.table(rows, 'a')
    assert '| 8 | b | 100 | 2.00x | 1.000 | 1.0 |' in shown
    assert '| 99 | b | does not fit into memory | | | |' in shown
