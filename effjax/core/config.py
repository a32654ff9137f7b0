"""Configs: `ml_collections` files, overrides from the command line, and the checks of their form.

A config file defines `get_config(variant='')` and starts from `defaults()`:

    from effjax.core.config import defaults

    def get_config(variant=''):
        config = defaults()
        config.model = dict(kind='decoder', width=256, layers=4, ...)
        return config

Blocks with a `kind` belong to a registry and may take any argument of that component; every other
key must exist in `defaults()`. `check_form` checks keys and types against the defaults; the parts
check their own blocks (`effjax.training.setup.check`).
"""

import ast
import importlib.util
import inspect
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from effjax.core.errors import ConfigError
from effjax.core.registry import suggest

MESH_AXES = ('data', 'fsdp', 'tensor', 'sequence', 'expert', 'pipe')

_BUDGET = re.compile(r'^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z_]+)\s*$')
_BUDGET_UNITS = {
    'steps': ('steps', 1.0),
    'tokens': ('tokens', 1.0),
    'examples': ('examples', 1.0),
    'flops': ('model_flops', 1.0),
    's': ('seconds', 1.0),
    'm': ('seconds', 60.0),
    'h': ('seconds', 3600.0),
    'hwflops': ('hardware_flops', 1.0),
    'j': ('joules', 1.0),
    'ref_s': ('reference_seconds', 1.0),
    'ref_m': ('reference_seconds', 60.0),
    'ref_h': ('reference_seconds', 3600.0),
}


def defaults() -> ConfigDict:
    """Returns the complete config with every default, to be changed by a config file."""
    config = ConfigDict()
    config.name = ''
    config.seed = 0  # of data order, initial values and dropout
    config.init_seed = -1  # of initial values alone; -1 takes `seed`
    # Extent: exactly one of the two. `budget` is a number with a unit: '240s', '20m', '3h',
    # '1e9tokens', '3e17flops' (model FLOPs), '500steps', '60000examples', '3e17hwflops' (hardware
    # FLOPs), '2e5J' (joules), '10ref_m' (minutes of `reference`; also ref_s, ref_h).
    config.steps = 0
    config.budget = ''

    config.batch_size = 32  # examples (rows) a step, over all devices and microbatches
    config.seq_len = 256  # tokens a row; ignored by tasks without a sequence
    config.accumulate = 1  # microbatches a step

    config.data = ConfigDict({'kind': 'stdlib'})
    config.task = ConfigDict({'kind': 'next_token'})
    config.model = ConfigDict({'kind': 'decoder'})
    config.optimizer = ConfigDict({'kind': 'adamw'})
    config.schedule = ConfigDict({'kind': 'cosine', 'peak': 1e-3})
    config.precision = ConfigDict({'kind': 'bf16'})

    config.clip_norm = 1.0  # global gradient norm; 0 switches it off
    config.ema = 0.0  # decay of the parameters' moving average; 0 switches it off
    # Pairs (regular expression searched in the parameter's path, factor); the first match counts.
    config.lr_scales = ()
    config.decay_scales = ()

    config.mesh = ConfigDict(dict.fromkeys(MESH_AXES, 1))
    config.mesh.data = -1  # -1: all devices that the other axes leave
    # Logical axis -> mesh axes tried in order, over the defaults in parallel.rules.
    config.sharding = ConfigDict()

    # How the body runs, never what it computes.
    config.execution = ConfigDict()
    config.execution.layers = 'auto'  # 'scan', 'unroll', or 'auto': by depth
    config.execution.remat = 'none'  # 'none', 'dots', 'full'
    config.execution.attention = None  # implementation of attention; None picks the best
    config.execution.loss_chunks = 0  # pieces of the head's product; 0 picks by vocabulary
    # XLA's compiler options for the train step, over the device's defaults in training.compiled.
    config.execution.compiler_options = ConfigDict()

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 0  # 0: only at the end and on a signal
    config.checkpoint.every_seconds = 0.0
    config.checkpoint.keep = 2
    config.checkpoint.background = True  # write while training goes on
    config.checkpoint.on_error = 'continue'  # or 'stop': when a save fails

    # name -> dict(every_steps=, batches=, split=, ...); see training.evaluate.
    config.evals = ConfigDict()

    config.log = ConfigDict()
    config.log.every_steps = 1  # steps between lines in metrics.jsonl
    config.log.tensorboard = True
    config.log.progress = True
    config.log.wandb = ''  # project name; needs the `wandb` extra

    # A calibration table (`python -m effjax.calibrate`) to charge each step by; '' charges none.
    config.reference = ''

    config.stages = ()  # dicts: see training.stages
    # Another run's checkpoint that the first stage begins from: see training.sources.
    config.init_from = ConfigDict()
    # What to do when training is done: compare bits per byte with gzip -9, generate a sample.
    config.finish = ConfigDict()
    config.finish.gzip = False
    config.finish.sample_tokens = 0
    config.finish.sample_prompt = ''
    return config


