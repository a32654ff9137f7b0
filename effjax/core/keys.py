"""Keys for initial values: each part draws from a key of its own name, never from its turn.

Two models that differ in one part then start from the same values everywhere else, which is what
pairs the arms of a study.
"""

import zlib

import jax
from flax import nnx


def branch(rngs: nnx.Rngs, name: str) -> nnx.Rngs:
    """Returns the random streams of a named part, whatever has been drawn from `rngs` before.

    Args:
      rngs: streams of the whole; not advanced.
      name: the part's name among its siblings.
    """
    key = rngs.params.key[...]
    return nnx.Rngs(params=jax.random.fold_in(key, zlib.crc32(name.encode())))
