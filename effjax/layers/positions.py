"""How a model knows the order of its tokens.

Positions come from `SeqInfo.positions`: they count inside each document. 'rope' turns queries and
keys inside the mixers that read it from the context; 'learned' and 'sinusoidal' give vectors that
the model adds to the embedding; 'none' leaves the order to the mixers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.registry import arguments, check_block

POSITIONS = {
    'rope': 'effjax.layers.positions:Rope',
    'learned': 'effjax.layers.positions:Learned',
    'sinusoidal': 'effjax.layers.positions:Sinusoidal',
    'none': 'effjax.layers.positions:NoPositions',
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al., arXiv 2104.09864): pairs of dimensions turn with the position.

    Dimension i pairs with i + rotated / 2, as in GPT-NeoX and LLaMA. The scores of a query and a
    key depend on the difference of their positions only.

    Attributes:
      head_dim: dimensions of a head.
      base: the slowest pair turns once in about 2 pi base positions.
      fraction: share of the head's dimensions that turn; the rest keep no order.
    """

    head_dim: int
    _: dataclasses.KW_ONLY
    base: float = 10000.0
    fraction: float = 1.0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ConfigError(f'positions.fraction must be in (0, 1], got {self.fraction}.')
        if self.base <= 1:
            raise ConfigError(f'positions.base must be above 1, got {self.base}.')
        if self.rotated < 2 or self.rotated % 2:
            raise ConfigError(
                f'rotary positions turn an even number of dimensions of a head, not '
                f'{self.rotated} of {self.head_dim}; change head_dim or positions.fraction.'
            )

    @property
    def rotated(self) -> int:
        """Dimensions of a head that turn."""
        return int(self.head_dim * self.fraction)

    def __call__(self, x_BTHD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns x turned by its positions, in its own dtype; angles are float32."""
        half = self.rotated // 2
        wide = jnp.promote_types(x_BTHD.dtype, jnp.float32)
        speed = np.asarray(self.base ** -(np.arange(half) / half), wide)
        angle_BT1F = positions_BT[:, :, None, None].astype(wide) * speed
        cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
        a, b = (x_BTHD[..., i * half : (i + 1) * half].astype(wide) for i in (0, 1))
        turned = [a * cos - b * sin, b * cos + a * sin]
        turned = [x.astype(x_BTHD.dtype) for x in turned]
        return jnp.concatenate([*turned, x_BTHD[..., self.rotated :]], axis=-1)


class Learned(nnx.Module):
    """A trained vector for each position up to `ctx.max_len` (GPT-2, ViT)."""

    def __init__(self, ctx: Context, *, rngs: nnx.Rngs):
        shape, dtype = (ctx.max_len, ctx.width), ctx.policy.param_dtype
        self.policy = ctx.policy
        table = 0.01 * jax.random.normal(rngs.params(), shape, dtype)
        self.table = param(table, ('position', 'embed'), no_decay=True, role='table')

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Returns vectors [..., D] of positions [...] in the compute dtype."""
        return self.policy.cast(jnp.take(self.table[...], positions, axis=0))


class Sinusoidal(nnx.Module):
    """Fixed sines and cosines (Vaswani et al., arXiv 1706.03762), halves side by side.

    Args:
      ctx: the model's context.
      base: the slowest wave has a length of about 2 pi base positions.
    """

    def __init__(self, ctx: Context, *, base: float = 10000.0, rngs: nnx.Rngs):
        del rngs
        if ctx.width % 2:
            raise ConfigError(f'sinusoidal positions need an even width, got {ctx.width}.')
        self.policy, self.width, self.base = ctx.policy, ctx.width, float(base)

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Returns vectors [..., D] of positions [...] in the compute dtype."""
        half = self.width // 2
        wide = jnp.promote_types(self.policy.compute_dtype, jnp.float32)
        speed = np.asarray(self.base ** -(np.arange(half) / half), wide)
        angle = positions[..., None].astype(wide) * speed
        return self.policy.cast(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1))


class NoPositions(nnx.Module):
    """Nothing is added; a causal mixer still sees some order (Haviv et al., arXiv 2203.16634)."""

    def __init__(self, ctx: Context, *, rngs: nnx.Rngs):
        del rngs
        self.policy, self.width = ctx.policy, ctx.width

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Returns zeros [..., D]."""
        return jnp.zeros((*positions.shape, self.width), self.policy.compute_dtype)


def rotary(ctx: Context, head_dim: int) -> Rope | None:
    """Returns the context's rotary positions for heads of a size, or None if it has others.

    Raises:
      ConfigError: unknown kind or arguments, or a head that cannot turn.
    """
    if not ctx.positions or ctx.positions['kind'] != 'rope':
        return None
    check_block(POSITIONS, ctx.positions, 'positions', 'positions')
    return Rope(head_dim, **arguments(ctx.positions))


def additive(ctx: Context, *, rngs: nnx.Rngs) -> nnx.Module | None:
    """Returns the context's positions that are added to the embedding, or None.

    Raises:
      ConfigError: unknown kind or arguments.
    """
    if not ctx.positions:
        return None
    component = check_block(POSITIONS, ctx.positions, 'positions', 'positions')
    if component in (Rope, NoPositions):
        return None
    return component(ctx, **arguments(ctx.positions), rngs=rngs)
