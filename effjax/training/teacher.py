"""The teacher of a distillation: a finished run, its model and weights, and what it has cost.

`resolve` reads the run's small files and writes what this run must know of it into its own config
(`config.task.teacher`), so that a checkpoint of the student can be restored without the teacher's
folder. `load` reads the weights, once, when the first train state is made.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from effjax import models, parallel
from effjax.core import trees
from effjax.core.config import as_dict
from effjax.core.errors import CheckpointError, ConfigError
from effjax.costs import Ledger
from effjax.costs.ledger import OF_SOURCE
from effjax.tasks.distillation import FOUND, NEXT_TOKEN, TEACHER
from effjax.training import checksums
from effjax.training.checkpoints import Checkpointer
from effjax.training.sources import placed
from effjax.training.stages import plan

WHERE = 'config.task.teacher.run'


@dataclasses.dataclass(frozen=True)
class Source:
    """A finished run.

    Attributes:
      folder: where its files are.
      config: its resolved config.
      summary: its `summary.json`.
      step: of its newest valid checkpoint.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    summary: dict[str, Any]
    step: int


def open_run(folder: str, where: str) -> Source:
    """Reads the small files of a finished run.

    Args:
      folder: the run's.
      where: the key that names it, for the message.

    Raises:
      ConfigError: no run there, one that is not finished, or no valid checkpoint.
    """
    path = pathlib.Path(folder)
    if not (path / 'config.json').is_file():
        raise ConfigError(
            f'{where}: {folder} holds no run (no config.json); give the --workdir of one.'
        )
    config = json.loads((path / 'config.json').read_text())
    file = path / 'summary.json'
    summary = json.loads(file.read_text()) if file.is_file() else {}
    if not summary.get('complete'):
        raise ConfigError(
            f'{where}: the run in {folder} is not finished; go on with it by its own command.'
        )
    for step in reversed(Checkpointer(path / 'checkpoints').steps()):
        if not checksums.problem(path / 'checkpoints' / str(step)):
            return Source(path, config, summary, step)
    raise ConfigError(
        f'{where}: the run in {folder} has no valid checkpoint; train it again, not as one of a '
        'batch, which keeps none.'
    )


# ---- the config --------------------------------------------------------------------------------


def block_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns a config's block of its teacher, None where it has no teacher."""
    return config['task'].get(TEACHER) if config['task']['kind'] == 'distillation' else None


def resolve(config: dict[str, Any], info: Any = None) -> dict[str, Any]:
    """Returns the config with the teacher's folder, model, step and cost filled in.

    Args:
      config: plain dicts; what the data knows is filled in.
      info: the dataset's `DataInfo`; without it no tokenizer is compared.

    Raises:
      ConfigError: no such run, one that does not fit this one, or a budget that it uses up.
    """
    block = block_of(config)
    if block is None or 'model' in block:
        return config
    if config['reference']:
        raise ConfigError(
            "config.reference: a table of reference time knows no teacher's forward pass; count "
            "flops, and set it to ''."
        )
    run = _folder(block, config)
    source = open_run(run, WHERE)
    last = plan(source.config)[-1].config
    _check_model(source, last['model'], config)
    if info is not None:
        _check_data(source, info)
    model = dict(last['model'])
    if model['kind'] != 'vit':  # built for the rows that it was trained on
        longest = max(stage.config['seq_len'] for stage in plan(source.config))
        model['max_len'] = model.get('max_len') or longest
        _check_length(source, model['max_len'], config)
    ledger = source.summary['ledger']
    used = {key: ledger.get(key) for key in OF_SOURCE}
    found = {**block, 'run': run, 'model': model, 'step': source.step, 'used': used}
    out = {**config, 'task': {**config['task'], TEACHER: found}}
    _check_budget(out)
    return out


