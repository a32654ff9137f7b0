"""Which part may import which, read from the source, so that lazy imports count too."""

import ast
import functools
import json
import pathlib
import re
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'effjax'

# Each part may import itself and what stands in an earlier row, never its neighbour in its row.
ORDER = (
    ('core',),
    ('kernels',),
    ('precision', 'parallel'),
    ('layers',),
    ('reduce',),
    ('models',),
    ('tasks', 'growth'),
    ('training',),
    ('study',),
    ('commands',),  # the modules at the top: effjax/train.py, ...
)
RANK = {part: rank for rank, row in enumerate(ORDER) for part in row}
# Beside the order: they import core only, and all but core and kernels may import them.
ASIDE = ('data', 'costs')
# What a kernel may import: arrays, and the errors that its message needs.
KERNEL_MODULES = {'jax', 'numpy'}

# Import name -> name of the distribution, where the two differ.
DISTRIBUTIONS = {
    'orbax': 'orbax-checkpoint',
    'tensorflow_datasets': 'tensorflow-datasets',
    'ml_collections': 'ml-collections',
    'PIL': 'pillow',
    'pynvml': 'nvidia-ml-py',
    'tensorflow': 'tensorflow-cpu',
    'apache_beam': 'apache-beam',
}
# Always installed with a core dependency, and part of its public face.
COMES_WITH = {
    'ml_dtypes': 'jax',
    'scipy': 'jax',
    'array_record': 'grain',
    'etils': 'orbax-checkpoint',
}

EXPORT = re.compile(r'^(effjax(?:\.\w+)+)(?::\w+)?$')


class Import(NamedTuple):
    """One import: where it stands, the module, the names taken from it, and whether it is lazy."""

    file: pathlib.Path
    line: int
    module: str
    names: tuple[str, ...]
    lazy: bool

    def __str__(self) -> str:
        return f'{self.file.relative_to(ROOT)}:{self.line} imports {self.module}'


