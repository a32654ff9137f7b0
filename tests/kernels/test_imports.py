"""Kernels import jax, numpy and the error classes, and nothing else of effjax.

Two files import tokamax, an optional extra, and only where it is asked for.
"""

import ast
import sys

ALLOWED = ('jax', 'numpy', 'effjax.kernels', 'effjax.core.errors')


def test_kernels_import_little(repository):
    wrong = []
    for path in sorted((repository / 'effjax' / 'kernels').rglob('*.py')):
        tree = ast.parse(path.read_text())
        extra = path.stem if path.stem == 'tokamax' else None
        if extra:
            first = [
                a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names
            ]
            wrong += [f'{path.name}: {name} at once' for name in first if name == extra]
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or '']
            for name in names:
                standard = name.split('.')[0] in sys.stdlib_module_names
                if not standard and not name.startswith(ALLOWED) and name != extra:
                    wrong.append(f'{path.name}: {name}')
    assert not wrong
