"""`--dry_run`: published numbers of published shapes, shardings, and nothing trained."""

import pytest

from effjax.core import config as config_lib
from effjax.core.errors import ConfigError, DataError
from effjax.training.dryrun import dry_run


@pytest.mark.parametrize(
    ('variant', 'parts'),
    [
        ('gpt2', ['parameters: 124,439,808', '576 MiB']),
        ('llama_7b', ['parameters: 6,738,415,616', '1024 MiB', ' TMACs']),
        ('gpt3', ['parameters: 174,604,259,328', '38.25 GiB']),
        ('vit_b', ['17.56 GMACs']),
    ],
)
def test_published_shapes(repository, variant, parts):
    shown = dry_run(config_lib.load(f'{repository}/configs/shapes.py:{variant}'))
    for part in parts:
        assert part in shown
    for word in ('model FLOPs', 'a token', 'memory a device', 'execution:', 'shardings'):
        assert word in shown


def test_it_counts_what_a_device_holds(tiny):
    shown = dry_run(tiny())
    # 3 x float32 of the parameters (with moments), and the two int32 of the state.
    assert 'one device' in shown and 'body/segment_0/slot_0/mixer/query/kernel' in shown
    assert '[layers 2, embed 16, heads 2, head_dim 8]' in shown


@pytest.mark.parametrize(
    ('overrides', 'error', 'message'),
    [
        (['model.mixer.heads=5'], ConfigError, 'heads'),
        (['model.vocab_size=100'], ConfigError, 'smaller than the tokenizer, which has 257 ids'),
        (['model.vocab_size=257', 'data.path=/no/where'], DataError, '/no/where'),
        (['evals.valid.split=vaild'], DataError, r"config.evals.valid.split.*mean 'valid'"),
        (['data.valid_fraction=0.0'], DataError, "no split 'valid'; it has train"),
        (['data.kind=none'], ConfigError, 'config.model.vocab_size must be at least 1'),
    ],
)
def test_it_refuses_what_a_run_would_refuse(tiny, overrides, error, message):
    with pytest.raises(error, match=message):
        dry_run(tiny(*overrides))


def test_it_says_when_it_looks_at_no_data(tiny):
    assert 'data: none' in dry_run(tiny('data.kind=none', 'model.vocab_size=300'))
    assert 'data: none' not in dry_run(tiny())


@pytest.mark.mesh
def test_it_says_what_is_not_sharded(tiny):
    shown = dry_run(tiny('mesh.data=1', 'mesh.tensor=4'))
    assert "mixer/query/kernel: axis 'heads' is not sharded over 'tensor': 2 is not" in shown


def test_a_recurrent_state_stays_float32(tiny):
    shown = dry_run(tiny('model.mixer={"kind": "linear_attention", "heads": 2}'))
    (line, *_) = [text for text in shown.splitlines() if 'decoding state of 1 x' in text]
    with_bf16, in_fp32 = (float(part.split()[0]) for part in line.split(': ')[1].split(', '))
    assert with_bf16 == in_fp32 > 0