# Keys whose content belongs to a registry or is free: only their being mappings is checked here.
BLOCKS = ('data', 'task', 'model', 'optimizer', 'schedule', 'precision')
_FREE = frozenset({*BLOCKS, 'evals', 'sharding', 'execution.compiler_options', 'init_from'})
# What a stage says of itself; anything else it sets changes the run's config.
STAGE_OWN = ('name', 'steps', 'share', 'budget', 'until', 'grow')
STAGE_KEYS = (
    *STAGE_OWN, 'model', 'batch_size', 'seq_len', 'accumulate', 'data', 'schedule', 'optimizer',
    'clip_norm', 'lr_scales', 'decay_scales', 'init_from',
)  # fmt: skip
_STAGE_TYPES: dict[str, tuple[type, ...]] = {
    'share': (int, float), 'steps': (int,), 'name': (str,), 'budget': (str,),
    'grow': (Mapping, str), 'until': (Mapping,),
}  # fmt: skip


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `path/to/config.py[:variant]` and applies `a.b=value` overrides.

    Returns:
      The config, locked, its form checked.

    Raises:
      ConfigError: missing file, a file without `get_config`, unknown variant or key, wrong type.
    """
    path, _, variant = spec.partition(':')
    file = pathlib.Path(path)
    if not file.is_file():
        near = (
            sorted(p.as_posix() for p in file.parent.glob('*.py')) if file.parent.is_dir() else []
        )
        raise ConfigError(f'no config file {path!r}.' + suggest(path, near))
    module_spec = importlib.util.spec_from_file_location(f'effjax_config_{file.stem}', file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as e:
        raise ConfigError(f'{path}: line {e.lineno}: {e.msg}.') from e
    except ImportError as e:
        raise ConfigError(f'{path} cannot be loaded: {e}.') from e
    if not hasattr(module, 'get_config'):
        raise ConfigError(f'{path} has no function get_config(variant).')
    if variant and not inspect.signature(module.get_config).parameters:
        raise ConfigError(f'{path} has no variants, got {variant!r}; give the path alone.')
    config = module.get_config(variant) if variant else module.get_config()
    if not config.name:
        with config.unlocked():
            config.name = file.stem + (f'_{variant}' if variant else '')
    return finish(config, overrides)


def finish(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns a copy with overrides applied, its form checked, and locked."""
    data = as_dict(config)
    for override in overrides:
        apply_override(data, override)
    given = {override.partition('=')[0] for override in overrides}
    for key, other, none in (('budget', 'steps', 0), ('steps', 'budget', '')):
        if key in given and other not in given:
            data[other] = none  # the command line's extent replaces the file's
    check_form(data)
    out = ConfigDict(_tuples(data))
    out.lock()
    return out


def apply_override(config: dict[str, Any], override: str) -> None:
    """Applies one `a.b.0.c=value` to a plain config, the value parsed to the type it replaces.

    Raises:
      ConfigError: no `=`, unknown key, or a value of the wrong type.
    """
    name, equals, text = override.partition('=')
    if not equals:
        raise ConfigError(f'override {override!r} has no value; write --config.{name}=VALUE.')
    keys = name.split('.')
    node: Any = config
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key, '.'.join(keys[: depth + 1]))
    last = keys[-1]
    if isinstance(node, list):
        index = _index(node, last, name)
        node[index] = _parse(text, node[index], name)
    elif isinstance(node, dict) and last in node:
        node[last] = _parse(text, node[last], name)
    elif isinstance(node, dict) and ('kind' in node or _is_free(keys[:-1])):
        node[last] = _parse(text, None, name)  # its component checks name and type
    else:
        known = node if isinstance(node, dict) else ()
        raise ConfigError(f'unknown key config.{name}.' + _near(last, known))


def as_dict(config: Any) -> Any:
    """Returns plain dicts, lists and scalars: what JSON can hold."""
    if isinstance(config, ConfigDict | Mapping):
        return {str(k): as_dict(config[k]) for k in config}
    if isinstance(config, list | tuple):
        return [as_dict(v) for v in config]
    return config