def module_name(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports_of(file: pathlib.Path) -> list[Import]:
    """Returns the imports of a file; registry entries 'effjax.x.y:Name' are imports too."""
    tree = ast.parse(file.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        lazy = id(node) in inside
        if isinstance(node, ast.Import):
            found += [Import(file, node.lineno, a.name, (), lazy) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{file}:{node.lineno}: relative import'
            names = tuple(a.name for a in node.names)
            found.append(Import(file, node.lineno, node.module or '', names, lazy))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            entry = EXPORT.match(node.value)
            if entry and id(node) not in docstrings and is_module(entry[1]):
                found.append(Import(file, node.lineno, entry[1], (), True))
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split('.'))
    return path.is_dir() or path.with_suffix('.py').is_file()


def part_of(module: str) -> str | None:
    """Returns the part that a module of effjax belongs to; None for the package itself."""
    names = module.split('.')
    if len(names) == 1:
        return None
    return names[1] if (PACKAGE / names[1]).is_dir() else 'commands'


def modules_taken(imported: Import) -> list[str]:
    """Returns the modules meant: `from effjax.core import config` means effjax.core.config."""
    inner = [f'{imported.module}.{n}' for n in imported.names]
    modules = [m for m in inner if is_module(m)]
    return modules if modules and len(modules) == len(inner) else [imported.module, *modules]


FILES = sorted(PACKAGE.rglob('*.py'))


@functools.cache
def imports() -> list[Import]:
    """All of them; read by the first test that asks, not by every process that collects tests."""
    return [i for file in FILES for i in imports_of(file)]


def internal() -> list[Import]:
    return [i for i in imports() if i.module.split('.')[0] == 'effjax']


def external() -> list[Import]:
    ours = {*sys.stdlib_module_names, 'effjax'}
    return [i for i in imports() if i.module.split('.')[0] not in ours]


def allowed(importer: str, module: str) -> bool:
    imported = part_of(module)
    if imported is None or imported == importer:
        return True
    if importer == 'costs' and re.fullmatch(r'effjax\.kernels\.\w+\.cost', module):
        return True
    if importer in ASIDE:
        return imported == 'core'
    if imported in ASIDE:
        return importer not in ('core', 'kernels')
    return RANK[imported] < RANK[importer]


def test_every_part_has_a_place_in_the_order():
    parts = {p.name for p in PACKAGE.iterdir() if p.is_dir() and not p.name.startswith('__')}
    assert parts <= {*RANK, *ASIDE}


def test_imports_run_one_way():
    wrong = []
    for imported in internal():
        importer = part_of(module_name(imported.file))
        if importer is None:
            continue
        wrong += [str(imported) for m in modules_taken(imported) if not allowed(importer, m)]
    assert not wrong, '\n'.join(wrong)


def test_private_names_stay_in_their_folder():
    wrong = []
    for imported in internal():
        private = [n for n in (*imported.module.split('.'), *imported.names) if is_private(n)]
        if private and part_of(module_name(imported.file)) != part_of(imported.module):
            wrong.append(f'{imported}: {private}')
    for file in FILES:
        bound = bound_modules(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Attribute) or not is_private(node.attr):
                continue
            if isinstance(node.value, ast.Name) and node.value.id in bound:
                other = part_of(bound[node.value.id])
                if other != part_of(module_name(file)):
                    wrong.append(f'{file}:{node.lineno}: {node.value.id}.{node.attr}')
    assert not wrong, '\n'.join(wrong)


def is_private(name: str) -> bool:
    return name.startswith('_') and not name.startswith('__')


def bound_modules(file: pathlib.Path) -> dict[str, str]:
    """Returns local name -> module of effjax, for modules that a file imports."""
    bound = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('effjax'):
            for a in node.names:
                if is_module(f'{node.module}.{a.name}'):
                    bound[a.asname or a.name] = f'{node.module}.{a.name}'
    return bound


def test_kernels_know_arrays_only():
    inside, outside = internal(), external()
    wrong = [
        str(i)
        for i in imports()
        if part_of(module_name(i.file)) == 'kernels'
        and not i.module == i.file.stem == 'tokamax'  # an extra, imported where it is asked for
        and (
            (i in outside and i.module.split('.')[0] not in KERNEL_MODULES)
            or (i in inside and part_of(i.module) == 'core' and i.module != 'effjax.core.errors')
        )
    ]
    assert not wrong, '\n'.join(wrong)


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    core = {distribution(r) for r in project['dependencies']}
    extras = {distribution(r) for rs in project['optional-dependencies'].values() for r in rs}
    wrong = []
    for imported in external():
        name = imported.module.split('.')[0]
        wanted = COMES_WITH.get(name) or DISTRIBUTIONS.get(name) or name
        known = core | extras if imported.lazy else core
        if canonical(wanted) not in known:
            wrong.append(f'{imported}, which is {"no extra" if imported.lazy else "not core"}')
    assert not wrong, '\n'.join(wrong)


def distribution(requirement: str) -> str:
    return canonical(re.split(r'[\[<>=!~; ]', requirement)[0])


def canonical(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


COMMANDS = sorted(
    file.stem for file in PACKAGE.glob('*.py') if "__name__ == '__main__'" in file.read_text()
)


@pytest.mark.parametrize('command', COMMANDS)
def test_help_is_quick(command):
    """What takes the seconds is not imported: the time itself depends on the machine."""
    program = (
        'import json, runpy, sys\n'
        f'sys.argv = ["effjax.{command}", "--help"]\n'
        'try:\n'
        f'  runpy.run_module("effjax.{command}", run_name="__main__")\n'
        'except SystemExit as e:\n'
        '  assert not e.code, e.code\n'
        'print("\\n" + json.dumps(sorted({m.split(".")[0] for m in sys.modules})))\n'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '--' in done.stdout
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    heavy = {'flax', 'orbax', 'grain', 'tensorflow_datasets', 'tensorflow', 'torch', 'optax'}
    assert not loaded & heavy


def test_the_core_needs_neither_tensorflow_nor_torch():
    """Imports every module with the optional packages hidden, whether installed or not."""
    hidden = ('tensorflow', 'torch', 'apache_beam', 'transformers', 'tokamax', 'wandb', 'pynvml')
    program = f"""
import importlib, importlib.abc, json, pkgutil, sys
class Hidden(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {hidden!r}:
      raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hidden())
import effjax
modules = [m.name for m in pkgutil.walk_packages(effjax.__path__, 'effjax.')]
for name in modules:
  importlib.import_module(name)
print(json.dumps([len(modules), sorted(m for m in {hidden!r} if m in sys.modules)]))
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, loaded = json.loads(done.stdout.splitlines()[-1])
    assert count >= len([f for f in FILES if f.name != '__init__.py'])
    assert not loaded
