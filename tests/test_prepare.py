"""`python -m effjax.prepare`: shards from a config, and training data from the shards."""

import json
import subprocess
import sys

import pytest

from effjax import data, prepare
from effjax.core.command import run_command

_CONFIG = """
from effjax.core.config import defaults

def get_config():
    config = defaults()
    config.steps = 1
    config.data = dict(kind='jsonl', path={path!r}, valid_fraction=0.3, cache={cache!r})
    return config
"""


@pytest.fixture
def config(tmp_path):
    """A config of a small corpus, as the command takes it."""
    texts = [f'document {i} of a few words' for i in range(30)]
    corpus = tmp_path / 'corpus.jsonl'
    corpus.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    path = tmp_path / 'config.py'
    path.write_text(_CONFIG.format(path=str(corpus), cache=str(tmp_path / 'cache')))
    return str(path)


def run(*argv):
    return run_command(prepare.main, argv)


def test_the_command_writes_what_training_reads(config, tmp_path, capsys):
    out = tmp_path / 'out'
    assert run(f'--config={config}', f'--output={out}', '--config.data.tokenizer.kind=char') == 1
    assert run(f'--config={config}', f'--output={out}', '--quiet') == 0
    shown = capsys.readouterr().out
    assert str(out) in shown and 'train: ' in shown and 'valid: ' in shown
    ready = data.build({'kind': 'prepared', 'path': str(out)}, seq_len=8)
    assert ready.info.vocab_size == 257
    assert ready.eval('valid', 2, 8).bytes > 0


def test_a_mixture_becomes_a_folder_a_source(config, tmp_path):
    source = {'kind': 'jsonl', 'path': str(tmp_path / 'corpus.jsonl'), 'valid_fraction': 0.3}
    block = {'kind': 'mixture', 'sources': {'a': source, 'b': source}, 'weights': {'a': 1, 'b': 1}}
    written = prepare.prepare(block, tmp_path / 'out', quiet=True)
    assert list(written) == [str(tmp_path / 'out' / name) for name in 'ab']
    ready = {name: {'kind': 'prepared', 'path': str(tmp_path / 'out' / name)} for name in 'ab'}
    mixed = data.build({**block, 'sources': ready}, seq_len=8)
    assert 'a/valid' in mixed.info.splits


def test_progress_is_a_line_now_and_then(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, '_SECONDS', 0.0)
    assert run(f'--config={config}', f'--output={tmp_path / "out"}') == 0
    assert 'train: ' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--outputs=x'], "unknown argument '--outputs=x'"),
        (['--config.data.kind=digits'], 'prepare a text source'),
        (
            ['--config.data.packing=x', '--config.data.kind=nothing'],
            "unknown data source 'nothing'",
        ),
    ],
)
def test_faults_are_one_line(config, tmp_path, capsys, argv, message):
    if 'digits' in argv[0]:
        (tmp_path / 'config.py').write_text(
            'from effjax.core.config import defaults\n\n\ndef get_config():\n'
            "    config = defaults()\n    config.steps = 1\n    config.data = dict(kind='x')\n"
            '    return config\n'
        )
    assert run(f'--config={config}', f'--output={tmp_path / "out"}', *argv) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and message in error


def test_help_is_quick_and_imports_little():
    program = (
        'import sys, runpy\n'
        "sys.argv = ['prepare', '--help']\n"
        'try:\n'
        "    runpy.run_module('effjax.prepare', run_name='__main__')\n"
        'except SystemExit:\n'
        '    pass\n'
        "heavy = {'jax', 'flax', 'orbax', 'grain', 'tensorflow_datasets', 'numpy'}\n"
        'print(sorted(heavy & set(sys.modules)))\n'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith('[]'), done.stdout + done.stderr