def as_json(config: Any) -> str:
    """Returns a config as indented JSON in the order of its keys."""
    return json.dumps(as_dict(config), indent=2) + '\n'


def check_form(config: Mapping[str, Any]) -> None:
    """Checks keys and types against `defaults()`, and values that need no component.

    Raises:
      ConfigError: with the path, what is wrong and a suggestion.
    """
    config = as_dict(config)
    _check_values(config)
    for i, stage in enumerate(config['stages']):
        where = f'config.stages.{i}'
        if not isinstance(stage, Mapping):
            raise ConfigError(f'{where} must be a dict, got {stage!r}.')
        for key in stage:
            if key not in STAGE_KEYS:
                raise ConfigError(
                    f'{where}.{key}: a stage cannot change {key!r}; it may set '
                    f'{", ".join(STAGE_KEYS)}.' + suggest(key, STAGE_KEYS)
                )
        for key, kinds in _STAGE_TYPES.items():
            if key in stage and (not isinstance(stage[key], kinds) or stage[key] is True):
                raise ConfigError(
                    f'{where}.{key} must be {kinds[-1].__name__}, got {stage[key]!r}.'
                )
        try:
            _check_values({**config, **_stage_changes(config, stage)})
        except ConfigError as e:
            raise ConfigError(f'in {where}: {e}') from e


