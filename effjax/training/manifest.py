"""What a checkpoint says about its arrays: shape and dtype by path, read before any of them.

The caller's manifest (config, stage) is kept as it is; `step` and `state` are added to it.
"""

from collections.abc import Mapping
from typing import Any

import jax

from effjax.core import trees
from effjax.core.errors import CheckpointError


def complete(manifest: Mapping[str, Any], step: int, state: Any) -> dict[str, Any]:
    """Returns the manifest with `step` and, as `state`, `path -> [shape, dtype]` of every array."""
    arrays = trees.flatten(state)
    forms = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}
    return {**manifest, 'step': step, 'state': forms}


def check_state(manifest: Mapping[str, Any], abstract_state: Any, where: str) -> None:
    """Checks that the saved arrays are the ones that `abstract_state` expects.

    Args:
      manifest: as saved.
      abstract_state: tree of things with shape and dtype.
      where: the checkpoint, for the message.

    Raises:
      CheckpointError: naming the arrays that differ, parameters first.
    """
    saved = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype)
        for name, (shape, dtype) in manifest['state'].items()
    }
    wrong = trees.differences(trees.flatten(abstract_state), saved)
    wrong.sort(key=lambda sentence: not sentence.startswith('params/'))
    if wrong:
        more = f' (and {len(wrong) - 5} more)' if len(wrong) > 5 else ''
        raise CheckpointError(
            f'{where} does not fit this config; in it, {"; ".join(wrong[:5])}{more}. '
            'Resume with the config that wrote it, or choose another --workdir.'
        )
