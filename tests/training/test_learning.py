"""Runs long enough to learn: below the unigram entropy, and as well in bf16 as in fp32."""

import collections
import json
import math
import pathlib

import numpy as np
import pytest

from effjax import train


def unigram_entropy(folder: pathlib.Path) -> float:
    """Nats a byte of a text whose bytes are drawn one by one."""
    counts = collections.Counter(b''.join(p.read_bytes() for p in folder.glob('*.txt')))
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def last_losses(folder: pathlib.Path, count: int) -> float:
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').open()]
    return float(np.mean([row['loss'] for row in rows[-count:]]))


@pytest.mark.ci
@pytest.mark.usefixtures('full_compile')
def test_a_tiny_model_falls_below_the_unigram_entropy(tiny, words, tmp_path):
    run = train.run(tiny('steps=300'), tmp_path)
    # Held-out documents of the same words: the loss is well below what counts of bytes can give.
    assert run.summary['eval']['valid']['loss'] < 0.7 * unigram_entropy(words)


@pytest.mark.ci
@pytest.mark.usefixtures('full_compile')
def test_bf16_learns_as_well_as_fp32(tiny, tmp_path):
    for kind in ('fp32', 'bf16'):
        train.run(tiny('steps=1000', f'precision.kind={kind}', 'evals={}'), tmp_path / kind)
    fp32, bf16 = (last_losses(tmp_path / kind, 100) for kind in ('fp32', 'bf16'))
    assert abs(bf16 / fp32 - 1) < 0.01
