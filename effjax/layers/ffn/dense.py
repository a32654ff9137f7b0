"""Dense feed-forward parts: `down(act(up x))`, and the gated `down(act(gate x) * up x)`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import GrowthSpec
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.layers.gates import Activation, gated_product
from effjax.layers.linear import Projection, initializer


def relu2(x: jax.Array) -> jax.Array:
    """Squared ReLU (Primer, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415), as in GPT-2."""
    return jax.nn.gelu(x, approximate=True)


class Dense(nnx.Module):
    """Two products with an activation between; subclasses name it and say whether it is gated.

    Args:
      ctx: the model's context.
      hidden: hidden width; None means 4 D, or for gated parts 8/3 D rounded up to a multiple of
        64, which keeps the number of parameters about the same (Shazeer, arXiv 2002.05202).
      bias: whether products carry a bias; None asks the model.
    """

    activation: Activation = staticmethod(jax.nn.relu)
    gated: bool = False
    growth_spec = GrowthSpec(frozenset({'embed', 'mlp'}), ('down',))

    def __init__(
        self, ctx: Context, *, hidden: int | None = None, bias: bool | None = None, rngs: nnx.Rngs
    ):
        if hidden is not None and hidden < 1:
            raise ConfigError(f'hidden must be at least 1, got {hidden}.')
        if hidden is None:
            hidden = -(-8 * ctx.width // (3 * 64)) * 64 if self.gated else 4 * ctx.width
        self.width, self.hidden = ctx.width, hidden
        self.with_bias = ctx.bias if bias is None else bias
        self.itemsize = ctx.policy.compute_dtype.itemsize
        make: Any = functools.partial(Projection, ctx, bias=self.with_bias)
        inner = functools.partial(
            make, '...d,df->...f', (ctx.width, hidden), ('embed', 'mlp'),
            init=initializer(ctx, ctx.width),
        )  # fmt: skip
        if self.gated:
            self.gate = inner(rngs=branch(rngs, 'gate'))
        self.up = inner(rngs=branch(rngs, 'up'))
        self.down = make(
            '...f,fd->...d', (hidden, ctx.width), ('mlp', 'embed'),
            init=initializer(ctx, hidden, residual=True), rngs=branch(rngs, 'down'),
        )  # fmt: skip

    def __call__(self, x: jax.Array, *, info: SeqInfo) -> tuple[jax.Array, dict[str, Any]]:
        """Returns (y, {}) for x [..., D] in the compute dtype."""
        del info  # tokens are independent, padding included
        if self.gated:
            h = gated_product(type(self).activation, self.gate(x), self.up(x))
        else:
            h = type(self).activation(self.up(x))
        return self.down(h), {}

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass over [batch, seq_len]."""
        tokens, products = batch * seq_len, 3 if self.gated else 2
        params = products * self.width * self.hidden
        if self.with_bias:
            params += (products - 1) * self.hidden + self.width
        return Cost(
            matmul=products * matmul_flops(tokens, self.width, self.hidden),
            params=params,
            params_used=params,
            # The input, the results of the inner products, and what goes into the last one.
            activation_bytes=tokens * (self.width + products * self.hidden) * self.itemsize,
        )


class ReLU(Dense):
    """`down(relu(up x))` (Vaswani et al., arXiv 1706.03762)."""


class ReLU2(Dense):
    """`down(relu(up x)^2)` (Primer, arXiv 2109.08668)."""

    activation = staticmethod(relu2)


class GELU(Dense):
    """`down(gelu(up x))` (GPT-2, BERT)."""

    activation = staticmethod(gelu)


class SwiGLU(Dense):
    """`down(silu(gate x) * up x)` (Shazeer, arXiv 2002.05202)."""

    activation = staticmethod(jax.nn.silu)
    gated = True


class GeGLU(Dense):
    """`down(gelu(gate x) * up x)` (Shazeer, arXiv 2002.05202)."""

    activation = staticmethod(gelu)
    gated = True
