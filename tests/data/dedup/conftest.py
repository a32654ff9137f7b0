"""Texts for the tests of deduplication, and edits that lower their similarity by a known amount."""

import pathlib
import random
import sysconfig

import pytest

# Some of the standard library: prose in code, tables that resemble each other, long and short.
FOLDERS = (
    'asyncio',
    'collections',
    'concurrent',
    'email',
    'encodings',
    'html',
    'http',
    'importlib',
)


@pytest.fixture(scope='session')
def library() -> dict[str, str]:
    """About 250 source files of the standard library, by name."""
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    files = sorted(f for name in FOLDERS for f in (root / name).rglob('*.py'))
    assert len(files) > 150
    return {f.relative_to(root).as_posix(): f.read_text(errors='replace') for f in files}


def edited(words: list[str], jaccard: float, draw: random.Random, n: int = 5) -> list[str]:
    """Replaces words, evenly spread, so that the n-grams have about this similarity.

    k edits that lie apart take n k of S n-grams away and bring as many: J = (S - nk) / (S + nk).
    """
    count = round((len(words) - n + 1) * (1 - jaccard) / (n * (1 + jaccard)))
    out, step = list(words), len(words) / max(count, 1)
    for k in range(count):
        at = int(k * step + draw.random() * max(step - n, 1))
        out[min(at, len(out) - 1)] = f'edit{draw.getrandbits(60)}'
    return out


@pytest.fixture(scope='session')
def edit():
    """`edited(words, jaccard, draw, n)`."""
    return edited
