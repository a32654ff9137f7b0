"""The body of a model: a list of segments, each a period of blocks repeated.

    segments = (
        dict(pattern=(dict(mixer=..., ffn=..., block='sequential'),), repeat=2),
        dict(pattern=(local, local, full), repeat=8, share=2),
    )

Parameters have one layout whatever way the body runs: `segment_0/slot_1/...`, slot being the place
in the period, with a leading `layers` axis of length repeat / share. Scanned and unrolled bodies
are one `lax.scan`, whose `unroll` differs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.context import Context
from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import save_attention
from effjax.models import blocks, reversible
from effjax.models.plan import SegmentSpec
from effjax.models.setup import Execution

Tree = Any


def remat_policy(name: str) -> Callable[..., Any] | None:
    """Returns the `jax.checkpoint` policy of a remat mode, None where nothing is saved.

    'dots' saves results of products without batch dimensions, which are those with weights, and
    what attention's backward pass needs; elementwise results and norms are recomputed.
    """
    if name == 'dots':
        return jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable, save_attention
        )
    return None


def stack(make: Callable[[nnx.Rngs], nnx.Module], copies: int, key: jax.Array) -> nnx.Module:
    """Returns one module whose variables hold `copies` initialisations along a `layers` axis.

    Args:
      make: builds one copy.
      copies: how many.
      key: each copy gets a key split from it, however the copies are run later.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(copy_key: jax.Array) -> Tree:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(copy_key))))

    module = nnx.merge(graphdef, jax.vmap(init)(jax.random.split(key, copies)))
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(axes=('layers', *variable.get_metadata()['axes']))
    return module


