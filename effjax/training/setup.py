"""From a config to everything a run needs, before anything compiles."""

import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

from effjax.core.config import as_dict
from effjax.core.errors import ConfigError
from effjax.core.registry import arguments, check_block, lookup

# A vocabulary may be padded up to a multiple of this, for even sharding and fast products.
VOCAB_MULTIPLE = 128


def check(config: Mapping[str, Any]) -> None:
    """Checks every block that the model's builder and the data do not check themselves.

    Raises:
      ConfigError: unknown kind, unknown or missing argument, wrong type, impossible value.
    """
    from effjax.data import SOURCES
    from effjax.models import MODELS
    from effjax.precision import PRECISIONS
    from effjax.tasks import TASKS
    from effjax.training import OPTIMIZERS, SCHEDULES, schedules, sources, stages, transitions

    config = as_dict(config)
    lookup(MODELS, config['model']['kind'], 'model', 'config.model.kind')
    lookup(SOURCES, config['data']['kind'], 'data source', 'config.data.kind')
    check_block(PRECISIONS, config['precision'], 'precision', 'config.precision')
    check_block(TASKS, config['task'], 'task', 'config.task')
    where, block = judged_by(config)
    task = check_block(TASKS, block, 'task', where)
    for stage in stages.plan(config):
        where, own = stage.where, stage.config
        check_block(OPTIMIZERS, own['optimizer'], 'optimizer', f'{where}.optimizer')
        check_block(SCHEDULES, own['schedule'], 'schedule', f'{where}.schedule')
        schedules.build(stage.config['schedule'])
        if stage.grow is not None:
            transitions.operator(stage)
        if stage.index == 0 and own['init_from']:
            sources.check(own['init_from'], f'{where}.init_from', stage.unit, stage.grow)
    _check_teacher(config)
    _check_evals(config)
    _check_model(config, task)
    _check_finish(config, task)


def check_mesh(config: Mapping[str, Any], mesh: Any, rules: Mapping[str, Any]) -> None:
    """Checks that the batches of every stage divide over a mesh.

    Raises:
      ConfigError: naming the batch, the axes and what would fit.
    """
    from effjax import parallel
    from effjax.tasks import TASKS
    from effjax.training import stages

    text = lookup(TASKS, judged_by(config)[1]['kind'], 'task').data == 'text'
    for stage in stages.plan(config):
        parallel.check_batch(
            stage.config['batch_size'],
            mesh,
            accumulate=stage.config['accumulate'],
            seq_len=stage.config['seq_len'] if text else None,
            rules=rules,
        )


def _check_teacher(config: Mapping[str, Any]) -> None:
    """Checks that nothing is given of a teacher that only its run can say."""
    from effjax.tasks.distillation import FOUND, TEACHER

    block = config['task'].get(TEACHER) if config['task']['kind'] == 'distillation' else None
    given = sorted({*FOUND} & {*(block or {})})
    if given:
        raise ConfigError(
            f'config.task.teacher.{given[0]} is found in the run that teaches; leave it out.'
        )


