"""Kernels import jax, numpy and the error classes, and nothing else of effjax."""

import ast
import sys

ALLOWED = ('jax', 'numpy', 'effjax.kernels', 'effjax.core.errors')


def test_kernels_import_little(repository):
    wrong = []
    for path in sorted((repository / 'effjax' / 'kernels').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or '']
            for name in names:
                standard = name.split('.')[0] in sys.stdlib_module_names
                if not standard and not name.startswith(ALLOWED):
                    wrong.append(f'{path.name}: {name}')
    assert not wrong
