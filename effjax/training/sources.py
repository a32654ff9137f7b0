"""Runs that another run begins from: their config, weights and cost.

`config.init_from = dict(run='runs/small', charge=True)` makes the first stage start from the newest
valid checkpoint of a run. What that run has cost is part of this run's budget with `charge=True`
and free with `charge=False`: which of the two is meant is for the config to say. `step` names
another checkpoint; `optimizer='keep'` takes over the optimizer's state too, which 'reset' makes
anew. `{seed}` in the folder's name is replaced by this run's seed. Where the models differ in size,
the first stage's `grow` names the operator that leads from one to the other.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from effjax.core import trees
from effjax.core.errors import CheckpointError, ConfigError
from effjax.core.registry import suggest
from effjax.costs import Ledger
from effjax.growth import differences
from effjax.training import checkpoints

_DEFAULTS: dict[str, Any] = {'step': 0, 'optimizer': 'reset'}
_TYPES = {'run': str, 'charge': bool, 'step': int, 'optimizer': str}


@dataclasses.dataclass(frozen=True)
class Source:
    """A run whose checkpoint another run begins from.

    Attributes:
      folder: of the run.
      where: the place in the config that names it, for errors.
      config: its resolved config.
      step: of the checkpoint.
      manifest: of the checkpoint.
      totals: of its ledger at that step.
      seconds: of training that it had taken.
      progress: its shares of the run and of the stage that were done.
      charge: whether its cost counts towards the budget.
      keeps_optimizer: whether the optimizer's state goes on.
    """

    folder: pathlib.Path
    where: str
    config: dict[str, Any]
    step: int
    manifest: dict[str, Any]
    totals: dict[str, Any]
    seconds: float
    progress: tuple[float, float]
    charge: bool
    keeps_optimizer: bool

    def used(self, unit: str) -> float:
        """Returns how much of a unit it has used; 0 where that is not known."""
        return self.seconds if unit == 'seconds' else float(self.totals.get(unit) or 0.0)


def check(
    block: Mapping[str, Any], where: str, unit: str, grow: Mapping[str, Any] | None = None
) -> None:
    """Checks the form of `init_from`.

    Args:
      block: the block, which is not empty.
      where: its place in the config.
      unit: what the run's extent is counted in.
      grow: the block of the operator that the first stage begins with, or None.

    Raises:
      ConfigError: an unknown, missing or mistyped key, or a cost that this unit cannot count.
    """
    for key, value in block.items():
        if key not in _TYPES:
            raise ConfigError(f'unknown key {where}.{key}.' + suggest(key, _TYPES))
        if type(value) is not _TYPES[key]:
            raise ConfigError(f'{where}.{key} must be {_TYPES[key].__name__}, got {value!r}.')
    if not block.get('run'):
        raise ConfigError(f'{where}.run must name the folder of a run.')
    if 'charge' not in block:
        raise ConfigError(
            f'{where} must say whether what the run has cost counts towards the budget: '
            'charge=True or charge=False.'
        )
    if block.get('optimizer', 'reset') not in ('reset', 'keep'):
        raise ConfigError(
            f"{where}.optimizer must be 'reset' or 'keep', got {block['optimizer']!r}."
        )
    grow = grow or {}
    fresh = grow.get('kind') == 'ligo' or grow.get('moments') == 'reset'
    if fresh and block.get('optimizer') == 'keep':
        raise ConfigError(
            f"{where}.optimizer: 'keep' goes on with moments that growing makes anew here; leave "
            "it out, or grow them too (moments='grow')."
        )
    if block['charge'] and unit in ('steps', 'joules'):
        raise ConfigError(
            f'{where}.charge: a run counted in {unit} cannot be charged for another; count tokens, '
            'examples, flops or seconds (config.budget), or set charge to False.'
        )


def read(block: Mapping[str, Any], where: str, seed: int) -> Source:
    """Returns the run that a checked block names, all read but its arrays.

    Raises:
      ConfigError: no run there, or no valid checkpoint.
    """
    block = {**_DEFAULTS, **block}
    folder = pathlib.Path(block['run'].replace('{seed}', str(seed)))
    file = folder / 'config.json'
    if not file.is_file():
        raise ConfigError(
            f'{where}.run: {folder} holds no run (no config.json); give the folder of a run of '
            'effjax.train.'
        )
    try:
        manifest = checkpoints.read_manifest(folder / 'checkpoints', block['step'] or None)
        extra = checkpoints.read_extra(folder / 'checkpoints', int(manifest['step']))
    except CheckpointError as e:
        raise ConfigError(f'{where}.run: {e}') from e
    ledger = Ledger.from_dict(extra['ledger'])
    own = extra['clock']['train'] + extra['clock']['data']
    return Source(
        folder,
        where,
        config=json.loads(file.read_text()),
        step=int(manifest['step']),
        manifest=manifest,
        totals=ledger.totals(),
        seconds=own + ledger.source_seconds,
        progress=tuple(extra.get('progress', (1.0, 1.0))),
        charge=block['charge'],
        keeps_optimizer=block['optimizer'] == 'keep',
    )


def placed(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's config on another run's mesh, with batches that divide over it."""
    stages = [
        {key: value for key, value in stage.items() if key not in ('batch_size', 'accumulate')}
        for stage in theirs['stages']
    ]
    shared = {key: mine[key] for key in ('mesh', 'sharding', 'batch_size', 'accumulate')}
    return {**theirs, **shared, 'stages': stages}


