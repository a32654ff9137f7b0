"""What every layer is told about the sequence it works on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import DataError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """Another sequence that a mixer attends to: its `context`.

    Attributes:
      x: [B, S, D], in the compute dtype.
      segment_ids: int32 [B, S] or None; a token reads what has its own document's id, and never
        padding (0). None: every token of the context is for every token.
    """

    x: jax.Array
    segment_ids: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeqInfo:
    """Positions, documents and randomness of one batch.

    Attributes:
      positions: int32 [B, T]; the position inside its document, restarting at 0 in each.
      segment_ids: int32 [B, T] or None; the document of each token, from 1 upwards along the row;
        0 is padding. Nothing may cross a change of segment. None means one document a row and no
        padding.
      rng: a jax PRNG key for dropout and other noise, or None where nothing is random.
      train: static; True while training.
      groups: int32 [B, T] or None; the part of the text, such as a sentence, that a token belongs
        to, numbered from 0 along the row, each within one document; -1: none. A model with global
        tokens has one for each, which stand in front of the row with their own numbers.

    Raises:
      DataError: ids that decrease along a row, where their values are known: in a compiled function
        they are not.
    """

    positions: jax.Array
    segment_ids: jax.Array | None = None
    rng: jax.Array | None = None
    train: bool = dataclasses.field(default=False, metadata={'static': True})
    groups: jax.Array | None = None

    def __post_init__(self):
        ids = self.segment_ids
        known = isinstance(ids, np.ndarray) or (
            isinstance(ids, jax.Array)
            and not isinstance(ids, jax.core.Tracer)
            and ids.is_fully_addressable
        )
        # Global tokens in front of a row, which groups go with, number its documents once more.
        if known and self.groups is None:
            _check_order(np.asarray(ids))

    @classmethod
    def of(cls, batch: int, length: int, **kw) -> 'SeqInfo':
        """Returns the info of unpacked rows: positions 0..length-1 and no segments."""
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return cls(positions=positions, **kw)

    def fold(self, *data) -> 'SeqInfo':
        """Returns the same info with a key of its own, folded from ints (such as a layer index)."""
        if self.rng is None:
            return self
        rng = self.rng
        for d in data:
            rng = jax.random.fold_in(rng, d)
        return dataclasses.replace(self, rng=rng)


def _check_order(ids: np.ndarray) -> None:
    """Raises DataError where ids [..., T] decrease: a mixer could not tell a document's return."""
    before = np.maximum.accumulate(ids, axis=-1)
    wrong = np.argwhere((ids != 0) & (ids < before))
    if len(wrong):
        *row, token = map(int, wrong[0])
        where = (*row, token)
        raise DataError(
            f'segment_ids decrease along row {", ".join(map(str, row)) or 0}: token {token} is of '
            f'document {ids[where]} behind one of {before[where]}; number the documents of a row '
            'upwards from 1, with 0 for padding.'
        )
