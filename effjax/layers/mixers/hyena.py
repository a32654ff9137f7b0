"""Hyena: gates and long convolutions in turn, whose filters a small network writes."""

import math
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
from effjax.kernels import fft_conv
from effjax.kernels.documents import last_real
from effjax.kernels.fft_conv.cost import model_flops
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.recurrent import Recurrent, State, need_causal, start
from effjax.layers.mixers.short_conv import ShortConv


class Hyena(Recurrent):
    """`out(x_0 * conv(h, x_1 * v))`, or one gate and one long convolution more for each order.

    Poli et al., arXiv 2302.10866. Gates and values are projections after a short convolution; a
    channel's filter h is as long as the sequence and comes from an `ImplicitFilter`. Decoding is
    exact but not of fixed size: a step reads the inputs of every long convolution since the
    document began, `order - 1` vectors a token where attention keeps two, and writes the filters
    anew, which only a loop around many steps can share.

    Args:
      ctx: the model's context; the filters reach `ctx.max_len` tokens back and know no more.
      order: gates, and long convolutions plus one.
      conv: taps of the short convolution.
      filter_width: hidden width of the filters' network.
      filter_layers: its hidden layers after the first.
      bands: frequencies of time that it reads, beside time itself.
      frequency: initial frequency of its sines; higher ones make rougher filters.
      fast: a filter fades to 1 % over this share of `max_len`, in the channel that fades most.
      slow: the same in the channel that fades least.
      filter_std: standard deviation of the network's first weights, its biases 0: filters that
        start near 0, as in language models that set all their linear layers so. None: weights
        and biases uniform within 1 / sqrt(inputs).
      bias: whether projections and the short convolution carry a bias; None asks the model.
      implementation: of the long convolution; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions, or sizes that cannot be.
    """

    name = 'hyena'

    def __init__(
        self,
        ctx: Context,
        *,
        order: int = 2,
        conv: int = 3,
        filter_width: int = 64,
        filter_layers: int = 2,
        bands: int = 1,
        frequency: float = 1.0,
        fast: float = 0.3,
        slow: float = 1.5,
        filter_std: float | None = None,
        bias: bool | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if order < 2:
            raise ConfigError(f'hyena: order must be at least 2, got {order}.')
        self.width, self.order, self.max_len = ctx.width, order, ctx.max_len
        self.policy, self.implementation = ctx.policy, implementation
        self.with_bias = ctx.bias if bias is None else bias
        self.taps = conv
        self.inputs = (*(f'gate_{i}' for i in range(order)), 'value')
        for name in self.inputs:
            setattr(self, name, self._projection(ctx, 'mlp', branch(rngs, name)))
            behind = ShortConv(
                ctx, (ctx.width,), ('mlp',), taps=conv, bias=self.with_bias,
                rngs=branch(rngs, f'{name}_conv'),
            )  # fmt: skip
            setattr(self, f'{name}_conv', behind)
        self.filter = ImplicitFilter(
            ctx, order - 1, width=filter_width, layers=filter_layers, bands=bands,
            frequency=frequency, fast=fast, slow=slow, std=filter_std, rngs=branch(rngs, 'filter'),
        )  # fmt: skip
        skip = jax.random.normal(branch(rngs, 'skip').params(), (order - 1, ctx.width))
        self.skip = param(skip.astype(ctx.policy.param_dtype), (None, 'mlp'), no_decay=True)
        self.out = self._projection(ctx, 'embed', branch(rngs, 'out'))

    def _projection(self, ctx: Context, into: str, rngs: nnx.Rngs) -> Projection:
        return Projection(
            ctx,
            '...d,de->...e',
            (ctx.width, ctx.width),
            ('embed', 'mlp') if into == 'mlp' else ('mlp', 'embed'),
            bias=self.with_bias,
            init=initializer(ctx, ctx.width, residual=into == 'embed'),
            rngs=rngs,
        )

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the memory for the longest sequence the filters are built for."""
        return self._memory(batch, self.max_len, dtype)

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        """Returns the state before the first token, with room for `max_len` tokens a document.

        Raises:
          ConfigError: more tokens than the filters are built for.
        """
        self._check_length(max_len)
        return {**self._memory(batch, max_len, dtype), **start(batch)}

    def state_length(self, state: State) -> int:
        """Returns how many tokens a document may have in a state."""
        return state['history'].shape[1] if 'history' in state else self.max_len

    def _memory(self, batch: int, slots: int, dtype: Any) -> State:
        shape = (batch, slots, self.order - 1, self.width)
        tails = {name: getattr(self, f'{name}_conv').memory(batch, dtype) for name in self.inputs}
        return {'history': jnp.zeros(shape, dtype), **tails}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Gates and long convolutions over a stretch of tokens; see `Recurrent.mix`."""
        self._check_length(x_BTD.shape[1])
        old = memory or (self.memory(len(x_BTD), x_BTD.dtype) if return_memory else None)
        new: State = {}
        parts = {}
        for name in self.inputs:
            conv = getattr(self, f'{name}_conv')
            before = None if memory is None else memory[name]
            parts[name], new[name] = conv(getattr(self, name)(x_BTD), info.segment_ids, before)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        taps = self.filter(x_BTD.shape[1] if old is None else self.max_len, wide)
        y, inputs = parts['value'], []
        for i in range(self.order - 1):
            u = y * parts[f'gate_{self.order - 1 - i}']
            inputs.append(u)
            past = None if memory is None else memory['history'][:, :, i]
            y = self._long(u, taps[:, i], info, past)
            y = y + u * self.policy.cast(self.skip[i])
        y = self.out(y * parts['gate_0'])
        if old is None or not return_memory:
            return y, None
        new['history'] = remember(old['history'], jnp.stack(inputs, axis=2), info)
        return y, new

    def _long(
        self, u: jax.Array, taps: jax.Array, info: SeqInfo, history: jax.Array | None
    ) -> jax.Array:
        """One long convolution of u [B, T, D], after a history [B, S, D] of the first document."""
        ids, position = info.segment_ids, info.positions
        if history is not None and u.shape[1] == 1:  # a step needs no transform
            lag = position - jnp.arange(history.shape[1])
            weight = jnp.where((lag > 0)[..., None], taps[jnp.clip(lag, 0)], 0)
            past = jnp.sum(weight * history.astype(weight.dtype), axis=1, keepdims=True)
            return (past + taps[0] * u.astype(taps.dtype)).astype(u.dtype)
        y = fft_conv(u, taps, segment_ids=ids, implementation=self.implementation)
        if history is None:
            return y
        # The history, zeros behind it, continued to the places of the tokens that go on with it.
        past = fft_conv(history, taps, implementation=self.implementation)
        at = jnp.clip(position, 0, history.shape[1] - 1)[..., None]
        past = jnp.take_along_axis(past, at, axis=1)
        return y + jnp.where(_of_first(ids, position)[..., None], past, 0).astype(y.dtype)

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass; the filters are written once for all rows and do not count."""
        tokens, item = batch * seq_len, self.policy.compute_dtype.itemsize
        products = self.order + 2
        params = products * self.width**2 + (self.order + 1) * self.width * self.taps
        params += (self.order - 1) * self.width + self.filter.params
        if self.with_bias:
            params += (2 * (self.order + 1) + 1) * self.width
        return Cost(
            matmul=matmul_flops(tokens, self.width, products * self.width),
            fft=(self.order - 1) * model_flops(batch, seq_len, self.width),
            params=params,
            params_used=params,
            # The input, the projections before and after their convolution, for each long
            # convolution its input, float32 transform and output, and the gated output.
            activation_bytes=tokens
            * self.width
            * ((2 + 2 * (self.order + 1) + 2 * (self.order - 1)) * item + 8 * (self.order - 1)),
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )

    def _check_length(self, length: int) -> None:
        if length > self.max_len:
            raise ConfigError(
                f'{self.name}: {length} tokens, but its filters are built for {self.max_len}; give '
                'the model a longer config.model.max_len.'
            )


class ImplicitFilter(nnx.Module):
    """Filters `h[t] = network(time features)[t] * exp(-decay t)`, as long as wanted.

    The network's hidden layers end in sines with one trained frequency a unit, shared by them.
    Its parameters stay float32 and are not decayed; time runs from 0 to 1 over `ctx.max_len`.

    Args:
      ctx: the model's context.
      filters: filters a channel.
      width: hidden width.
      layers: hidden layers after the first.
      bands: frequencies of time among the features.
      frequency: initial frequency of the sines.
      fast: time in which the most fading channel falls to 1 %.
      slow: time in which the least fading one does.
      std: standard deviation of the first weights, biases 0; None: uniform within 1 / sqrt(inputs).

    Raises:
      ConfigError: sizes that cannot be.
    """

    def __init__(
        self,
        ctx: Context,
        filters: int,
        *,
        width: int,
        layers: int,
        bands: int,
        frequency: float,
        fast: float,
        slow: float,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        if min(width, bands) < 1 or layers < 0 or not 0 < fast <= slow:
            raise ConfigError(
                'hyena: filter_width and bands are at least 1, filter_layers at least 0, and '
                f'0 < fast <= slow; got {width}, {bands}, {layers}, {fast} and {slow}.'
            )
        if std is not None and not std > 0:
            raise ConfigError(f'hyena: filter_std must be above 0 or None, got {std}.')
        self.length, self.bands, self.layers = ctx.max_len, bands, layers
        channels, features = filters * ctx.width, 1 + 2 * bands
        self.shape, self.fast, self.slow = (filters, ctx.width), float(fast), float(slow)
        self.params = (features + 1) * width + layers * width * (width + 1)
        self.params += width * channels + width
        dtype = ctx.policy.param_dtype
        fixed: Any = {'no_decay': True, 'keep_fp32': True}

        def made(name: str, shape: tuple[int, ...], fan_in: int, axes: tuple[Any, ...]):
            most, key = fan_in**-0.5, branch(rngs, name).params()
            if std is None:
                value = jax.random.uniform(key, shape, dtype, -most, most)
            elif name.endswith('bias'):
                value = jnp.zeros(shape, dtype)
            else:
                value = std * jax.random.normal(key, shape, dtype)
            return param(value, axes, **fixed)

        self.first = made('first', (features, width), features, (None, None))
        self.first_bias = made('first_bias', (width,), features, (None,))
        self.hidden = made('hidden', (layers, width, width), width, (None,) * 3)
        self.hidden_bias = made('hidden_bias', (layers, width), width, (None, None))
        self.last = made('last', (width, filters, ctx.width), width, (None, None, 'mlp'))
        self.frequency = param(jnp.full((width,), frequency, dtype), (None,), **fixed)

    @property
    def rates(self) -> np.ndarray:
        """How fast each filter fades, in 1 / longest sequence, [filters, D]."""
        most, least = math.log(100) / self.fast, math.log(100) / self.slow
        return np.linspace(least, most, math.prod(self.shape)).reshape(self.shape)

    def __call__(self, length: int, dtype: Any) -> jax.Array:
        """Returns the filters' first `length` taps [L, filters, D], in float32 or wider."""
        time, features = self._features(length)
        weights = [w[...].astype(dtype) for w in (self.first, self.hidden, self.last)]
        biases = [b[...].astype(dtype) for b in (self.first_bias, self.hidden_bias)]
        frequency = self.frequency[...].astype(dtype)
        with jax.default_matmul_precision('highest'):
            h = jnp.sin(frequency * (jnp.asarray(features, dtype) @ weights[0] + biases[0]))
            for i in range(self.layers):
                h = jnp.sin(frequency * (h @ weights[1][i] + biases[1][i]))
            h = jnp.einsum('tw,wfd->tfd', h, weights[2])
        return h * jnp.asarray(np.exp(-time[:, None, None] * self.rates), dtype)

    def _features(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Time [L] from 0 to 1 over the longest sequence, and what the network reads [L, F]."""
        place = np.arange(length)
        time = place / max(self.length - 1, 1)
        speed = np.linspace(1e-4, self.bands - 1, self.bands)
        angle = 2 * np.pi / self.length * place[:, None] * speed
        return time, np.concatenate([time[:, None], np.cos(angle), -np.sin(angle)], axis=1)


def _of_first(ids: jax.Array | None, position: jax.Array) -> jax.Array:
    """Which tokens [B, T] are of the row's first real document."""
    if ids is None:
        return jnp.ones(position.shape, bool)
    first = jnp.argmax(ids != 0, axis=1)[:, None]
    return (ids == jnp.take_along_axis(ids, first, axis=1)) & (ids != 0)


def remember(history: jax.Array, inputs: jax.Array, info: SeqInfo) -> jax.Array:
    """The history [B, S, N, D] of the last document, after inputs [B, T, N, D] at its places."""
    ids, position = info.segment_ids, info.positions
    row = jnp.arange(len(history))[:, None]
    slot = position
    if ids is not None:
        some, last = last_real(ids)
        last_id = jnp.take_along_axis(ids, last[:, None], axis=1)
        one = (_of_first(ids, position) & (ids == last_id)).any(1) | ~some  # one document, or none
        history = jnp.where(one[:, None, None, None], history, 0)
        slot = jnp.where((ids == last_id) & (ids != 0), position, history.shape[1])
    return history.at[row, slot].set(inputs.astype(history.dtype), mode='drop')