class Segment(nnx.Module):
    """A period of blocks, repeated.

    Args:
      ctx: facts shared with the parts.
      execution: how it runs.
      specs: the period's blocks.
      repeat: how many times the period runs.
      share: how many consecutive repeats use one copy of the parameters; all of them is ALBERT's
        sharing (arXiv 1909.11942).
      offset: index of the segment's first block in the body, for keys.

    Raises:
      ConfigError: reversible blocks among others, or with rematerialisation.
    """

    def __init__(
        self,
        ctx: Context,
        execution: Execution,
        specs: Sequence[blocks.BlockSpec],
        repeat: int,
        share: int,
        offset: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.repeat = repeat
        self.share = share
        self.offset = offset
        self.period = len(specs)
        self.unrolled = execution.unrolls(repeat * len(specs))
        self.remat = execution.remat
        self.reversible = _reversible(specs, execution.remat)
        for i, spec in enumerate(specs):

            def make(r: nnx.Rngs, spec: blocks.BlockSpec = spec) -> nnx.Module:
                return blocks.build(ctx, spec, rngs=r)

            key = branch(rngs, f'slot_{i}').params()
            setattr(self, f'slot_{i}', stack(make, repeat // share, key))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the slots, in the order they run."""
        return tuple(f'slot_{i}' for i in range(self.period))

    def slot(self, name: str) -> blocks.Block:
        """Returns a slot: one block whose parameters are stacked."""
        return getattr(self, name)

    def __call__(
        self, x_BTD: jax.Array, info: SeqInfo, state: Tree = None, return_state: bool = False
    ) -> tuple[jax.Array, Tree, Tree]:
        """Returns (y [B, T, D], states by slot or None, aux by slot), both stacked over repeats."""

        def apply(block: blocks.Block, x: jax.Array, block_state: Tree, layer: jax.Array):
            x, new, aux = block(
                x, info=info.fold(layer), state=block_state, return_state=return_state
            )
            return x, (new, aux)

        if self.reversible and state is None and not return_state:
            x, out = self._run_reversible(x_BTD, info)
            return x, None, out
        x, out = self._run(apply, x_BTD, state, self.remat)
        states = {name: out[name][0] for name in self.names} if return_state else None
        return x, states, {name: out[name][1] for name in self.names}

    def step(self, x_BD: jax.Array, state: Tree, reset: jax.Array | None) -> tuple[jax.Array, Tree]:
        """Advances by one token; see the mixer contract."""

        def apply(block: blocks.Block, x: jax.Array, block_state: Tree, layer: jax.Array):
            del layer
            return block.step(x, block_state, reset=reset)

        if isinstance(state, list):
            return self._run_by_layer(apply, x_BD, state)
        return self._run(apply, x_BD, state, 'none')

    def by_layer(self, state: Tree) -> list[Tree]:
        """Returns a decoding state with its repeats apart, for many calls of `step`.

        A cache of its own is written in place; one that is stacked over repeats is copied whole,
        several times, to write a token.
        """
        return _apart(state, self.repeat)

    def init_state(self, batch: int, max_len: int, dtype: Any) -> Tree:
        """Returns the decoding state by slot, stacked over repeats."""

        def stacked(name: str) -> Tree:
            one = self.slot(name).init_state(batch, max_len, dtype)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.repeat, *a.shape)), one)

        return {name: stacked(name) for name in self.names}

    def cost(self, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the cost by part of all repeats."""
        out: dict[str, Cost] = {}
        for name in self.names:
            for part, cost in self.slot(name).cost(batch, seq_len).items():
                all_repeats = dataclasses.replace(
                    cost.times(self.repeat), params=cost.params * (self.repeat // self.share)
                )
                out[part] = out.get(part, Cost()) + all_repeats
        return self._kept(out, batch * seq_len) if self.reversible else out

    def _kept(self, costs: dict[str, Cost], tokens: int) -> dict[str, Cost]:
        """Costs of reversible blocks, which keep nothing but the two streams at their end."""
        block = self.slot(self.names[0])
        streams = 2.0 * tokens * block.width * max(4, block.itemsize)
        kept = dict.fromkeys(costs, 0.0) | {'norm': streams}
        return {
            part: dataclasses.replace(cost, activation_bytes=kept[part])
            for part, cost in costs.items()
        }

    def _run(self, apply: Callable[..., Any], x: jax.Array, state: Tree, remat: str):
        """Runs `apply(block, x, state, layer) -> (x, out)` over slots and repeats."""
        graphdefs, params = self._split()
        if not self.reversible:
            return self._run_with(apply, graphdefs, params, x, state, remat)
        streams = reversible.opened(x)
        streams, out = self._run_with(apply, graphdefs, params, streams, state, 'none')
        return reversible.closed(streams, x.dtype), out

    def _run_reversible(self, x: jax.Array, info: SeqInfo) -> tuple[jax.Array, Tree]:
        """The whole segment with the gradient rule of `models.reversible`; returns (y, aux)."""
        graphdefs, params = self._split()

        def forward(params: Tree, streams: Any, info: SeqInfo) -> tuple[Any, Tree]:
            def apply(block: blocks.Block, x: Any, state: Tree, layer: jax.Array):
                del state
                x, _, aux = block(x, info=info.fold(layer))
                return x, aux

            return self._run_with(apply, graphdefs, params, streams, None, 'none')

        copies = self.repeat // self.share
        layout = reversible.Layout(graphdefs, self._layer, copies, self.share, self.unrolled)
        streams, aux = reversible.run(forward, layout, params, reversible.opened(x), info)
        return reversible.closed(streams, x.dtype), aux

    def _split(self) -> tuple[Tree, Tree]:
        """Returns (structures, arrays), both by slot."""
        split = {name: nnx.split(self.slot(name)) for name in self.names}
        graphdefs = {name: graphdef for name, (graphdef, _) in split.items()}
        return graphdefs, {name: nnx.to_pure_dict(arrays) for name, (_, arrays) in split.items()}

    def _layer(self, repeat: jax.Array, place: int) -> jax.Array:
        """Index in the body of a block of the period, which keys are folded by."""
        return self.offset + repeat * self.period + place

    def _run_with(
        self,
        apply: Callable[..., Any],
        graphdefs: Tree,
        params: Tree,
        x: Any,
        state: Tree,
        remat: str,
    ):
        period = self._period(apply, graphdefs)
        if remat != 'none':
            # Inside a loop nothing can be merged across the barrier; unrolled code needs it.
            period = jax.checkpoint(period, policy=remat_policy(remat), prevent_cse=self.unrolled)
        if state is None:
            state = dict.fromkeys(self.names)
        return self._scan(period, x, params, state)

    def _period(self, apply: Callable[..., Any], graphdefs: Tree) -> Callable[..., Any]:
        """Returns `period(x, weights, states, repeat) -> (x, outs)`, one repeat's blocks."""

        def period(x: Any, weights: Tree, states: Tree, repeat: jax.Array):
            out = {}
            for i, name in enumerate(graphdefs):
                block = nnx.merge(graphdefs[name], weights[name])
                x, out[name] = apply(block, x, states[name], self._layer(repeat, i))
            return x, out

        return period

    def _run_by_layer(self, apply: Callable[..., Any], x: jax.Array, states: list[Tree]):
        """Runs unrolled over states that are apart; returns (y, new states, apart too)."""
        graphdefs, params = self._split()
        weights = _apart(params, self.repeat // self.share)
        period, new = self._period(apply, graphdefs), []
        streams: Any = reversible.opened(x) if self.reversible else x
        for repeat, state in enumerate(states):
            own = weights[repeat // self.share]
            streams, out = period(streams, own, state, jnp.int32(repeat))
            new.append(out)
        return (reversible.closed(streams, x.dtype) if self.reversible else streams), new

    def _scan(self, period: Callable[..., Any], x: Any, params: Tree, state: Tree):
        """Scans over copies of the parameters and, within each, over the repeats sharing it."""
        copies, share = self.repeat // self.share, self.share
        index = jnp.arange(self.repeat, dtype=jnp.int32)
        unroll = self.unrolled

        def over_copies(x, inputs):
            weights, states, repeat = inputs
            if share == 1:
                return period(x, weights, states, repeat)

            def over_shared(x, inner):
                return period(x, weights, *inner)

            return jax.lax.scan(over_shared, x, (states, repeat), unroll=share if unroll else 1)

        if share > 1:
            state, index = jax.tree.map(
                lambda a: a.reshape(copies, share, *a.shape[1:]), (state, index)
            )
        x, out = jax.lax.scan(
            over_copies, x, (params, state, index), unroll=copies if unroll else 1
        )
        if share > 1:
            out = jax.tree.map(lambda a: a.reshape(self.repeat, *a.shape[2:]), out)
        return x, out


class Body(nnx.Module):
    """Segments run one after another.

    Args:
      ctx: facts shared with the parts.
      execution: how each segment runs.
      plan: the segments, as `models.plan.plan_segments` returns them.
    """

    def __init__(
        self,
        ctx: Context,
        execution: Execution,
        plan: Sequence[SegmentSpec],
        *,
        rngs: nnx.Rngs,
    ):
        self.segments = len(plan)
        offset = 0
        for i, spec in enumerate(plan):
            name = f'segment_{i}'
            args = (spec.pattern, spec.repeat, spec.share, offset)
            setattr(self, name, Segment(ctx, execution, *args, rngs=branch(rngs, name)))
            offset += spec.depth

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the segments, in the order they run."""
        return tuple(f'segment_{i}' for i in range(self.segments))

    def segment(self, name: str) -> Segment:
        """Returns a segment."""
        return getattr(self, name)

    def __call__(
        self, x_BTD: jax.Array, info: SeqInfo, state: Tree = None, return_state: bool = False
    ) -> tuple[jax.Array, Tree, Tree]:
        """Returns (y [B, T, D], state or None, aux), both by segment and slot."""
        states, auxes = {}, {}
        for name in self.names:
            given = None if state is None else state[name]
            with jax.named_scope(name):
                x_BTD, states[name], auxes[name] = self.segment(name)(
                    x_BTD, info, given, return_state
                )
        return x_BTD, states if return_state else None, auxes

    def step(
        self, x_BD: jax.Array, state: Tree, reset: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """Advances every block by one token."""
        new = {}
        for name in self.names:
            with jax.named_scope(name):
                x_BD, new[name] = self.segment(name).step(x_BD, state[name], reset)
        return x_BD, new

    def by_layer(self, state: Tree) -> Tree:
        """Returns a decoding state with all layers apart; see `Segment.by_layer`."""
        return {name: self.segment(name).by_layer(state[name]) for name in self.names}

    def init_state(self, batch: int, max_len: int, dtype: Any) -> Tree:
        """Returns the decoding state by segment and slot."""
        return {n: self.segment(n).init_state(batch, max_len, dtype) for n in self.names}

    def cost(self, batch: int, seq_len: int) -> dict[str, Cost]:
        """Returns the cost by part."""
        out: dict[str, Cost] = {}
        for name in self.names:
            for part, cost in self.segment(name).cost(batch, seq_len).items():
                out[part] = out.get(part, Cost()) + cost
        return out

    def describe(self) -> tuple[dict[str, Any], ...]:
        """Returns how each segment runs: its period, repeats, sharing, scan or unroll, remat."""
        segments = ((name, self.segment(name)) for name in self.names)
        return tuple(
            {
                'segment': name,
                'period': [s.slot(slot).label for slot in s.names],
                'repeat': s.repeat,
                'share': s.share,
                'layers': 'unroll' if s.unrolled else 'scan',
                'remat': 'reversible' if s.reversible else s.remat,
            }
            for name, s in segments
        )


def _reversible(specs: Sequence[blocks.BlockSpec], remat: str) -> bool:
    """Says whether a period's blocks are reversible; all of them are, or none."""
    kinds = {spec.block for spec in specs}
    if 'reversible' not in kinds:
        return False
    if len(kinds) > 1:
        others = ', '.join(sorted(kinds - {'reversible'}))
        raise ConfigError(
            f"{specs[0].path}.block: 'reversible' blocks carry two streams, and {others} ones do "
            'not; put them in a segment of their own.'
        )
    if remat != 'none':
        raise ConfigError(
            f"config.execution.remat: '{remat}' saves inputs of blocks, which 'reversible' blocks "
            "make again from their outputs; leave remat at 'none', or use block 'sequential'."
        )
    return True


def metrics(aux: Mapping[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns the blocks' (sum, weight) pairs as one flat dict, summed over repeats.

    Args:
      aux: what `Body.__call__` returned: segment -> slot -> part -> name -> (sum, weight), each
        with a leading `layers` axis.
    """
    out = {}
    for segment, slots in aux.items():
        for slot, parts in slots.items():
            for part, values in parts.items():
                for name, (total, weight) in values.items():
                    key = f'{segment}/{slot}/{part}/{name}'
                    out[key] = (jnp.sum(total, 0), jnp.sum(weight, 0))
    return out


def _apart(tree: Tree, count: int) -> list[Tree]:
    """Returns the `count` slices of a tree along its leaves' first axis."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i] for part in parts]) for i in range(count)]
