"""The peers of experiments/benchmarks/train_step, at a shape that a CPU runs in seconds."""

import importlib.util
import json
import subprocess
import sys

import pytest


def run_peer(repository, name: str) -> dict:
    command = [sys.executable, '-m', f'experiments.benchmarks.train_step.peers.{name}']
    done = subprocess.run(
        [*command, '--smoke', '--steps=2'], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', ['plain_jax', 'hf'])
def test_peer_trains_the_shape_it_says(repository, name):
    if name == 'hf' and not importlib.util.find_spec('transformers'):
        pytest.skip("needs the 'hf' extra, which CI does not install")
    result = run_peer(repository, name)
    # ln 64 = 4.16 is the loss of a model that knows nothing; random tokens teach little.
    assert 0 < result['loss'] < 4.3
    assert result['params'] == 24736
    assert result['tok_s'] > 0
    assert len(result['rounds_s']) == 5
