"""Every row of `effjax.methods` names real tests and a card, builds, and trains two steps."""

import json
import pathlib
import subprocess
import sys

import pytest

from effjax import methods, models, train
from effjax.core import config as config_lib
from effjax.core.errors import ConfigError
from effjax.study import pairs

METHODS = methods.load()
# Config -> summary of its run: some rows, as those of costs, are one config by several names.
TRAINED: dict[str, dict] = {}


def load(method: methods.Method, repository: pathlib.Path):
    return config_lib.load(str(repository / method.base), method.config)


@pytest.mark.parametrize('name', METHODS)
def test_a_row_is_backed(name, repository):
    method = METHODS[name]
    assert method.tests and method.verdict and method.title
    for path in (*method.tests, *method.studies):
        assert (repository / path).exists(), f'{name} names {path}, which is not there'


@pytest.mark.parametrize('name', METHODS)
def test_a_rows_config_builds(name, repository):
    config = config_lib.as_dict(load(METHODS[name], repository))
    if not config['model'].get('vocab_size') and config['model']['kind'] in ('decoder', 'encoder'):
        config['model']['vocab_size'] = 512
    if config['model']['kind'] == 'vit':
        config['model'] = {'image_size': 8, 'channels': 1, 'classes': 10, **config['model']}
    built = models.build(config)
    costs = built.model.cost(1, config['seq_len'])
    assert sum(cost.model_flops for cost in costs.values()) > 0


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize('name', METHODS)
def test_a_rows_config_trains(name, repository, tmp_path):
    combined = pairs.combine([METHODS[name]], repository)
    assert combined.config, combined.reason
    same = json.dumps({**combined.config, 'name': ''}, sort_keys=True)
    if same not in TRAINED:
        config = pairs.taught(combined.config, tmp_path / 'teacher')
        TRAINED[same] = train.run(config, tmp_path / 'run').summary
    summary = TRAINED[same]
    assert (
        summary['final_step'] == combined.config['steps'] and summary['ledger']['model_flops'] > 0
    )


def test_every_card_is_listed_and_every_technique_has_a_card(repository):
    cards = {p.stem for p in (repository / 'docs' / 'methods').glob('*.md')} - {'README'}
    assert cards <= set(METHODS)
    shapes = {name for name in METHODS if name.startswith(('cost-', 'gpt-', 'llama'))}
    assert set(METHODS) - shapes <= cards


def test_the_command(repository):
    def run(*args: str) -> subprocess.CompletedProcess:
        line = [sys.executable, '-m', 'effjax.methods', *args]
        return subprocess.run(line, capture_output=True, text=True, cwd=repository)

    assert 'albert' in run().stdout
    (row,) = json.loads(run('--json', 'palm').stdout)
    assert row['id'] == 'palm' and 'model.block=parallel' in row['config']
    assert '--config.model.share=2' in run('albert').stdout
    bad = run('albart')
    assert (
        bad.returncode == 1 and bad.stderr == "error: no method 'albart'. Did you mean 'albert'?\n"
    )


def test_a_row_needs_all_its_fields(tmp_path, monkeypatch):
    file = tmp_path / 'methods.toml'
    file.write_text('[x]\ntitle = "t"\n')
    monkeypatch.setattr(methods, 'FILE', file)
    with pytest.raises(ConfigError, match="row 'x' lacks or does not know: base, config, paper"):
        methods.load()
