"""What a checkpoint says of its run, and whether a config may go on from it."""

import os
from collections.abc import Mapping
from typing import Any

from effjax.core import trees
from effjax.core.errors import CheckpointError

# A run that changes one of these is another experiment; anything else (extent, mesh, logging,
# checkpoint policy, evaluations, execution) may change on resume.
IDENTITY = ('seed', 'init_seed', 'data', 'task', 'model', 'precision', 'optimizer')


def manifest(
    config: Mapping[str, Any], params: Any, stage: int, tokenizer: str = ''
) -> dict[str, Any]:
    """Returns what is read first of a checkpoint: config, stage, and each parameter's form.

    Args:
      config: the resolved config as plain dicts.
      params: abstract or real parameters.
      stage: index of the stage that the state belongs to.
      tokenizer: digest of the tokenizer, '' without one.
    """
    return {
        'config': dict(config),
        'stage': stage,
        'tokenizer': tokenizer,
        'params': {
            name: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
            for name, leaf in trees.flatten(params).items()
        },
    }


def check(found: Mapping[str, Any], config: Mapping[str, Any], params: Any, folder: Any) -> None:
    """Checks that a checkpoint's manifest belongs to this config.

    Raises:
      CheckpointError: naming the parameters or the config keys that differ, and what to do.
    """
    wrong = trees.differences(
        {k: _Form(v['shape'], v['dtype']) for k, v in found['params'].items()},
        trees.flatten(params),
    )
    if wrong:
        more = f' (and {len(wrong) - 5} more)' if len(wrong) > 5 else ''
        raise CheckpointError(
            f'the model of this config does not fit the checkpoints in {folder}: '
            f'{"; ".join(wrong[:5])}{more}. Give another --workdir, or the config that made it.'
        )
    check_config(found['config'], config, folder)


def check_config(found: Mapping[str, Any], config: Mapping[str, Any], where: Any) -> None:
    """Checks that a saved config is the same experiment as this one.

    Raises:
      CheckpointError: naming the keys that differ, and what to do.
    """
    keys = []
    for key in IDENTITY:
        old, new = found.get(key), config[key]
        if key == 'data':
            old, new = _content(old), _content(new)
        keys += changed(old, new, key)
    keys += changed(found.get('init_from') or {}, config.get('init_from') or {}, 'init_from')
    keys += changed(_growth(found.get('stages')), _growth(config['stages']), 'stages')
    if keys:
        more = f' (and {len(keys) - 5} more)' if len(keys) > 5 else ''
        raise CheckpointError(
            f'{where} belongs to another config, which differs in {"; ".join(keys[:5])}{more}. '
            'Give another --workdir, or the config that made it.'
        )


def settings_changed(found: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Lists what a resumed run does otherwise from here on, without being another experiment."""
    keys = [k for k in config if k not in (*IDENTITY, 'log', 'checkpoint', 'finish', 'execution')]
    return [line for key in keys for line in changed(found.get(key), config[key], key)]


def _growth(stages: Any) -> dict[str, Any]:
    """Returns what stages say of the model: its sizes, and how and from where it gets them."""
    said = (
        {key: stage[key] for key in ('model', 'grow', 'init_from') if key in stage}
        for stage in stages or ()
    )
    return {str(i): facts for i, facts in enumerate(said) if facts}


def _content(block: Any) -> Any:
    """Returns a data block without what changes no sample: workers, cache, a path's spelling."""
    if not isinstance(block, dict):
        return block
    out = {k: v for k, v in block.items() if k not in ('workers', 'cache')}
    for key in ('path', 'valid_path'):
        if out.get(key):
            out[key] = os.path.normpath(out[key])
    return out


class _Form:
    def __init__(self, shape: list[int], dtype: str):
        self.shape, self.dtype = tuple(shape), dtype


def changed(old: Any, new: Any, path: str) -> list[str]:
    """Lists 'key: old there, new here' of what differs in two configs or parts of them."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in sorted({*old, *new}):
            out += changed(old.get(key), new.get(key), f'{path}.{key}')
        return out
    return [] if old == new else [f'{path}: {old!r} there, {new!r} here']