def _stage_changes(config: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stage's changes as whole values: blocks merged over the config's."""
    changes = {k: v for k, v in stage.items() if k not in STAGE_OWN}
    for key, value in changes.items():
        if isinstance(config[key], dict) and isinstance(value, Mapping):
            changes[key] = {**config[key], **value}
    return changes


def _check_values(config: Mapping[str, Any]) -> None:
    """Checks keys, types and ranges of one stage's complete config."""
    _check_like(config, as_dict(defaults()), '')
    for name in BLOCKS:
        block = config[name]
        if not isinstance(block, Mapping) or 'kind' not in block:
            raise ConfigError(f"config.{name} must be a block with a 'kind', got {block!r}.")
    for key, least in (('seed', 0), ('init_seed', -1)):
        if not least <= config[key] < 2**32:
            raise ConfigError(f'config.{key} must be from {least} to 2^32 - 1, got {config[key]}.')
    for key in ('batch_size', 'seq_len', 'accumulate'):
        if config[key] < 1:
            raise ConfigError(f'config.{key} must be at least 1, got {config[key]}.')
    if config['batch_size'] % config['accumulate']:
        raise ConfigError(
            f'config.batch_size {config["batch_size"]} is not divisible by config.accumulate '
            f'{config["accumulate"]}.'
        )
    extent(config)
    _one_of(config, 'execution.layers', ('auto', 'scan', 'unroll'))
    _one_of(config, 'execution.remat', ('none', 'dots', 'full'))
    _one_of(config, 'checkpoint.on_error', ('continue', 'stop'))
    for block, key, least in (
        ('checkpoint', 'keep', 1),
        ('checkpoint', 'every_steps', 0),
        ('checkpoint', 'every_seconds', 0),
        ('log', 'every_steps', 1),
        ('execution', 'loss_chunks', 0),
    ):
        if not config[block][key] >= least:
            raise ConfigError(
                f'config.{block}.{key} must be at least {least}, got {config[block][key]}.'
            )
    for key in ('clip_norm', 'ema'):
        if not config[key] >= 0:
            raise ConfigError(f'config.{key} must not be negative, got {config[key]}.')
    if config['ema'] >= 1:
        raise ConfigError(f'config.ema is a decay below 1, got {config["ema"]}.')
    for key in ('lr_scales', 'decay_scales'):
        for pair in config[key]:
            _check_scale(pair, key)
    _check_mesh(config['mesh'])


def _check_scale(pair: Any, key: str) -> None:
    try:
        pattern, factor = pair
        re.compile(pattern)
        float(factor)
    except (TypeError, ValueError, re.error) as e:
        raise ConfigError(
            f'config.{key} holds pairs (regular expression, factor), got {pair!r}.'
        ) from e


def extent(config: Mapping[str, Any]) -> tuple[str, float]:
    """Returns how long the run is, as (unit, amount).

    The unit is one of `costs.ledger.UNITS`.

    Raises:
      ConfigError: neither or both of `steps` and `budget`, or a budget without a known unit.
    """
    steps, budget = config['steps'], config['budget']
    if bool(steps) == bool(budget):
        both = 'both are' if steps else 'neither is'
        raise ConfigError(f'give exactly one of config.steps and config.budget; {both} set.')
    if steps:
        if steps < 0:
            raise ConfigError(f'config.steps must be positive, got {steps}.')
        return 'steps', float(steps)
    return parse_budget(budget)


def parse_budget(text: str) -> tuple[str, float]:
    """Parses '240s', '20m', '1e9tokens', '3e17flops', '500steps' into (unit, amount).

    Raises:
      ConfigError: no number, or no known unit.
    """
    match = _BUDGET.match(text)
    unit = match.group(2) if match else ''
    if match is None or unit.lower() not in _BUDGET_UNITS:
        raise ConfigError(
            f'budget {text!r} is not a number with a unit; write for example 240s, 20m, 3h, '
            '1e9tokens, 3e17flops, 500steps.'
        )
    name, factor = _BUDGET_UNITS[unit.lower()]
    amount = float(match.group(1)) * factor
    if amount <= 0:
        raise ConfigError(f'budget {text!r} must be positive.')
    return name, amount


def _check_mesh(mesh: Mapping[str, Any]) -> None:
    free = [axis for axis in MESH_AXES if mesh[axis] == -1]
    if len(free) > 1:
        raise ConfigError(f'only one mesh axis may be -1, got {", ".join(free)}.')
    for axis in MESH_AXES:
        if mesh[axis] < 1 and mesh[axis] != -1:
            raise ConfigError(f'config.mesh.{axis} must be -1 or at least 1, got {mesh[axis]}.')


def _check_like(config: Mapping[str, Any], model: Mapping[str, Any], path: str) -> None:
    for key in config:
        where = f'{path}.{key}' if path else str(key)
        if key not in model:
            raise ConfigError(f'unknown key config.{where}.' + _near(key, model))
        if where in _FREE:
            continue
        value, like = config[key], model[key]
        if isinstance(like, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f'config.{where} must be a block, got {value!r}.')
            _check_like(value, like, where)
        elif not _same_type(value, like):
            raise ConfigError(
                f'config.{where} must be {type(like).__name__}, got {value!r} '
                f'({type(value).__name__}).'
            )
    for key in model:
        if key not in config:
            where = f'{path}.{key}' if path else str(key)
            raise ConfigError(
                f'config.{where} is missing; start from effjax.core.config.defaults().'
            )


def _same_type(value: Any, like: Any) -> bool:
    if like is None:
        return value is None or isinstance(value, str)
    if isinstance(like, bool):
        return isinstance(value, bool)
    if isinstance(like, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(like, int):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(like, tuple | list):
        return isinstance(value, tuple | list)
    return isinstance(value, type(like))


def _one_of(config: Mapping[str, Any], name: str, choices: Iterable[str]) -> None:
    node: Any = config
    for key in name.split('.'):
        node = node[key]
    if node not in choices:
        raise ConfigError(
            f'config.{name} must be one of {", ".join(choices)}, got {node!r}.'
            + suggest(node, choices)
        )


def _near(key: str, known: Iterable[str]) -> str:
    """Returns a suggestion, or the known keys where none is near."""
    return suggest(key, known) or f' Known here: {", ".join(sorted(known)) or "nothing"}.'


def _is_free(keys: Sequence[str]) -> bool:
    return bool({keys[0], '.'.join(keys)} & (_FREE - set(BLOCKS))) if keys else False


def _child(node: Any, key: str, name: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, name)]
    if not isinstance(node, dict) or key not in node:
        known = node if isinstance(node, dict) else ()
        raise ConfigError(f'unknown key config.{name}.' + _near(key, known))
    return node[key]


def _index(node: list, key: str, name: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f'config.{name}: expected an index below {len(node)}, got {key!r}.')
    return int(key)


def _parse(text: str, like: Any, name: str) -> Any:
    """Parses `text` to the type of the value it replaces (None: as a literal, else a string)."""
    if isinstance(like, bool):
        if text.lower() in ('true', '1', 'yes'):
            return True
        if text.lower() in ('false', '0', 'no'):
            return False
        raise ConfigError(f'config.{name} must be true or false, got {text!r}.')
    if isinstance(like, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
    if isinstance(like, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if like is not None and not _same_type(value, like) and not isinstance(like, dict):
        raise ConfigError(
            f'config.{name} must be {type(like).__name__}, got {text!r} ({type(value).__name__}).'
        )
    if isinstance(like, float) and value is not None:
        return float(value)
    return as_dict(value)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return value
