"""Configs that are hybrids or variants: each is built as it is; some train, made small."""

import pytest

from effjax import models, train
from effjax.core import config as config_lib
from effjax.core.errors import ConfigError
from effjax.study import pairs

NAMES = (
    'selective_copy.py', 'selective_copy.py:s4d', 'lm_based.py', 'lm_griffin.py',
    'lm_mamba2_attention.py', 'lm_reformer.py:reversible',
    'lm_retnet.py:conv', 'digits_mate.py',
)  # fmt: skip


def load(repository, name):
    return config_lib.load(str(repository / 'configs' / name))


@pytest.mark.parametrize('name', NAMES)
def test_a_config_builds_at_its_own_shape(name, repository):
    config = config_lib.as_dict(load(repository, name))
    data = {'image_size': 8, 'channels': 1, 'classes': 10} if 'digits' in name else {}
    config['model'] |= data or {'vocab_size': 512}
    model = models.build(config).model
    assert sum(c.model_flops for c in model.cost(1, config['seq_len']).values()) > 0


# The others are made of parts that train as rows of `effjax.methods`.
@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize('name', NAMES[5:])
def test_a_config_trains_two_steps(name, repository, tmp_path):
    done = train.run(pairs.tiny(load(repository, name)), tmp_path)
    ledger = done.summary['ledger']
    assert done.summary['final_step'] == 2
    assert ledger['hardware_flops'] >= ledger['model_flops'] > 0


def test_variants_are_named_and_others_refused(repository):
    assert load(repository, 'lm_reformer.py').model.block == 'sequential'
    assert load(repository, 'lm_reformer.py:reversible').model.block == 'reversible'
    with pytest.raises(ConfigError, match="no variant 'irreversible'; it has sequential, rever"):
        load(repository, 'lm_reformer.py:irreversible')
    assert load(repository, 'lm_retnet.py:conv').model.mixer.conv == 4
