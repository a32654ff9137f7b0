"""What a part is told when it is built: everything that is not its own config."""

import dataclasses

from effjax.core.policy import Policy


@dataclasses.dataclass(frozen=True)
class Context:
    """Facts of the model that its parts share.

    Attributes:
      width: model width D.
      policy: parameter and compute dtypes.
      causal: True in a decoder: nothing may look ahead.
      depth: number of blocks on the path from input to output; scales some initialisers.
      max_len: the longest sequence the model is built for.
      positions: the model's positions block, e.g. dict(kind='rope', base=10000.0). Mixers that
        rotate read it; learned and sinusoidal positions are added to the embedding instead.
      norm: the model's norm block, e.g. dict(kind='rmsnorm', eps=1e-6).
      bias: whether projections carry a bias.
      dropout: dropout rate of attention weights' output and of sub-block outputs.
      init: name of the initialiser scheme ('gpt2', 'lecun').
      globals: global tokens that the model puts in front of each row's own (`models.globals`), for
        mixers that say 'globals' in `supports`.
    """

    width: int
    policy: Policy
    causal: bool = True
    depth: int = 1
    max_len: int = 1024
    positions: dict = dataclasses.field(default_factory=dict)
    norm: dict = dataclasses.field(default_factory=lambda: {'kind': 'rmsnorm'})
    bias: bool = False
    dropout: float = 0.0
    init: str = 'gpt2'
    globals: int = 0
