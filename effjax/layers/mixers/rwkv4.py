"""RWKV-4: each channel averages its past with weights that keys set and time decays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import wkv
from effjax.kernels.wkv.cost import model_flops
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.recurrent import Recurrent, State, need_causal
from effjax.layers.mixers.token_shift import shifted

_MIXED = ('key', 'value', 'receptance')
_SUMS = ('numerator', 'denominator', 'exponent')


class RWKV4(Recurrent):
    """`out(sigmoid(r) * wkv(k, v))`, wkv the average of values with weights e^(k - age x rate).

    The time mixing of RWKV-4 (Peng et al., arXiv 2305.13048). Rates and the weight of a token
    itself are a channel's own; keys, values and r come from fixed mixtures of the token and the
    one before it. Sums are kept with their largest exponent apart, so that keys of any size are
    exact. Its channel mixing is a feed-forward part of its own, which any of `ffn` takes the
    place of.

    Args:
      ctx: the model's context.
      inner: channels; None means the model's width.
      implementation: of the average; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions, or no channels.
    """

    name = 'rwkv4'

    def __init__(
        self,
        ctx: Context,
        *,
        inner: int | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if inner is not None and inner < 1:
            raise ConfigError(f'rwkv4: inner must be at least 1, got {inner}.')
        self.width, self.inner, self.policy = ctx.width, inner or ctx.width, ctx.policy
        self.implementation = implementation

        def inward(name: str) -> Projection:
            return Projection(
                ctx, '...d,di->...i', (ctx.width, self.inner), ('embed', 'mlp'), bias=False,
                init=initializer(ctx, ctx.width), rngs=branch(rngs, name),
            )  # fmt: skip

        self.key, self.value = inward('key'), inward('value')
        self.receptance = inward('receptance')
        self.out = Projection(
            ctx, '...i,id->...d', (self.inner, ctx.width), ('mlp', 'embed'), bias=False,
            init=initializer(ctx, self.inner, residual=True), rngs=branch(rngs, 'out'),
        )  # fmt: skip
        self._make_vectors(ctx)

    def _make_vectors(self, ctx: Context) -> None:
        """The authors' initial values, as in the middle of a model."""

        def fixed(value: np.ndarray, axis: str, **kw: Any) -> nnx.Param:
            return param(jnp.asarray(value, ctx.policy.param_dtype), (axis,), no_decay=True, **kw)

        place = np.arange(self.inner) / max(self.inner - 1, 1)
        self.log_rate = fixed(-5 + 8 * place**1.35, 'mlp', keep_fp32=True)
        zigzag = 0.5 * ((np.arange(self.inner) + 1) % 3 - 1)
        self.bonus = fixed(np.log(0.3) + zigzag, 'mlp', keep_fp32=True)
        # How much of the token before enters: all of it in the first channel, none in the last.
        share = 1 - (np.arange(ctx.width) / ctx.width) ** 0.5
        self.key_share = fixed(share, 'embed')
        self.value_share = fixed(share, 'embed')
        self.receptance_share = fixed(1 - (np.arange(ctx.width) / ctx.width) ** 0.25, 'embed')

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the two sums and their exponent, float32, and the last token's input."""
        wide = jnp.promote_types(dtype, jnp.float32)
        sums = {name: jnp.zeros((batch, self.inner), wide) for name in _SUMS}
        return {**sums, 'token': jnp.zeros((batch, self.width), dtype)}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Time mixing over a stretch of tokens; see `Recurrent.mix`."""
        previous, token = shifted(x_BTD, info, None if memory is None else memory['token'])
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        k, v, r = (
            getattr(self, name)(
                x_BTD + (previous - x_BTD) * self.policy.cast(getattr(self, f'{name}_share')[...])
            )
            for name in _MIXED
        )
        before = None if memory is None else tuple(memory[name] for name in _SUMS)
        o, sums = wkv(
            k,
            v,
            -jnp.exp(self.log_rate[...].astype(wide)),
            self.bonus[...],
            initial_state=before,  # type: ignore[arg-type]
            segment_ids=info.segment_ids,
            return_state=True,
            implementation=self.implementation,
        )
        y = self.out(jax.nn.sigmoid(r) * o)
        if not return_memory:
            return y, None
        return y, {**dict(zip(_SUMS, sums, strict=True)), 'token': token}

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: four products, and the average by its recurrence."""
        tokens, products = batch * seq_len, 4 * self.width * self.inner
        params = products + 2 * self.inner + 3 * self.width
        return Cost(
            matmul=matmul_flops(tokens, 1, products),
            scan=model_flops(batch, seq_len, self.inner),
            params=params,
            params_used=params,
            # The input, its difference and three mixtures; keys, values, r, the average and the
            # gated one; in float32 both sums and their decays at each token, the exponent and
            # three exponentials.
            activation_bytes=tokens
            * (5 * self.width + 5 * self.inner)
            * self.policy.compute_dtype.itemsize
            + 4.0 * tokens * 8 * self.inner,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )
