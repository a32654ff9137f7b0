"""What runs of selective copying leave on cards: read from their summaries, or refused."""

import json

import pytest

from experiments.selective_copy import publish


def run_of(folder, *, complete=True):
    folder.mkdir()
    summary = {
        'complete': complete, 'final_step': 3, 'params': 5,
        'eval': {'valid': {'accuracy': 0.5}}, 'environment': {'device': 'a chip', 'jax': '1'},
    }  # fmt: skip
    (folder / 'summary.json').write_text(json.dumps(summary))
    return folder


def test_results_and_facts(tmp_path):
    runs = [f'mamba={run_of(tmp_path / "a")}', f's4d={run_of(tmp_path / "b")}']
    publish.main(['--runs', *runs, f'--results={tmp_path}'])
    rows = json.loads((tmp_path / 'results.json').read_text())
    assert [(r['variant'], r['accuracy'], r['device']) for r in rows] == [
        ('mamba', 0.5, 'a chip'),
        ('s4d', 0.5, 'a chip'),
    ]
    facts = json.loads((tmp_path / 'facts.json').read_text())
    assert facts['lines']['s4d'] == 'accuracy 0.5000 after 3 steps'


def test_what_is_no_finished_run_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit, match='does not exist: name the folder of a run of mamba'):
        publish.main(['--runs', f'mamba={tmp_path}'])
    cut = run_of(tmp_path / 'cut', complete=False)
    with pytest.raises(SystemExit, match='has not ended; the command that began it goes on'):
        publish.main(['--runs', f'mamba={cut}'])
    with pytest.raises(SystemExit):
        publish.main(['--runs', 'hyena=x'])
    assert 'is not VARIANT=FOLDER with one of mamba, s4d' in capsys.readouterr().err
