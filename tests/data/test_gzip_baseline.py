"""gzip's bits per byte."""

import shutil
import subprocess

import pytest

from effjax.data.documents import Document
from effjax.data.gzip_baseline import gzip_baseline


def test_counts_are_sums_over_documents():
    texts = ['abc' * 100, 'é' * 50]
    result = gzip_baseline(Document(str(i), t, 's') for i, t in enumerate(texts))
    assert result['documents'] == 2
    assert result['bytes'] == 400
    assert result['bits_per_byte'] == 8 * result['compressed_bytes'] / 400
    assert gzip_baseline([])['bits_per_byte'] == 0


@pytest.mark.skipif(not shutil.which('gzip'), reason='no gzip program to compare with')
def test_equals_the_gzip_program():
    text = ''.join(f'line {i * i}\n' for i in range(2000))
    packed = subprocess.run(
        ['gzip', '-9', '-n', '-c'], input=text.encode(), capture_output=True, check=True
    ).stdout
    # The program and the library may choose other matches: a few bytes.
    ours = gzip_baseline([Document('a', text, 's')])['compressed_bytes']
    assert abs(ours - len(packed)) <= 0.01 * len(packed)
