"""What the repository promises beside its code: documents, packaging, no traces of a machine."""

import ast
import fnmatch
import importlib
import importlib.util
import pathlib
import re
import subprocess
import tomllib

import pytest

from effjax.core.config import MESH_AXES, as_dict, defaults, load

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'effjax'
DOCS = ROOT / 'docs'
METHODS = sorted(p.stem for p in (DOCS / 'methods').glob('*.md') if p.stem != 'README')


def tracked() -> list[pathlib.Path]:
    """Returns the repository's text files."""
    done = subprocess.run(
        ['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in done.stdout.split('\0') if name]
    return [f for f in files if f.suffix not in ('.gz', '.npz', '.png') and f.is_file()]


def test_no_traces_of_a_machine_or_a_registry():
    # Written so that this file does not find itself.
    hosts = r'https?://[^ ]*(' + '|'.join(('py' + 'pi', 'python' + 'hosted', 'debian\\.' + 'org'))
    paths = '|'.join(('/wor' + 'k/', '/ro' + 'ot/', '/far' + 'm/', 'bash_' + 'jobs'))
    pattern = re.compile(f'{hosts})|{paths}')
    wrong = []
    for file in tracked():
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if pattern.search(line):
                wrong.append(f'{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}')
    assert not wrong, '\n'.join(wrong)


def test_no_large_files():
    large = [f for f in tracked() if f.stat().st_size > 2**20]
    assert not large


def test_nothing_is_left_unfinished():
    words = re.compile('|'.join(('TO' + 'DO', 'FIX' + 'ME', 'X' + 'XX')))
    wrong = [
        f'{file.relative_to(ROOT)}:{number}'
        for file in tracked()
        if file.suffix == '.py'
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert not wrong, '\n'.join(wrong)


def test_every_module_and_public_function_says_what_it_does():
    wrong = []
    for file in sorted(PACKAGE.rglob('*.py')):
        tree = ast.parse(file.read_text())
        if not ast.get_docstring(tree):
            wrong.append(f'{file.relative_to(ROOT)}')
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != '_'
            if named and not ast.get_docstring(node):
                wrong.append(f'{file.relative_to(ROOT)}:{node.lineno}: {node.name}')
    assert not wrong, '\n'.join(wrong)


def test_files_page_is_current():
    spec = importlib.util.spec_from_file_location('files', ROOT / 'tools' / 'files.py')
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    assert files.TARGET.read_text() == files.page(), 'run: python tools/files.py'


# ---- packaging ---------------------------------------------------------------------------------


def test_what_is_not_python_is_packaged():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    patterns = project['tool']['setuptools']['package-data']['effjax']
    others = [
        f.relative_to(PACKAGE).as_posix()
        for f in tracked()
        if f.is_relative_to(PACKAGE) and f.suffix != '.py'
    ]
    assert all(any(fnmatch.fnmatch(f, p) for p in patterns) for f in others), others
    folders = {f.parent for f in PACKAGE.rglob('*.py')}
    assert all((folder / '__init__.py').is_file() for folder in folders)


def test_extras_and_constraints():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = {'test', 'cuda', 'tpu', 'tf', 'beam', 'hf', 'tokamax', 'wandb', 'notebooks'}
    assert set(project['optional-dependencies']) == extras
    assert project['requires-python'] == '>=3.12'
    pins = [line for line in (ROOT / 'constraints.txt').read_text().splitlines() if line[:1] != '#']
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', line) for line in pins)
    pinned = {re.sub(r'[-_.]+', '-', line.split('==')[0]).lower() for line in pins}
    wanted = project['dependencies'] + project['optional-dependencies']['test']
    names = {re.sub(r'[-_.]+', '-', re.split(r'[\[<>=]', r)[0]).lower() for r in wanted}
    assert names <= pinned


# ---- documents ---------------------------------------------------------------------------------


def test_links_between_documents_lead_somewhere():
    wrong = []
    for file in tracked():
        if file.suffix != '.md':
            continue
        for target in re.findall(r'\]\(([^)#]+)', file.read_text()):
            if not target.startswith('http') and not (file.parent / target).exists():
                wrong.append(f'{file.relative_to(ROOT)}: {target}')
    assert not wrong, '\n'.join(wrong)


def test_files_that_documents_name_exist():
    roots = (ROOT, PACKAGE)
    name = re.compile(r'`((?:[\w.-]+/)*[\w-]+\.(?:py|toml|md|txt|sh))(?:::?\w+)?`')
    made = {'config.json', 'my.py', 'input.txt', '<name>.py'}
    wrong = []
    for file in [*sorted(DOCS.glob('*.md')), ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']:
        if file.name == 'files.md':
            continue
        for found in name.findall(file.read_text()):
            bare = '/' not in found and list(ROOT.glob(f'effjax/**/{found}'))
            if found not in made and not bare and not any((r / found).exists() for r in roots):
                wrong.append(f'{file.relative_to(ROOT)}: {found}')
    assert not wrong, '\n'.join(wrong)


def keys(config: dict, prefix: str = '') -> list[str]:
    out = []
    for name, value in config.items():
        nested = isinstance(value, dict) and value and 'kind' not in value
        out += keys(value, f'{prefix}{name}.') if nested else [prefix + name]
    return out


def test_every_key_of_the_config_is_explained():
    text = (DOCS / 'configs.md').read_text()
    missing = [key for key in keys(as_dict(defaults())) if f'`{key}`' not in text]
    assert not missing
    assert all(axis in (DOCS / 'sharding.md').read_text() for axis in MESH_AXES)


@pytest.mark.parametrize(
    ('registry', 'document'),
    [
        ('effjax.models:MODELS', 'configs.md'),
        ('effjax.models.blocks:BLOCKS', 'configs.md'),
        ('effjax.layers.mixers:MIXERS', 'configs.md'),
        ('effjax.layers.ffn:FFNS', 'configs.md'),
        ('effjax.layers.norms:NORMS', 'configs.md'),
        ('effjax.layers.positions:POSITIONS', 'configs.md'),
        ('effjax.tasks:TASKS', 'configs.md'),
        ('effjax.precision:PRECISIONS', 'configs.md'),
        ('effjax.training:OPTIMIZERS', 'configs.md'),
        ('effjax.training:SCHEDULES', 'configs.md'),
        ('effjax.data:SOURCES', 'data.md'),
        ('effjax.data.tokenizers:TOKENIZERS', 'data.md'),
    ],
)
def test_every_kind_and_its_arguments_are_documented(registry, document):
    from effjax.core.registry import lookup, parameters

    module, _, name = registry.partition(':')
    kinds = getattr(importlib.import_module(module), name)
    text = (DOCS / document).read_text()
    missing = []
    for kind in kinds:
        arguments = () if name == 'BLOCKS' else parameters(lookup(kinds, kind, name))
        missing += [f'{kind}: {word}' for word in (kind, *arguments) if f'`{word}`' not in text]
    assert not missing


@pytest.mark.parametrize('method', METHODS)
def test_method_cards(method):
    text = (DOCS / 'methods' / f'{method}.md').read_text()
    for word in (
        '**What.**',
        '**Paper.**',
        '**Config.**',
        '**Cost.**',
        '**Tests.**',
        '**Verdict.**',
    ):
        assert word in text
    assert f'({method}.md)' in (DOCS / 'methods' / 'README.md').read_text()
    tests = re.findall(r'`(tests/[\w/.:]+)`', text.split('**Tests.**')[1])
    row = tomllib.loads((PACKAGE / 'methods.toml').read_text())[method]
    assert tests == row['tests']  # that they exist is checked beside the table
    assert f'**Verdict.** {row["verdict"]}.' in text
    lines = re.findall(r'^--config(.*)$', text, re.MULTILINE)
    load(str(ROOT / lines[0][1:]), [line.removeprefix('.') for line in lines[1:]])


CONFIGS = sorted((ROOT / 'configs').glob('*.py'))


@pytest.mark.parametrize('file', CONFIGS, ids=lambda f: f.stem)
def test_every_config_loads_and_says_its_command(file):
    config = load(str(file))
    assert config.name == file.stem
    assert f'--config=configs/{file.name}' in ast.get_docstring(ast.parse(file.read_text()))
