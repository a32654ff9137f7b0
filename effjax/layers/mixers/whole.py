"""What mixers share that compress a whole row: what they refuse, and why."""

from typing import Any, NoReturn

import jax

from effjax.core.axes import GrowthSpec
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.layers.mixers.attention import Attention, State


class WholeRow(Attention):
    """Attention whose length is compressed: every output depends on every token of the row.

    A subclass gives its `name` and overrides `_parallel` and `cost`. It looks both ways, has no
    state, and takes rows of one text each, without documents.
    """

    causal = False
    supports = frozenset({'bidirectional'})
    growth_spec = GrowthSpec(outputs=('out',))
    name: str

    def _check_context(self, ctx: Context) -> None:
        """Refuses a causal model.

        Raises:
          ConfigError: always in a causal model.
        """
        if ctx.causal:
            raise ConfigError(
                f'{self.name} compresses the whole row, later tokens included, so that in a causal '
                'model a token would see what it has to predict; use it in an encoder or vit, or a '
                'causal mixer such as retnet or linear_attention.'
            )

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        info: SeqInfo,
        context: Any = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[jax.Array, State | None, dict[str, Any]]:
        """Returns (y [B, T, D], None, {}); see `layers.mixers`.

        Raises:
          ConfigError: documents, a context, a state, or more tokens than the model's `max_len`.
        """
        if info.segment_ids is not None:
            raise ConfigError(
                f'{self.name} compresses the whole row and cannot keep its documents apart; set '
                "config.data.packing to 'stream', or use a mixer that can, such as attention or "
                'reformer.'
            )
        if context is not None:
            raise ConfigError(
                f'{self.name} reads its own sequence only: it takes no context; use '
                "mixer.kind='attention'."
            )
        if x_BTD.shape[1] > self.max_len:
            raise ConfigError(
                f'{self.name}: a row of {x_BTD.shape[1]} tokens is longer than the {self.max_len} '
                'that the mixer was built for; set config.model.max_len to the longest row.'
            )
        return super().__call__(x_BTD, info=info, state=state, return_state=return_state)

    def _need_causal(self, what: str) -> NoReturn:
        raise ConfigError(
            f'{self.name} looks in both directions and has no {what}: it needs the whole sequence '
            'at once; use a causal mixer to decode.'
        )
