"""PolySketchFormer: attention with polynomial weights, sketched far away, exact in local blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import linear_recurrence
from effjax.kernels.documents import begins
from effjax.kernels.linear_recurrence.cost import model_flops
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.cache import last_real
from effjax.layers.mixers.recurrent import (
    QueryKeyValue,
    Recurrent,
    State,
    from_heads,
    matrix_memory,
    need_causal,
)
from effjax.layers.norms import LayerNorm
from effjax.layers.positions import rotary

_DEGREES = (2, 4, 8)


class PolySketch(Recurrent):
    """`o_t = sum_{j<=t} s_tj v_j / (1 + sum_{j<=t} s_tj)`, s = (q . k)^p or a sketch of it.

    PolySketchFormer (Kacham et al., arXiv 2310.01655). Queries and keys pass a layer norm. A
    sketch gives r numbers with E[f(q) . f(k)] = (q . k)^(p/2); its square is never negative and a
    product of features f_i f_j, so that sums replace the T x T matrix. Pairs in the same block of
    a document are weighted exactly. A learned sketch is a small network in place of random
    products. With p = 2 nothing is sketched: f(x) = x.

    Args:
      ctx: the model's context; rotary positions turn queries and keys.
      heads: heads H; width / heads dimensions each.
      degree: p, 2, 4 or 8.
      sketch: numbers r of a sketch.
      learned: learn the sketch instead of drawing it.
      block: tokens of a block that is exact; 0: all pairs are sketched.
      seed: of the random sketch, which all heads share; it is fixed, not a parameter.
      implementation: of the recurrence; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; sizes that cannot be.
    """

    name = 'polysketch'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        degree: int = 4,
        sketch: int = 32,
        learned: bool = False,
        block: int = 256,
        seed: int = 0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if heads < 1 or ctx.width % heads:
            raise ConfigError(f'polysketch: heads {heads} do not divide width {ctx.width}.')
        if degree not in _DEGREES or sketch < 1 or block < 0:
            raise ConfigError(
                f'polysketch: degree is one of {_DEGREES}, sketch at least 1 and block at least 0, '
                f'not {degree}, {sketch} and {block}.'
            )
        self.width, self.heads, self.head_dim = ctx.width, heads, ctx.width // heads
        self.degree, self.block, self.seed = degree, block, seed
        self.sketched = sketch if learned or degree > 2 else self.head_dim
        self.policy, self.implementation = ctx.policy, implementation
        self.inputs = QueryKeyValue(ctx, heads, self.head_dim, self.head_dim, rngs=rngs)
        self.rope = rotary(ctx, self.head_dim)
        self.query_norm = LayerNorm(ctx, self.head_dim, 'head_dim', bias=True, rngs=rngs)
        self.key_norm = LayerNorm(ctx, self.head_dim, 'head_dim', bias=True, rngs=rngs)
        drawn = branch(rngs, 'sketch')
        self.network = Sketch(ctx, self.head_dim, sketch, rngs=drawn) if learned else None
        self.out = from_heads(ctx, heads, self.head_dim, rngs=branch(rngs, 'out'))

    @property
    def feature_count(self) -> int:
        """Products of two numbers of a sketch, equal ones joined."""
        return self.sketched * (self.sketched + 1) // 2

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns sums over the past, and the keys and values of the block that is under way."""
        sums = matrix_memory(batch, self.heads, self.feature_count, self.head_dim + 1, dtype)
        if not self.block:
            return {'sums': sums}
        near = jnp.zeros((batch, self.block, self.heads, self.head_dim), dtype)
        return {'sums': sums, 'key': near, 'value': near}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Polynomial attention over a stretch of tokens; see `Recurrent.mix`."""
        q, k, v, _ = self.inputs(x_BTD, info, None)
        if self.rope is not None:
            q, k = (self.rope(x, info.positions) for x in (q, k))
        q, k = self.query_norm(q), self.key_norm(k)
        old = self.memory(x_BTD.shape[0], k.dtype) if memory is None else memory
        if not self.block:
            o, sums = self._sketched(q, k, v, old['sums'], info)
            new = {'sums': sums}
        else:
            o = self._within(q, k, v, old['sums'], info)
            if memory is not None:
                o = o + self._from_memory(q, old, info)
            new = self._remember(k, v, old, info) if return_memory else {}
        o = (o[..., :-1] / (1 + o[..., -1:])).astype(v.dtype)
        return self.out(o), new if return_memory else None

    def _sketched(
        self, q: jax.Array, k: jax.Array, v: jax.Array, sums: jax.Array, info: SeqInfo
    ) -> tuple[jax.Array, jax.Array]:
        """Sums of values and weights where no pair is exact, and those after the last token."""
        return linear_recurrence(
            self._features(q),
            self._features(k),
            _with_one(v),
            initial_state=sums,
            segment_ids=info.segment_ids,
            return_state=True,
            implementation=self.implementation,
        )

    def _features(self, x: jax.Array) -> jax.Array:
        return _squares(self.sketch(x))

    def sketch(self, x: jax.Array) -> jax.Array:
        """Returns f(x), [B, T, H, r] in float32, of normalised queries or keys."""
        if self.network is not None:
            return self.network(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self._random(x, self.degree // 2, np.random.default_rng(self.seed))

    def _random(self, x: jax.Array, degree: int, rng: np.random.Generator) -> jax.Array:
        """Products of two sketches of half the degree, each by normal numbers of its own."""
        if degree == 1:
            return x
        sides = []
        for _ in range(2):
            side = self._random(x, degree // 2, rng)
            normal = rng.normal(size=(side.shape[-1], self.sketched))
            sides.append(side @ jnp.asarray(normal, side.dtype))
        return sides[0] * sides[1] * self.sketched**-0.5

    def _within(
        self, q: jax.Array, k: jax.Array, v: jax.Array, sums: jax.Array, info: SeqInfo
    ) -> jax.Array:
        """What tokens read of their stretch and of finished blocks before it, [B, T, H, V + 1].

        The row is cut into chunks of a block's length. A block of a document may lie in two: pairs
        of a chunk and the one before it are formed, those of the same block weighted exactly. What
        lies before both is in other blocks, and comes as sums.
        """
        length, ids = q.shape[1], _ids(q, info)
        cut = functools.partial(_cut, size=self.block)
        place, others = cut(info.positions), _two(cut(info.positions))
        real = cut(ids)
        mask = (real[..., :, None] == _two(real)[..., None, :]) & (real != 0)[..., None]
        mask &= others[..., None, :] <= place[..., :, None]
        same = others[..., None, :] // self.block == place[..., :, None] // self.block
        o = self._pairs(cut(q), _two(cut(k)), _two(cut(v)), mask, same)
        o = o + self._before(cut(q), cut(k), cut(v), sums, ids)
        return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]

    def _before(
        self, q: jax.Array, k: jax.Array, v: jax.Array, sums: jax.Array, ids: jax.Array
    ) -> jax.Array:
        """What chunks read of all that lies before the chunk before them, as sums."""
        document = jnp.cumsum(begins(ids), axis=1)
        document = _cut(document, self.block, mode='edge')
        end = document[..., -1]
        entry = jnp.pad(end[:, :-1], ((0, 0), (1, 0)))  # the sums' document before each chunk
        writes = (document == end[..., None]) & (_cut(ids, self.block) != 0)
        values = jnp.where(writes[..., None, None], _with_one(v), 0)
        written = jnp.einsum('bnchf,bnchv->nbhfv', self._features(k), values)
        keeps = jnp.moveaxis((end == entry).astype(written.dtype), 1, 0)[..., None, None, None]
        _, states = jax.lax.scan(lambda s, at: (s * at[1] + at[0], s), sums, (written, keeps))
        late = jnp.concatenate([states[:1], states[:-1]])
        known = jnp.concatenate([entry[:, :1], entry[:, :-1]], axis=1)
        o = jnp.einsum('bnchf,nbhfv->bnchv', self._features(q), late)
        return jnp.where((document == known[..., None])[..., None, None], o, 0)

    def _pairs(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, same: jax.Array
    ) -> jax.Array:
        """Values and 1 summed by weights, exact where `same` [..., T, S], 0 outside the mask."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        exact = jnp.einsum('...thk,...shk->...hts', q.astype(wide), k.astype(wide))
        rough = jnp.einsum('...thr,...shr->...hts', self.sketch(q), self.sketch(k))
        weights = jnp.where(same[..., None, :, :], exact**self.degree, rough**2)
        weights = jnp.where(mask[..., None, :, :], weights, 0)
        return jnp.einsum('...hts,...shv->...thv', weights, _with_one(v))

    def _from_memory(self, q: jax.Array, memory: State, info: SeqInfo) -> jax.Array:
        """What tokens read of the memory's tokens in a block that was not finished."""
        entry, goes_on = _entry(q, info)
        there = jnp.arange(self.block)[None] < entry % self.block
        same = (info.positions // self.block == entry // self.block)[..., :, None]
        mask = goes_on[..., :, None] & there[..., None, :]
        return self._pairs(q, memory['key'], memory['value'], mask, same)

    def _remember(self, k: jax.Array, v: jax.Array, old: State, info: SeqInfo) -> State:
        """The memory after a stretch: sums over finished blocks, keys and values of the last."""
        ids = _ids(k, info)
        some, last = last_real(ids)
        position = jnp.take_along_axis(info.positions, last[:, None], axis=1)
        done = (position + 1) // self.block  # blocks of the last document that are finished
        entry, goes_on = _entry(k, info)
        document = jnp.take_along_axis(ids, last[:, None], axis=1)
        fresh = (ids == document) & (info.positions // self.block < done)
        carried = jnp.take_along_axis(goes_on, last[:, None], axis=1)
        there = jnp.arange(self.block)[None] < entry % self.block
        there &= carried & (entry // self.block < done)
        sums = jnp.where(carried[..., None, None], old['sums'], 0)
        for key, value, mask in ((k, v, fresh), (old['key'], old['value'], there)):
            kept = jnp.where(mask[..., None, None], _with_one(value), 0)
            sums = sums + jnp.einsum('bthf,bthv->bhfv', self._features(key), kept)
        new = {'sums': jnp.where(some[:, None, None, None], sums, old['sums'])}
        for name, x in (('key', k), ('value', v)):
            new[name] = self._unfinished(x, old[name], ids == document, last, position)
            new[name] = jnp.where(some[:, None, None, None], new[name], old[name])
        return new

    def _unfinished(
        self, x: jax.Array, old: jax.Array, ours: jax.Array, last: jax.Array, position: jax.Array
    ) -> jax.Array:
        """Keys or values of the block that the last token did not finish, by place in it, else 0.

        `ours` [B, T] is where the last document stands.
        """
        slot = jnp.arange(self.block)[None]
        row = last[:, None] - position % self.block + slot
        inside = jnp.clip(row, 0, x.shape[1] - 1)
        fresh = (row >= 0) & jnp.take_along_axis(ours, inside, axis=1)
        new = jnp.take_along_axis(x, inside[..., None, None], axis=1).astype(old.dtype)
        new = jnp.where(fresh[..., None, None], new, old)
        held = (slot <= position % self.block) & ((position + 1) % self.block != 0)
        return jnp.where(held[..., None, None], new, 0)

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: products, sketches, sums, and exact pairs in blocks."""
        tokens, width, rank = batch * seq_len, self.width, self.sketched
        if self.network is not None:
            sketches = self.network.weights
        else:
            levels = self.degree.bit_length() - 2  # sketches of degree 2, of those of degree 2...
            sketches = sum(2**i * rank * (rank if i < levels else self.head_dim)
                           for i in range(1, levels + 1))  # fmt: skip
        full, rest = divmod(seq_len, self.block) if self.block else (0, 0)
        pairs = batch * (full * self.block * (self.block + 1) + rest * (rest + 1)) / 2
        params = self.inputs.params + width * width + 4 * self.head_dim
        params += 0 if self.network is None else self.network.params
        return Cost(
            matmul=matmul_flops(tokens, width, 4 * width)
            + matmul_flops(2 * tokens * self.heads, 1, sketches)
            + 4.0 * pairs * width,
            scan=model_flops(
                batch, seq_len, self.heads, self.feature_count, self.head_dim + 1, decay=False
            ),
            params=params,
            params_used=params,
            # The input, projections before and after norms, output; in float32 sketches, features,
            # sums, and the two weights of the pairs that blocks of the row meet.
            activation_bytes=tokens * 7.0 * width * self.policy.compute_dtype.itemsize
            + 4.0 * tokens * self.heads
            * (6 * rank + 2 * self.feature_count + 2 * self.head_dim + 4 * self.block),
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )  # fmt: skip


class Sketch(nnx.Module):
    """The learned sketch: two branches of two small networks, multiplied and bounded.

    Args:
      ctx: the model's context.
      size: dimensions of a query or key.
      sketch: numbers r of a sketch.
      expand: inner width of a network, as a multiple of r.
    """

    def __init__(self, ctx: Context, size: int, sketch: int, *, expand: int = 8, rngs: nnx.Rngs):
        inner, self.sketch = expand * sketch, sketch
        self.params = self.weights = 0
        for branch_name in ('left', 'right'):
            for level, columns in enumerate((size, sketch)):
                name, axis = f'{branch_name}_{level}', 'rank' if level else 'head_dim'
                norm = LayerNorm(ctx, columns, axis, bias=True, rngs=rngs)
                up = Projection(
                    ctx, '...k,km->...m', (columns, inner), (axis, 'mlp'), bias=False,
                    init=initializer(ctx, columns), rngs=branch(rngs, f'{name}_up'),
                )  # fmt: skip
                down = Projection(
                    ctx, '...m,mr->...r', (inner, sketch), ('mlp', 'rank'), bias=False,
                    init=initializer(ctx, inner), rngs=branch(rngs, f'{name}_down'),
                )  # fmt: skip
                for part, module in (('norm', norm), ('up', up), ('down', down)):
                    setattr(self, f'{name}_{part}', module)
                self.weights += inner * (columns + sketch)
                self.params += inner * (columns + sketch) + 2 * columns

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., r], each number between -sqrt(r) and sqrt(r)."""
        sides = []
        for branch_name in ('left', 'right'):
            y = x
            for level in range(2):
                norm, up, down = (
                    getattr(self, f'{branch_name}_{level}_{part}')
                    for part in ('norm', 'up', 'down')
                )
                y = down(jax.nn.gelu(up(norm(y))))
            sides.append(y)
        root = self.sketch**0.5
        return jnp.tanh(sides[0] * sides[1] / root) * root


def _squares(x: jax.Array) -> jax.Array:
    """Features whose product is (x . y)^2; the two of a pair are one."""
    i, j = np.triu_indices(x.shape[-1])
    factor = np.where(i == j, 1.0, 2.0**0.5).astype(x.dtype)
    return x[..., i] * x[..., j] * factor


def _with_one(v: jax.Array) -> jax.Array:
    """Values in float32 with a last column of 1, which sums up weights."""
    v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def _ids(x: jax.Array, info: SeqInfo) -> jax.Array:
    """The documents of a stretch of tokens [B, T, ...], 1 where all are of one."""
    return jnp.ones(x.shape[:2], jnp.int32) if info.segment_ids is None else info.segment_ids


def _entry(x: jax.Array, info: SeqInfo) -> tuple[jax.Array, jax.Array]:
    """The position of each row's first real token, [B, 1], and which tokens share its document."""
    ids = _ids(x, info)
    first = jnp.argmax(ids != 0, axis=1)[:, None]
    shares = (ids == jnp.take_along_axis(ids, first, axis=1)) & (ids != 0)
    return jnp.take_along_axis(info.positions, first, axis=1), shares


def _cut(x: jax.Array, size: int, mode: str = 'constant') -> jax.Array:
    """[B, T, ...] to [B, N, size, ...]."""
    pad = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad, mode=mode).reshape(x.shape[0], -1, size, *x.shape[2:])


def _two(x: jax.Array) -> jax.Array:
    """Each chunk [B, N, C, ...] behind the one before it, [B, N, 2 C, ...]."""
    before = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
    return jnp.concatenate([before, x], axis=2)