def recall(config: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the config with what an earlier process of this run found of its teacher.

    A run that has a checkpoint holds its teacher's weights: nothing else of it is needed.
    """
    mine: dict[str, Any] = as_dict(config)
    block, file = block_of(mine), workdir / 'config.json'
    if block is None or not file.is_file():
        return mine
    parallel.initialize()  # all processes take the first one's answer
    if Checkpointer(workdir / 'checkpoints').latest() is None:
        return mine
    try:
        saved = block_of(json.loads(file.read_text())) or {}
    except ValueError:
        return mine  # half-written; the checkpoint's own config is checked later
    given = {key: value for key, value in saved.items() if key not in FOUND}
    if given != {**block, 'run': _folder(block, mine)}:
        return mine
    return {**mine, 'task': {**mine['task'], TEACHER: saved}}


def spent(config: Mapping[str, Any], unit: str) -> float | None:
    """Returns what of a budget in `unit` a charged teacher has used; None where that is not known.

    A teacher's steps are not this run's, and without `charge` it has used nothing.
    """
    block = block_of(config)
    if block is None or not block['charge'] or unit == 'steps':
        return 0.0
    return block['used'].get(unit)


def charge(ledger: Ledger, config: Mapping[str, Any]) -> None:
    """Puts the teacher's own training on a run's new ledger, charged where the config says so."""
    block = block_of(config)
    if block is not None:
        ledger.add_source(TEACHER, block['used'], charged=block['charge'])


def describe(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what `summary.json` says of the teacher, None without one."""
    block = block_of(config)
    if block is None:
        return None
    return {key: block[key] for key in ('run', 'step', 'charge', 'used')}


def _folder(block: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    return os.path.normpath(block['run'].replace('{seed}', str(config['seed'])))


# ---- what does not fit -------------------------------------------------------------------------


def _check_model(source: Source, theirs: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    mine, task = config['model'], config['task'].get('task', NEXT_TOKEN)['kind']
    if theirs['kind'] != mine['kind']:
        raise ConfigError(
            f'{WHERE}: {source.folder} holds a {theirs["kind"]!r}, but task {task!r} takes a '
            f'{mine["kind"]!r}; give the run of one.'
        )
    sizes = ('vocab_size',)
    if mine['kind'] == 'vit':
        sizes = ('classes', 'image_size', 'channels')  # type: ignore[assignment]
    for key in sizes:
        if theirs.get(key) != mine.get(key):
            raise ConfigError(
                f'{WHERE}: the model in {source.folder} has {key} {theirs.get(key)}, but this one '
                f'has {mine.get(key)}; a teacher must read and predict the same.'
            )


def _check_data(source: Source, info: Any) -> None:
    if info.kind != 'text':
        return
    theirs = (source.summary['data'].get('tokenizer') or {}).get('digest')
    if theirs != info.tokenizer.digest:
        raise ConfigError(
            f'{WHERE}: the run in {source.folder} had another tokenizer, by which the same ids '
            "mean another text; give both runs the same config.data.tokenizer of kind 'file'."
        )


def _check_length(source: Source, length: int, config: Mapping[str, Any]) -> None:
    longest = max(stage.config['seq_len'] for stage in plan(config))
    if longest > length:
        raise ConfigError(
            f'{WHERE}: the model in {source.folder} takes rows of {length} tokens, but this run '
            f'has config.seq_len {longest}; shorten them, or train the teacher on longer ones.'
        )


def _check_budget(config: Mapping[str, Any]) -> None:
    first = plan(config)[0]
    unit, amount = first.unit, first.end
    used = spent(config, unit)
    if used is None:
        raise ConfigError(
            f'config.task.teacher.charge: what the teacher used is not known in {unit}, which '
            'config.budget counts; count flops, tokens or steps, or set charge to False.'
        )
    if used >= amount:
        raise ConfigError(
            f'config.task.teacher.charge: the teacher used {used:.4g} {unit}, and the first stage '
            f'ends at {amount:.4g}, so that nothing of it is left; raise the budget, or set charge '
            'to False.'
        )


# ---- the arrays --------------------------------------------------------------------------------


def build(config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> models.Built | None:
    """Returns the teacher of a resolved config without arrays, None where it has none."""
    block = block_of(config)
    if block is None:
        return None
    return models.build({**config, 'model': block['model']}, mesh=mesh)


def load(config: Mapping[str, Any], built: models.Built) -> dict[str, Any]:
    """Returns the params (averaged, where the teacher's run says so) and buffers of the teacher.

    Args:
      config: this run's resolved config.
      built: of `build`: the arrays take its dtypes and shardings.

    Raises:
      ConfigError, CheckpointError: the teacher's folder is gone, or has changed since.
    """
    from effjax.training.runtime import DONE, Runtime

    block = block_of(config)
    assert block is not None
    source = open_run(block['run'], WHERE)
    runtime = Runtime(placed(source.config, config), with_data=False, with_source=False)
    checkpointer = Checkpointer(source.folder / 'checkpoints')
    try:
        restored = checkpointer.restore(
            lambda found: runtime.abstract_sharded(runtime.stage_of(found)), block['step']
        )
    finally:
        checkpointer.close()
    stage = runtime.stage_of(restored.manifest)
    params = runtime.eval_params(restored.state, stage, restored.extra.get('progress', DONE))
    arrays = {'params': params, 'buffers': restored.state['buffers']}
    if _shapes(arrays) != _shapes(built.abstract_state):
        raise CheckpointError(
            f'{WHERE}: the model in {source.folder} is not the one that this run was begun with; '
            'give another --workdir.'
        )

    def cast(arrays: Any) -> Any:
        return jax.tree.map(lambda x, to: x.astype(to.dtype), arrays, built.abstract_state)

    return jax.jit(cast, out_shardings=built.shardings)(arrays)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in trees.flatten(tree).items()}