def judged_by(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Returns (place in the config, block) of the task that a model is judged by.

    It is the config's task, or the one that a distillation wraps.
    """
    block = config['task']
    if block['kind'] != 'distillation':
        return 'config.task', block
    return 'config.task.task', block.get('task', {'kind': 'next_token'})


def build_task(config: Mapping[str, Any]) -> Any:
    """Builds the objective of a checked config."""
    from effjax.tasks import TASKS

    task = lookup(TASKS, config['task']['kind'], 'task')
    return task(config['execution'], **arguments(config['task']))


def resolve(config: dict[str, Any], info: Any) -> dict[str, Any]:
    """Returns the config with what only the data knows filled into the model's block.

    Args:
      config: a checked config as plain dicts.
      info: the dataset's `DataInfo`.

    Raises:
      ConfigError: a model that does not fit the data (vocabulary, classes, image shape).
    """
    model = dict(config['model'])
    task = build_task(config)
    if info.kind != task.data:
        raise ConfigError(
            f'config.task.kind {config["task"]["kind"]!r} needs {task.data} data, but '
            f'config.data.kind {config["data"]["kind"]!r} gives {info.kind}.'
        )
    if info.kind == 'image':
        _fill_image(model, info)
    else:
        model['vocab_size'] = _vocabulary(model.get('vocab_size', 0), info.vocab_size)
    if info.kind == 'rows':
        config = {**config, 'task': {**config['task'], 'queries': _queries(task, info)}}
    return {**config, 'model': model}


def check_sampling(config: Mapping[str, Any], model: Any) -> None:
    """Checks that a model which is to speak at the end of its run can.

    Args:
      config: a checked config.
      model: the abstract module.

    Raises:
      ConfigError: a mixer without a decoding state, by its own words.
    """
    import jax

    if not config['finish']['sample_tokens']:
        return
    try:
        jax.eval_shape(lambda: model.init_state(1, 1))
    except ConfigError as e:
        raise ConfigError(f'config.finish.sample_tokens: {e}') from e


def check_same_data(first: Any, other: Any, where: str) -> None:
    """Checks that a stage's data fits the model that the first stage's data has shaped.

    Args:
      first: `DataInfo` of the first stage.
      other: `DataInfo` of the stage.
      where: the stage's place in the config, for the message.

    Raises:
      ConfigError: another kind of data, another tokenizer, other images or classes.
    """
    for what in ('kind', 'vocab_size', 'image_shape', 'classes', 'queries'):
        if getattr(first, what) != getattr(other, what):
            raise ConfigError(
                f'{where}.data has {what} {getattr(other, what)!r}, but the first '
                f'stage has {getattr(first, what)!r}; a stage may change the data, not its form.'
            )
    if first.kind == 'text' and first.tokenizer.digest != other.tokenizer.digest:
        raise ConfigError(
            f'{where}.data would train another tokenizer than the first stage; mix '
            'the sources from the start (data.kind=mixture) and change their weights, or give both '
            "the same data.tokenizer of kind 'file'."
        )


def environment() -> dict[str, Any]:
    """Returns versions and devices, for `summary.json`."""
    import flax
    import jax
    import numpy
    import optax

    from effjax import __version__

    device = jax.devices()[0]
    return {
        'effjax': __version__,
        'python': sys.version.split()[0],
        'jax': jax.__version__,
        'flax': flax.__version__,
        'optax': optax.__version__,
        'numpy': numpy.__version__,
        'platform': platform.platform(),
        'device': device.device_kind,
        'backend': device.platform,
        'devices': jax.device_count(),
        'processes': jax.process_count(),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }


def _queries(task: Any, info: Any) -> int:
    if task.queries not in (0, info.queries):
        raise ConfigError(
            f'config.task.queries is {task.queries}, but the rows of the data have {info.queries} '
            "labelled positions; set it to 0 to take the data's."
        )
    return info.queries


def _vocabulary(size: int, known: int) -> int:
    if size == 0:
        return known
    padded = -(-known // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if size < known:
        raise ConfigError(
            f'config.model.vocab_size {size} is smaller than the tokenizer, which has {known} ids; '
            'set it to 0 to take the tokenizer’s size.'
        )
    if size > padded:
        raise ConfigError(
            f'config.model.vocab_size {size} is larger than the {known} ids of the tokenizer '
            f'(padded to a multiple of {VOCAB_MULTIPLE}: {padded}), so rows would never be '
            'trained; set it to 0 to take the tokenizer’s size.'
        )
    return size


def _fill_image(model: dict[str, Any], info: Any) -> None:
    height, width, channels = info.image_shape
    if height != width:
        raise ConfigError(f'images must be square, got {height}x{width}.')
    for key, value in (('image_size', height), ('channels', channels), ('classes', info.classes)):
        if model.get(key, 0) in (0, None):
            model[key] = value
        elif model[key] != value:
            raise ConfigError(f'config.model.{key} is {model[key]}, but the data has {value}.')


def _check_model(config: Mapping[str, Any], task: Any) -> None:
    """Checks that the model takes what the task gives and sees what the task means it to see."""
    kind, model = judged_by(config)[1]['kind'], config['model']['kind']
    both_ways = getattr(task, 'bidirectional', False)
    fits = 'vit' if task.data == 'image' else 'encoder' if both_ways else 'decoder'
    if model == fits:
        return
    if (task.data == 'image') != (model == 'vit'):
        reads = 'images' if task.data == 'image' else 'tokens'
        raise ConfigError(
            f'config.task.kind {kind!r} reads {reads}, which model {model!r} does not take; use '
            f'config.model.kind={fits}.'
        )
    if both_ways:
        raise ConfigError(
            f'config.task.kind {kind!r} hides tokens, for which model {model!r} has no mask, and '
            'it sees them from one side only; use config.model.kind=encoder, or '
            'config.task.kind=next_token.'
        )
    raise ConfigError(
        f'config.task.kind {kind!r} asks for what model {model!r}, which looks both ways, could '
        'read off its input; use config.model.kind=decoder, or config.task.kind=masked_lm.'
    )


def _check_finish(config: Mapping[str, Any], task: Any) -> None:
    options, data = config['finish'], task.data
    if options['sample_tokens'] < 0:
        raise ConfigError(
            f'config.finish.sample_tokens must not be negative, got {options["sample_tokens"]}.'
        )
    for key in ('gzip', 'sample_tokens'):
        if options[key] and data != 'text':
            raise ConfigError(f'config.finish.{key} is for text, but the task reads {data} data.')
    if getattr(task, 'bidirectional', False):
        _check_no_text(options, judged_by(config)[1]['kind'])
    if options['gzip'] and config['data']['kind'] in ('prepared', 'mixture'):
        raise ConfigError(
            f'config.finish.gzip needs the text of its documents, which data source '
            f'{config["data"]["kind"]!r} does not have; set it to false.'
        )


def _check_no_text(options: Mapping[str, Any], kind: str) -> None:
    """Checks that nothing is asked of a bidirectional model that only a decoder can do."""
    if options['sample_tokens']:
        raise ConfigError(
            f'config.finish.sample_tokens: a model of task {kind!r} looks both ways and generates '
            'no text; set it to 0, or train a decoder with task next_token.'
        )
    if options['gzip']:
        raise ConfigError(
            f'config.finish.gzip is compared with bits per byte, which task {kind!r} does not '
            'measure; set it to false.'
        )


EVAL_KEYS = {'every_steps': 0, 'every_share': 0.0, 'batches': 0, 'split': 'valid', 'batch_size': 0}


def _check_evals(config: Mapping[str, Any]) -> None:
    from effjax.core.registry import suggest

    for name, block in config['evals'].items():
        if not isinstance(block, Mapping):
            raise ConfigError(f'config.evals.{name} must be a block, got {block!r}.')
        for key, value in block.items():
            where = f'config.evals.{name}.{key}'
            if key not in EVAL_KEYS:
                raise ConfigError(f'unknown key {where}.' + suggest(key, EVAL_KEYS))
            like = EVAL_KEYS[key]
            fits = (
                isinstance(value, int | float)
                if isinstance(like, float)
                else (type(value) is type(like))
            )
            if not fits:
                raise ConfigError(f'{where} must be {type(like).__name__}, got {value!r}.')
            if not isinstance(value, str) and value < 0:
                raise ConfigError(f'{where} must not be negative, got {value!r}.')
