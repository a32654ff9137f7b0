"""Configs: overrides, forms, budgets, and the sentences of their errors."""

import pytest

from effjax.core import config as config_lib
from effjax.core.errors import ConfigError


def make(**changes):
    config = config_lib.defaults()
    config.steps = 10
    config.update(changes)
    return config


def test_overrides_take_the_type_of_what_they_replace():
    config = config_lib.finish(
        make(),
        ['seed=3', 'clip_norm=2', 'log.progress=false', 'mesh.fsdp=4', 'name=7', 'budget=5m'],
    )
    assert (config.seed, config.mesh.fsdp, config.name) == (3, 4, '7')
    assert isinstance(config.clip_norm, float) and config.clip_norm == 2.0
    assert config.log.progress is False
    # The command line's extent replaces the file's.
    assert (config.steps, config.budget) == (0, '5m')


def test_overrides_reach_into_blocks_lists_and_new_arguments():
    config = make()
    config.model = {
        'kind': 'decoder',
        'segments': ({'pattern': ({'mixer': {'kind': 'attention', 'heads': 4}},), 'repeat': 2},),
    }
    out = config_lib.finish(
        config,
        [
            'model.segments.0.repeat=6',
            'model.segments.0.pattern.0.mixer.heads=2',
            'optimizer.b2=0.9',
            'evals.valid={"batches": 2}',
            'evals.valid.batches=5',
        ],
    )
    assert out.model.segments[0]['repeat'] == 6
    assert out.model.segments[0]['pattern'][0]['mixer']['heads'] == 2
    assert out.optimizer.b2 == 0.9
    assert out.evals.valid.batches == 5


def test_finish_copies():
    config = make()
    config_lib.finish(config, ['seed=9'])
    assert config.seed == 0


@pytest.mark.parametrize(
    ('override', 'words'),
    [
        ('modle.width=3', "unknown key config.modle. Did you mean 'model'?"),
        ('mesh.fsd=2', "unknown key config.mesh.fsd. Did you mean 'fsdp'?"),
        ('seed=abc', "config.seed must be int, got 'abc' (str)"),
        ('batch_size=2.5', "config.batch_size must be int, got '2.5' (float)"),
        ('log.progress=maybe', "config.log.progress must be true or false, got 'maybe'"),
        ('execution.remat=ful', "must be one of none, dots, full, got 'ful'. Did you mean 'full'?"),
        ('batch_size=0', 'config.batch_size must be at least 1'),
        ('accumulate=3', 'config.batch_size 32 is not divisible by config.accumulate 3'),
        ('mesh.data=-2', 'config.mesh.data must be -1 or at least 1'),
        ('mesh.tensor=-1', 'only one mesh axis may be -1, got data, tensor'),
        ('ema=1.5', 'config.ema is a decay below 1'),
        ('model=3', "config.model must be a block with a 'kind', got 3"),
        ('seed', 'has no value; write --config.seed=VALUE'),
        ('stages=({"bath_size": 2},)', "a stage cannot change 'bath_size'"),
        ('checkpoint.keep=0', 'config.checkpoint.keep must be at least 1'),
        ('clip_norm=nan', "config.clip_norm must be float, got 'nan'"),
        ('checkpoint.every_steps=-1', 'config.checkpoint.every_steps must be at least 0, got -1'),
        ('lr_scales=(("(", 1.0),)', 'pairs (regular expression, factor)'),
        ('widht=3', 'Known here: accumulate, batch_size'),
        ('stages=({"share": "a"},)', "config.stages.0.share must be float, got 'a'"),
        ('stages=({"share": 1.0, "clip_norm": -1.0},)', 'in config.stages.0: config.clip_norm'),
        ('stages=({"share": 1.0, "batch_size": 0},)', 'in config.stages.0: config.batch_size'),
        ('stages=({"share": 1.0, "data": "stdlib"},)', 'in config.stages.0: config.data must be'),
        ('budget=12', "budget '12' is not a number with a unit"),
        ('budget=12parsecs', 'write for example 240s, 20m'),
    ],
)
def test_mistakes_fail_at_once_and_say_what_to_do(override, words):
    with pytest.raises(ConfigError) as error:
        config_lib.finish(make(), [override])
    assert words in str(error.value)


def test_exactly_one_extent():
    config = make(budget='3m')
    with pytest.raises(ConfigError, match=r'exactly one of config.steps and config.budget; both'):
        config_lib.check_form(config)
    with pytest.raises(ConfigError, match='neither is set'):
        config_lib.check_form(make(steps=0))


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('240s', ('seconds', 240.0)),
        ('20m', ('seconds', 1200.0)),
        ('1.5h', ('seconds', 5400.0)),
        ('1e9tokens', ('tokens', 1e9)),
        ('3e17 flops', ('model_flops', 3e17)),
        ('500steps', ('steps', 500.0)),
        ('60000examples', ('examples', 60000.0)),
    ],
)
def test_budgets(text, expected):
    assert config_lib.parse_budget(text) == expected


def test_load_names_files_and_variants(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text(
        'from effjax.core.config import defaults\n'
        'def get_config(size="small"):\n'
        '  c = defaults(); c.steps = 5; c.seed = {"small": 1, "big": 2}[size]; return c\n'
    )
    assert config_lib.load(str(file)).seed == 1
    loaded = config_lib.load(f'{file}:big')
    assert (loaded.seed, loaded.name) == (2, 'mine_big')
    with pytest.raises(ConfigError, match=r"no config file .*mime\.py'\. Did you mean"):
        config_lib.load(str(tmp_path / 'mime.py'))
    file.write_text('x = 1\n')
    with pytest.raises(ConfigError, match='has no function get_config'):
        config_lib.load(str(file))
    file.write_text('def get_config(:\n')
    with pytest.raises(ConfigError, match='line 1'):
        config_lib.load(str(file))


def test_json_round_trip():
    import json

    config = config_lib.finish(make(), ['stages=({"share": 0.5}, {"share": 0.5})'])
    assert config_lib.finish(json.loads(config_lib.as_json(config))) == config


def test_a_variant_that_is_not_there(tmp_path):
    file = tmp_path / 'one.py'
    file.write_text(
        'from effjax.core.config import defaults\n'
        'def get_config():\n  c = defaults(); c.steps = 5; return c\n'
    )
    with pytest.raises(ConfigError, match="has no variants, got 'big'"):
        config_lib.load(f'{file}:big')
    file.write_text('import a_module_that_is_not_there\n')
    with pytest.raises(ConfigError, match='cannot be loaded: No module named'):
        config_lib.load(str(file))
