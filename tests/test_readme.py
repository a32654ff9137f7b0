"""README's commands are the ones that work."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()


def test_shows_the_two_commands_and_they_exist():
    makefile = (ROOT / 'Makefile').read_text()
    for target in ('quickstart', 'test'):
        assert f'make {target}' in README
        assert re.search(rf'^{target}:', makefile, re.MULTILINE)


def test_shows_every_extra_and_the_plain_install():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    for extra in project['optional-dependencies']:
        assert f'| `{extra}` |' in README
    assert 'pip install -e ".[test]" -c constraints.txt' in README


def test_commands_and_options_exist():
    modules = set(re.findall(r'python -m (effjax\.\w+)', README))
    assert modules
    for module in modules:
        done = subprocess.run(
            [sys.executable, '-m', module, '--help'], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in README.splitlines() if f'python -m {module} ' in line]
        options = {o for line in lines for o in re.findall(r'(--\w+)', line.split(module)[1])}
        assert all(option in done.stdout for option in options), (module, options)


def test_the_first_config_is_valid(tmp_path):
    """The example of README, as it stands, checked up to its blocks."""
    from effjax.core.config import load
    from effjax.training import setup

    source = next(b for b in re.findall(r'```python\n(.*?)```', README, re.S) if 'get_config' in b)
    file = tmp_path / 'my.py'
    file.write_text(source)
    config = load(str(file), ['model.block=parallel', 'mesh.fsdp=8'])
    setup.check(config)
    assert config.model.mixer.kv_heads == 2


def test_the_kernel_example_runs(capsys):
    source = next(b for b in re.findall(r'```python\n(.*?)```', README, re.S) if 'kernels' in b)
    names: dict = {}
    exec(source, names)
    assert names['gradient'].shape == (2, 100, 32)
    out = capsys.readouterr().out
    assert "'implementation': 'xla'" in out and "'pallas_gpu': 'it needs a Hopper GPU" in out
    assert len(source.splitlines()) < 16


def test_the_kernels_page_names_what_there_is():
    """Every public operation, with its implementations in the order in which they are tried."""
    page = (ROOT / 'docs/kernels.md').read_text()
    rows = dict(re.findall(r'^\| `(\w+)` \| (.*?) \|', page, re.MULTILINE))
    for folder in sorted((ROOT / 'effjax/kernels').glob('*/op.py')):
        op = folder.parent.name
        said = re.search(r"^ +implementation: ('.*?)None", folder.read_text(), re.M | re.S)
        assert said and re.findall(r'`(\w+)`', rows[op]) == re.findall(r"'(\w+)'", said[1]), op


@pytest.mark.process
def test_quickstart_in_short(tmp_path):
    """What `make quickstart` runs, for a few seconds: its yardstick, its sample and its report."""
    command = [sys.executable, '-m', 'effjax.train', '--config=configs/quickstart.py']
    options = ['--config.budget=2steps', '--config.model.layers=1', '--config.model.width=32']
    options += ['--config.model.mixer.heads=2', '--config.finish.sample_tokens=8']
    done = subprocess.run(
        [*command, *options, f'--workdir={tmp_path}'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r'valid_all: .*bits_per_byte \d', done.stdout)
    assert re.search(r'held-out files: [\d.]+ bits/byte against [12]\.\d+ of gzip -9', done.stdout)
    assert 'sample:' in done.stdout
    assert (tmp_path / 'report.html').stat().st_size > 1000
