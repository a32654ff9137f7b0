"""`--dry_run`: published numbers of published shapes, shardings, and nothing trained."""

import pytest

from effjax.core import config as config_lib
from effjax.core.errors import ConfigError
from effjax.training.dryrun import dry_run


@pytest.mark.parametrize(
    ('variant', 'parts'),
    [
        ('gpt2', ['parameters: 124,439,808', '576 MiB']),
        ('llama_7b', ['parameters: 6,738,415,616', '1024 MiB']),
        ('gpt3', ['parameters: 174,604,259,328']),
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


def test_it_refuses_what_a_run_would_refuse(tiny):
    with pytest.raises(ConfigError, match='heads'):
        dry_run(tiny('model.mixer.heads=5'))