def check_tokenizer(source: Source, digest: str) -> None:
    """Checks that a source knew the tokens that this run trains on.

    Args:
      source: the run.
      digest: of this run's tokenizer, '' without one.

    Raises:
      ConfigError: it had another tokenizer.
    """
    known = source.manifest.get('tokenizer', '')  # earlier versions saved none
    if known and digest and known != digest:
        raise ConfigError(
            f'{source.where}: {source.folder} was trained with another tokenizer; give config.data.'
            "tokenizer of kind 'file' with the same file to both runs, or the same text to train "
            'it on.'
        )


def check_model(
    source: Source, models: tuple[Mapping[str, Any], Mapping[str, Any]], params: tuple[Any, Any]
) -> None:
    """Checks that a source's model is the run's, where nothing grows it.

    Args:
      source: the run.
      models: its model's block and this run's.
      params: shapes of both models' parameters.

    Raises:
      ConfigError: naming what differs.
    """
    wrong = [f'{path} is {old!r} there, {new!r} here' for path, old, new in differences(*models)]
    found, expected = map(trees.flatten, params)
    wrong += trees.differences(expected, found)
    if wrong:
        more = f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''
        raise ConfigError(
            f'{source.where}: the model of {source.folder} is another one: {wrong[0]}{more}; give '
            "the run of the same model, or name in the first stage's grow the operator that leads "
            'to a larger one.'
        )


def check_arrays(source: Source, theirs: Any, mine: Any) -> None:
    """Checks that a source's arrays are those of its model as this run builds it.

    Args:
      source: the run.
      theirs: its `StageModel` by its own config.
      mine: the same model's by this run's config: for rows of this length.

    Raises:
      ConfigError: they differ, or not all of the source's model is used yet.
    """
    found, expected = (trees.flatten(m.built.abstract_state['params']) for m in (theirs, mine))
    for name, leaf in expected.items():
        if name in found and found[name].shape != leaf.shape:
            raise ConfigError(
                f'{source.where}: {name} of {source.folder} is {found[name].shape}, but '
                f'{leaf.shape} for the rows of this run; give both the same config.seq_len, or the '
                'same config.model.max_len.'
            )
    if theirs.view is not None and source.keeps_optimizer and source.progress[1] < 1:
        raise ConfigError(
            f'{source.where}.optimizer: {source.folder} was stopped while its growth was being let '
            "in, and 'keep' would show all of it at once; let it go on first, or leave it out."
        )


def check_charge(source: Source, unit: str, end: float, more: float = 0.0) -> None:
    """Checks that a source leaves something of the first stage to this run.

    Args:
      source: the run.
      unit: what this run's extent is counted in.
      end: where the first stage ends.
      more: what else this run is charged before its first step.

    Raises:
      ConfigError: it leaves nothing, or its cost is not known in this unit.
    """
    if not source.charge:
        return
    if unit != 'seconds' and source.totals.get(unit) is None:
        raise ConfigError(
            f'{source.where}.charge: what {source.folder} has used is not known in {unit}, which '
            'config.budget counts; count flops or tokens, or set charge to False.'
        )
    used = source.used(unit) + more
    if used >= end:
        raise ConfigError(
            f'{source.where}: {source.folder} has used {used:g} {unit}, and the first stage ends '
            f'at {end:g}; raise the budget, or set charge to False.'
        )
