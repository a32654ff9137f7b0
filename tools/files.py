"""Writes docs/files.md: every file of the package with what its docstring says first.

Usage: python tools/files.py           (a test says when it is due)
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = ROOT / 'docs' / 'files.md'
HEAD = """# Every file and its job

Made from the files' own docstrings by `python tools/files.py`. The way through them is in
[architecture.md](architecture.md).
"""


def job(file: pathlib.Path) -> str:
    """Returns the first paragraph of a module's docstring; of a command, what it does too."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ''
    paragraphs = [' '.join(p.split()) for p in text.split('\n\n')]
    usage = re.fullmatch(r'`python -m [^`]*`\.?', paragraphs[0])
    if not usage:
        return paragraphs[0]
    return paragraphs[0] + ' ' + paragraphs[1].split('. ')[0].rstrip('.') + '.'


def page() -> str:
    """Returns the page."""
    files = [f for f in sorted((ROOT / 'effjax').rglob('*.py')) if f.name != '__init__.py']
    files += list((ROOT / 'configs').glob('*.py'))
    out = [HEAD]
    folders = sorted({f.parent for f in files}, key=lambda p: p.relative_to(ROOT).as_posix())
    for folder in folders:
        out.append(f'\n## `{folder.relative_to(ROOT).as_posix()}/`\n')
        init = folder / '__init__.py'
        if init.is_file() and job(init):
            out.append(f'{job(init)}\n')
        out += ['| file | job |', '|---|---|']
        mine = sorted(f for f in files if f.parent == folder)
        out += [f'| `{f.name}` | {job(f).replace("|", chr(92) + "|")} |' for f in mine]
    return '\n'.join(out) + '\n'


if __name__ == '__main__':
    TARGET.write_text(page())
