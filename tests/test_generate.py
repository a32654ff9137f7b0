"""`effjax.generate`: text from a run's checkpoint, and text longer than the model's positions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import generate, models
from effjax.core.command import run_command
from effjax.core.config import as_dict, defaults
from effjax.core.errors import CheckpointError, ConfigError
from effjax.models.decode import Sampling, complete
from effjax.models.decoder import Decoder
from effjax.models.setup import Setup


class Letters:
    """a..z are 1..26, 0 separates documents."""

    bos_id = 0

    def encode(self, text):
        return np.array([ord(c) - 96 for c in text])

    def decode(self, ids):
        return ''.join(chr(96 + i) for i in ids)


def next_letter(max_len):
    """A decoder whose most likely next token is always the one after the last, z ending."""

    def make():
        return Decoder(
            Setup(seq_len=max_len), vocab_size=27, width=27, layers=1, tied=False,
            mixer={'kind': 'attention', 'heads': 1}, ffn=None, positions={'kind': 'none'},
            rngs=nnx.Rngs(0),
        )  # fmt: skip

    graphdef, abstract = models.split(nnx.eval_shape(make))
    arrays = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
    params = arrays['params']
    params['norm']['scale'] += 1
    params['embedding']['table'] += jnp.eye(27)
    params['head'] += jnp.roll(jnp.eye(27), 1, axis=1)
    return graphdef, arrays


def test_completes_until_the_document_ends():
    text = complete(*next_letter(128), Letters(), 'uv', max_len=128, tokens=40)
    assert text == 'wxyz'


def test_goes_on_beyond_the_positions_of_the_model():
    text = complete(*next_letter(8), Letters(), 'abc', max_len=8, tokens=15)
    assert text == 'defghijklmnopqr'


def test_an_empty_prompt_begins_a_document():
    assert complete(*next_letter(16), Letters(), '', max_len=16, tokens=3) == 'abc'


def test_sampling_depends_on_the_seed():
    def draw(seed):
        sampling = Sampling(temperature=5.0)
        return complete(
            *next_letter(16), Letters(), 'a', max_len=16, tokens=12, sampling=sampling, seed=seed
        )

    assert draw(1) == draw(1) != draw(2)


def test_nothing_to_generate_is_refused():
    with pytest.raises(ConfigError, match='cannot generate 0 tokens'):
        complete(*next_letter(8), Letters(), 'a', max_len=8, tokens=0)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run of two steps on a few bytes of text."""
    from effjax import train

    folder = tmp_path_factory.mktemp('generate')
    (folder / 'a.txt').write_text('the quick brown fox jumps over the lazy dog. ' * 100)
    config = as_dict(defaults())
    config |= {'steps': 2, 'seq_len': 32, 'batch_size': 2, 'precision': {'kind': 'fp32'}}
    config['data'] = {'kind': 'text', 'path': str(folder / 'a.txt'), 'cache': str(folder / 'c')}
    config['model'] = {
        'kind': 'decoder', 'width': 16, 'layers': 1, 'ffn': None,
        'mixer': {'kind': 'attention', 'heads': 2},
    }  # fmt: skip
    config['log'] |= {'progress': False, 'tensorboard': False}
    train.run(config, folder / 'run')
    return folder / 'run'


def test_loads_a_run_and_generates(run, capsys):
    argv = [f'--run={run}', '--prompt=the ', '--tokens=10', '--temperature=0']
    assert run_command(generate.main, argv) == 0
    text = capsys.readouterr().out
    assert text.startswith('the ') and len(text) > len('the \n')
    assert generate.load(run).step == 2


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert run_command(generate.main, [f'--run={tmp_path / "none"}']) == 1
    error = capsys.readouterr().err
    assert 'holds no run (no config.json)' in error and error.count('\n') == 1
    with pytest.raises(CheckpointError, match='give the --workdir of one'):
        generate.load(tmp_path)


def test_a_classifier_generates_no_text(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'model': {'kind': 'vit'}}))
    with pytest.raises(ConfigError, match="holds a 'vit', which generates no text"):
        generate.load(tmp_path)
