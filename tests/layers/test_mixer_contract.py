"""Every mixer keeps the contract of `layers.mixers`, for every config of the table below.

A new mixer joins by a line in `CONFIGS`. One jitted function serves several properties, since
compiling is most of the time; rows are cut by padding, so that every cut has one shape. The
properties that take longest, and further configs, are of the tier `ci`, or of the tier `slow` where
a further config adds nothing to a property; without `--tier` all run.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from effjax.core.axes import metadata
from effjax.core.context import Context
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.core.registry import arguments, check_block, lookup, parameters
from effjax.core.trees import count, nbytes
from effjax.layers.mixers import MIXERS

CONFIGS = {
    'attention': [
        {'heads': 2},
        {
            'heads': 4,
            'kv_heads': 2,
            'head_dim': 4,
            'window': 3,
            'qk_norm': True,
            'soft_cap': 4.0,
            'bias': True,
        },
    ],
    'base_conv': [{'conv': 0, 'filter_width': 8}],
    'based': [{'heads': 2, 'key_dim': 3}],
    'bigbird': [{'heads': 2, 'block': 2, 'near': 1, 'random': 1}],
    'deltanet': [{'heads': 2, 'key_dim': 4, 'value_dim': 8, 'chunk': 5}],
    'etc': [{'heads': 2, 'radius': 2, 'clip': 1}],
    'gated_deltanet': [{'heads': 2, 'key_dim': 5, 'value_dim': 7, 'chunk': 4, 'negative': True}],
    'gla': [{'heads': 2, 'key_dim': 5, 'conv': 3}],
    'h3': [{'state': 6, 'chunk': 4}],
    'hyena': [{'filter_width': 8}],
    'linear_attention': [{'heads': 2, 'key_dim': 5}],
    'linformer': [{'heads': 2, 'rank': 4}],
    'longformer': [{'heads': 2, 'reach': 2, 'global_tokens': 1}],
    'longnet': [{'heads': 2, 'segments': (2, 6), 'dilations': (1, 2)}],
    'mamba': [{'expand': 2, 'state': 4, 'chunk': 4}],
    'mamba2': [{'head_dim': 6, 'state': 5, 'groups': 2}],
    'mate': [{'heads': 2, 'columns': 3}],
    'mega': [{'key_dim': 4, 'value_dim': 5, 'averages': 3, 'chunk': 4}],
    'nystromformer': [{'heads': 2, 'landmarks': 4, 'conv': 3}],
    'reformer': [{'heads': 2, 'chunk': 2, 'buckets': 4}],
    'polysketch': [{'heads': 2, 'sketch': 3, 'block': 4}],
    'retnet': [{'heads': 2}],
    'rg_lru': [{'heads': 2, 'chunk': 4}],
    'rwkv4': [{}],
    'rwkv6': [{'heads': 2, 'rank': 3, 'decay_rank': 4}],
    'rwkv7': [{'heads': 2, 'rank': 3, 'gate_rank': 4, 'chunk': 4}],
    's4': [{'state': 6, 'chunk': 4}],
    's4d': [{'state': 6, 'chunk': 4}],
    's5': [{'state': 8, 'blocks': 2, 'chunk': 4}],
    'shaped_attention': [{'heads': 2}],
    'transformer_xl': [{'heads': 2, 'segment': 3, 'memory': 4}],
}
# The same properties for more configs, in the tier `ci`.
MORE = {
    'attention': [{'heads': 3, 'kv_heads': 1, 'head_dim': 6, 'implementation': 'reference'}],
    'base_conv': [{'conv': 3, 'bias': True}],
    'based': [{'heads': 3, 'key_dim': 4, 'value_dim': 3, 'conv': 3}],
    'bigbird': [
        {'heads': 2, 'kv_heads': 1, 'block': 1, 'random': 2, 'implementation': 'reference'}
    ],
    'deltanet': [
        {'heads': 3, 'gate': True, 'conv': 0, 'implementation': 'reference'},
        {'heads': 2, 'chunk': 4},
    ],
    'etc': [{'heads': 3, 'radius': 0, 'bias': True}, {'heads': 2, 'implementation': 'reference'}],
    'gated_deltanet': [{'heads': 1, 'chunk': 1, 'conv': 0}, {'heads': 2, 'gate': False}],
    'gla': [{'heads': 3, 'implementation': 'reference', 'temperature': 0.5}],
    'h3': [
        {'head_dim': 2, 'state': 4, 'shift': 3, 'bias': True, 'implementation': 'reference'},
        {'state': 4, 'shift': 32},
    ],
    'hyena': [{'order': 3, 'conv': 2, 'bias': True, 'implementation': 'reference'}],
    'linear_attention': [{'heads': 3, 'implementation': 'reference', 'conv': 2}],
    'linformer': [
        {'heads': 3, 'rank': 5, 'share': 'none', 'bias': True},
        {'heads': 2, 'rank': 3, 'share': 'key_value', 'head_dim': 6},
    ],
    'longformer': [
        {'heads': 4, 'kv_heads': 2, 'head_dim': 4, 'reach': 4, 'dilation': 2, 'bias': True}
    ],
    'longnet': [{'heads': 2, 'segments': (3,), 'dilations': (1,), 'implementation': 'reference'}],
    'mamba': [{'state': 3, 'dt_rank': 2, 'norms': True, 'implementation': 'reference'}],
    'mamba2': [{'expand': 1, 'head_dim': 4, 'state': 3, 'implementation': 'reference'}],
    'mate': [{'heads': 4, 'kv_heads': 2, 'head_dim': 4, 'columns': 2, 'global_tokens': 1}],
    'mega': [{'key_dim': 2, 'averages': 2, 'weights': 'laplace', 'implementation': 'reference'}],
    'nystromformer': [
        {'heads': 3, 'landmarks': 3, 'iterations': 4, 'bias': True},
        {'heads': 1, 'landmarks': 20},
    ],
    'reformer': [
        {'heads': 3, 'chunk': 3, 'rounds': 1, 'bias': True},
        {'heads': 2, 'chunk': 2, 'buckets': 2, 'implementation': 'reference'},
    ],
    'retnet': [{'heads': 1, 'key_dim': 4, 'value_dim': 3, 'conv': 2}],
    'rg_lru': [{'heads': 1, 'inner': 5, 'conv': 2, 'implementation': 'reference'}],
    'rwkv4': [{'inner': 5, 'implementation': 'reference'}],
    'rwkv6': [{'heads': 1, 'rank': 2, 'implementation': 'reference'}],
    'rwkv7': [{'heads': 3, 'rank': 2, 'implementation': 'reference'}],
    's4': [{'state': 2, 'implementation': 'reference'}],
    's4d': [{'state': 4, 'start': 'legs', 'implementation': 'reference'}],
    's5': [{'implementation': 'reference'}],
    'shaped_attention': [{'heads': 2, 'values': True, 'qk_norm': True}],
    'transformer_xl': [
        {'heads': 3, 'segment': 4, 'head_dim': 5},
        {'heads': 1, 'segment': 2, 'memory': 0},
        {'heads': 2, 'segment': 1, 'memory': 3},
    ],
}
CASES = [
    pytest.param(kind, config, id=f'{kind}-{i}', marks=marks)
    for table, marks, start in ((CONFIGS, (), 0), (MORE, pytest.mark.ci, 10))
    for kind, configs in table.items()
    for i, config in enumerate(configs, start)
]
FAST = [(c.id, *c.values) for c in CASES if not c.marks]
# One mixer of each kind of state; the three longest properties of the others are of the tier `ci`.
MAIN = ('attention', 'retnet', 'mamba', 'hyena', 'gated_deltanet')


def rest_in_ci(cases):
    """Cases whose mixers are not of `MAIN` marked as of the tier ci."""
    return [
        c
        if c.values[0] in MAIN or c.marks
        else pytest.param(*c.values, id=c.id, marks=pytest.mark.ci)
        for c in cases
    ]


def _slow(cases, when):
    return [
        pytest.param(*c.values, id=c.id, marks=pytest.mark.slow) if c.marks and when(c) else c
        for c in cases
    ]


def once(cases):
    """Further configs by hand: they change sizes and options, which other properties prove."""
    return _slow(cases, lambda c: True)


def without_plain(cases):
    """Plain implementations by hand: their gradients are jax's own, nothing of them is ours."""
    return _slow(cases, lambda c: c.values[1].get('implementation') == 'reference')


def without_plain_sizes(cases):
    """Plain implementations by hand, except with another convolution, whose state is the mixer's.

    The kernels' tests hold them to the same, cut anywhere; the mixer around them is that of
    `CONFIGS`, in other sizes.
    """
    return _slow(
        cases,
        lambda c: c.values[1].get('implementation') == 'reference' and 'conv' not in c.values[1],
    )


def _part(kind):
    return lookup(MIXERS, kind, 'mixer')


# Mixers that sort tokens: a later token moves where in a sum the others stand, which rounds another
# way. Their plain implementation, in `MORE`, does not sort and has to be exact.
REORDERED = {'reformer': 1e-6}
# Slopes of 45 through keys scaled to norm 1 (delta rules), losses of terms that cancel (RWKV-6):
# where XLA orders a sum anew, even the token loop moves by 4e-4. In float64 all forms are equal.
WIDE = ('deltanet', 'gated_deltanet', 'rwkv6')
# Scores to the fourth power: elements of a gradient a thousandth of its largest, which float32
# rounds by a hundredth of themselves. Both sides in float64, to 1e-7.
CANCELLING = ('polysketch',)

# What a mixer says of itself decides which properties it must have; `test_says_what_it_cannot_do`
# checks that it refuses the rest.
STEPPING = [c for c in CASES if 'stepping' in _part(c.values[0]).supports]
WHOLE = [c for c in CASES if 'stepping' not in _part(c.values[0]).supports]
PACKING = [c for c in CASES if 'packing' in _part(c.values[0]).supports]
CAUSAL = [c for c in CASES if _part(c.values[0]).causal]
# Tiny programs run once or twice: compiling them well takes longer than running them badly.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

WIDTH, LENGTH = 12, 11  # a length that no block size divides
# Documents of 5, 1, 3 and 2 tokens, padding between and at the end of the second row.
SEGMENTS = np.array(
    [[1, 1, 1, 1, 1, 2, 3, 3, 3, 4, 4], [1, 1, 1, 0, 2, 2, 2, 2, 0, 0, 0]], np.int32
)
# float32 products of one value in another order; the inputs and outputs are of order 1.
TOLERANCE = {'atol': 2e-5, 'rtol': 2e-4}


def positions_of(segments):
    """Positions that restart with each document."""
    out = np.zeros_like(segments)
    for b, t in np.ndindex(segments.shape):
        if t and segments[b, t] == segments[b, t - 1]:
            out[b, t] = out[b, t - 1] + 1
    return out


def make_info(segments=None, batch=2, **kw):
    if segments is None:
        return SeqInfo.of(batch, LENGTH, **kw)
    segments = np.asarray(segments)
    return SeqInfo(jnp.asarray(positions_of(segments)), jnp.asarray(segments), **kw)


class Case:
    """One mixer with random parameters (also those that start at 0 or 1), and its functions."""

    def __init__(self, kind, config, *, compute='float32', causal=None, dtype=jnp.float32):
        block = {'kind': kind, **config}
        component = check_block(MIXERS, block, 'mixer', 'mixer')
        causal = component.causal if causal is None else causal
        self.packs = 'packing' in component.supports
        context = Context(
            width=WIDTH,
            policy=Policy(param=jnp.dtype(dtype).name, compute=compute),
            causal=causal,
            depth=2,
            max_len=LENGTH + 2,
            positions={'kind': 'rope', 'base': 100.0},
            init='lecun',
        )
        make = lambda: component(context, **arguments(block), rngs=nnx.Rngs(0))  # noqa: E731
        self.graphdef, _ = nnx.split(nnx.eval_shape(make))
        # One program; operation by operation, each would be compiled by itself.
        self.mixer = nnx.merge(self.graphdef, jit(lambda: nnx.state(make()))())
        draw = np.random.default_rng(1)
        self.params = jax.tree.map(
            lambda p: jnp.asarray(p + 0.1 * draw.normal(size=p.shape), dtype),
            jax.device_get(nnx.to_pure_dict(nnx.state(self.mixer))),
        )
        self.x = jnp.asarray(draw.normal(size=(2, LENGTH, WIDTH)), compute)

    def outputs(self, x, info):
        """Those of some rows, at the number of rows that `test_is_causal` compiles."""
        rows = np.arange(LENGTH) % len(x)
        x_and_info = jax.tree.map(lambda a: np.asarray(a)[rows], (x, info))
        return np.asarray(self.forward(self.params, *x_and_info))[: len(x)]

    def call(self, params, x, info, state=None, return_state=False):
        return nnx.merge(self.graphdef, params)(
            x, info=info, state=state, return_state=return_state
        )

    @functools.cached_property
    def forward(self):
        return jit(lambda params, x, info: self.call(params, x, info)[0])

    @functools.cached_property
    def chunk(self):
        """Continues from a state."""
        return jit(lambda params, x, info, state: self.call(params, x, info, state, True)[:2])

    def stepped(self, params, x, state, reset):
        """The token loop; x [B, T, D], reset [B, T]."""
        mixer = nnx.merge(self.graphdef, params)

        def one(state, at):
            y, state = mixer.step(at[0], state, reset=at[1])
            return state, y

        state, ys = jax.lax.scan(one, state, (x.swapaxes(0, 1), reset.T))
        return ys.swapaxes(0, 1), state

    def info(self, **kw):
        """Documents and padding, for mixers that keep them apart; else whole rows."""
        return make_info(SEGMENTS if self.packs else None, **kw)

    def empty(self, batch=2):
        return jax.jit(lambda: self.mixer.init_state(batch, LENGTH, self.x.dtype))()


@functools.cache
def _case(kind, key, **kw):
    return Case(kind, dict(key), **kw)


def case_of(kind, config, **kw):
    return _case(kind, tuple(config.items()), **kw)


def loss_of(y, segments=None):
    """A sum whose gradient differs in every element, padding left out."""
    weight = jnp.sin(1.0 + jnp.arange(y.shape[-1], dtype=jnp.float32))
    y = y.astype(weight.dtype) if y.dtype != jnp.float64 else y
    if segments is not None:
        y = jnp.where((segments != 0)[..., None], y, 0)
    return jnp.sum(jnp.sin(y) * weight)


def test_every_mixer_is_in_the_table():
    assert set(CONFIGS) == set(MIXERS)


@pytest.mark.parametrize(('kind', 'config'), rest_in_ci(without_plain_sizes(STEPPING)))
def test_states_continue_exactly(kind, config):
    """Stepped, and cut anywhere (document boundaries and padding included), equal the whole."""
    case = case_of(kind, config)
    info = make_info(SEGMENTS)
    real = (SEGMENTS != 0)[..., None]
    whole = np.where(real, case.outputs(case.x, info), 0)

    # Every cut at once: each becomes a row of the batch, both pieces padded to the full length.
    cuts = np.arange(LENGTH + 1)
    rows = np.arange(2).repeat(len(cuts))
    cut = np.tile(cuts, 2)
    place = np.arange(LENGTH)
    head = np.where(place < cut[:, None], SEGMENTS[rows], 0)
    shift = np.minimum(place + cut[:, None], LENGTH - 1)
    inside = place + cut[:, None] < LENGTH
    tail = np.where(inside, np.take_along_axis(SEGMENTS[rows], shift, 1), 0)
    positions = positions_of(SEGMENTS)[rows]
    x = np.asarray(case.x)[rows]
    x_tail = np.take_along_axis(x, shift[..., None], 1)
    first, state = case.chunk(
        case.params, x, SeqInfo(positions, jnp.asarray(head)), case.empty(len(rows))
    )
    tail_info = SeqInfo(np.take_along_axis(positions, shift, 1), jnp.asarray(tail))
    second, final = jax.device_get(case.chunk(case.params, x_tail, tail_info, state))
    back = np.maximum(place - cut[:, None], 0)[..., None]
    joined = np.where((place < cut[:, None])[..., None], first, np.take_along_axis(second, back, 1))
    chex.assert_trees_all_close(np.where(real[rows], joined, 0), whole[rows], **TOLERANCE)
    # However a row was cut, it ends in one state; it belongs to the last document.
    ends = jax.tree.map(lambda s: s[:: len(cuts)].repeat(len(cuts), 0), final)
    chex.assert_trees_all_close(final, ends, **TOLERANCE)

    # One token at a time, over the first row, which has no padding.
    x, reset = np.asarray(case.x)[:1], positions_of(SEGMENTS[:1]) == 0
    ys, stepped = jit(case.stepped)(case.params, x, case.empty(1), reset)
    chex.assert_trees_all_close(ys, whole[:1], **TOLERANCE)
    first_row = jax.tree.map(lambda s: s[:1], final)
    chex.assert_trees_all_close(stepped, first_row, **TOLERANCE)
    chex.assert_trees_all_equal_shapes_and_dtypes(stepped, first_row)


@pytest.mark.ci
@pytest.mark.parametrize(('kind', 'config'), once(STEPPING))
def test_state_of_a_call_without_one(kind, config):
    """`return_state` from scratch equals the same from an empty state, and steps go on from it."""
    case = case_of(kind, config)
    cut = 9
    positions = np.broadcast_to(np.arange(cut, dtype=np.int32), (2, cut))

    @jit
    def run(params, x):
        first, state, _ = case.call(params, x[:, :cut], SeqInfo(positions), None, True)
        mixer = nnx.merge(case.graphdef, params)
        ys = [first]
        for t in range(cut, LENGTH):
            y, state = mixer.step(x[:, t], state)
            ys.append(y[:, None])
        return case.call(params, x, make_info())[:2], jnp.concatenate(ys, axis=1)

    (whole, none), pieces = run(case.params, case.x)
    assert none is None
    chex.assert_trees_all_close(pieces, whole, **TOLERANCE)


@pytest.mark.parametrize(('kind', 'config'), rest_in_ci(CAUSAL))
def test_is_causal(kind, config):
    """A change of token t moves no output before t, and does move output t."""
    case = case_of(kind, config)
    x = np.broadcast_to(np.asarray(case.x)[:1], (LENGTH, LENGTH, WIDTH))
    moved = x + np.float32(0.5) * np.eye(LENGTH, dtype=np.float32)[..., None]
    info = make_info(np.ones((LENGTH, LENGTH), np.int32) if case.packs else None, LENGTH)
    before = np.asarray(case.forward(case.params, x, info))
    after = np.asarray(case.forward(case.params, moved, info))
    change = np.abs(after - before).max(-1)
    limit = 0 if config.get('implementation') == 'reference' else REORDERED.get(kind, 0)
    future = change[np.triu_indices(LENGTH, 1)[::-1]]
    assert np.all(future <= limit), 'an output saw the future'
    assert np.all(np.diag(change) > 0)


@pytest.mark.parametrize(('kind', 'config'), rest_in_ci(without_plain_sizes(PACKING)))
def test_packed_equals_separate_documents(kind, config):
    """Outputs and gradients; padding is never read and its output is 0 or unread."""
    case = case_of(kind, config)
    info = make_info(SEGMENTS)
    places = [np.nonzero(SEGMENTS[b] == s) for b in (0, 1) for s in range(1, SEGMENTS[b].max() + 1)]
    rows = [b for b in (0, 1) for _ in range(1, SEGMENTS[b].max() + 1)]
    alone = np.zeros((len(rows), LENGTH), np.int32)
    x = np.zeros((len(rows), LENGTH, WIDTH), np.float32)
    for i, (b, (at,)) in enumerate(zip(rows, places, strict=True)):
        alone[i, : len(at)] = 1
        x[i, : len(at)] = np.asarray(case.x)[b, at]

    @jit
    def both(params, x, info):
        def f(params, x):
            y = case.call(params, x, info)[0]
            return loss_of(y, info.segment_ids), y

        return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, x)

    # As many times the two rows as give the number of documents: one shape, compiled once.
    times = len(rows) // 2
    assert len(rows) == 2 * times
    tiled = lambda a: np.tile(a, (times,) + (1,) * (a.ndim - 1))  # noqa: E731
    info = jax.tree.map(tiled, info)
    # Results go to numpy at once: an index into a jax array is a program to compile.
    (_, packed), (packed_grad, packed_dx) = jax.device_get(both(case.params, tiled(case.x), info))
    packed_grad = jax.tree.map(lambda g: g / times, packed_grad)
    (_, separate), (separate_grad, separate_dx) = jax.device_get(
        both(case.params, x, make_info(alone))
    )
    for i, (b, (at,)) in enumerate(zip(rows, places, strict=True)):
        chex.assert_trees_all_close(packed[b, at], separate[i, : len(at)], **TOLERANCE)
        chex.assert_trees_all_close(packed_dx[b, at], separate_dx[i, : len(at)], **TOLERANCE)
    chex.assert_trees_all_close(packed_grad, separate_grad, atol=1e-4, rtol=1e-3)
    padding = tiled(SEGMENTS) == 0
    assert not np.any(packed_dx[padding]), 'padding was read'
    chex.assert_tree_all_finite(packed_grad)

    # What stands in the padding does not matter, however large.
    noisy = np.where(padding[..., None], np.float32(1e4), tiled(case.x))
    (_, again), _ = jax.device_get(both(case.params, noisy, info))
    chex.assert_trees_all_equal(again[~padding], packed[~padding])


@pytest.mark.ci
@pytest.mark.parametrize(('kind', 'config'), without_plain(STEPPING))
def test_gradients_against_a_float64_token_loop(kind, config):
    case = case_of(kind, config)

    def parallel(case, params, x):
        return loss_of(case.call(params, x, make_info())[0])

    gradients = jax.grad(parallel, argnums=(1, 2))
    grads = jit(functools.partial(gradients, case))(case.params, case.x)
    with jax.enable_x64(True):
        wide = Case(kind, config, compute='float64', dtype=jnp.float64)
        params, x = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), jnp.float64), (case.params, case.x)
        )
        reset = jnp.zeros((2, LENGTH), bool)

        def token_loop(params, x):
            return loss_of(wide.stepped(params, x, wide.empty(), reset)[0])

        expected = jit(jax.grad(token_loop, argnums=(0, 1)))(params, x)
        assert all(g.dtype == jnp.float64 for g in jax.tree.leaves(expected))
        if kind in CANCELLING:
            grads = jit(functools.partial(gradients, wide))(params, x)
            chex.assert_trees_all_close(grads, expected, atol=1e-9, rtol=1e-7)
            return
        expected = jax.tree.map(np.asarray, expected)
    # float32 against float64: sums of a few hundred terms of order 1.
    chex.assert_trees_all_close(grads, jax.tree.map(np.float32, expected), atol=2e-5, rtol=2e-3)


@pytest.mark.ci
@pytest.mark.parametrize(('kind', 'config'), without_plain(WHOLE))
def test_gradients_against_float64(kind, config):
    """Mixers without steps: against the plain implementation where there is one."""
    case = case_of(kind, config)

    def loss(case, params, x):
        return loss_of(case.call(params, x, case.info())[0], case.info().segment_ids)

    grads = jit(jax.grad(functools.partial(loss, case), argnums=(0, 1)))(case.params, case.x)
    if 'implementation' in parameters(_part(kind)):
        config = {**config, 'implementation': 'reference'}
    with jax.enable_x64(True):
        wide = Case(kind, config, compute='float64', dtype=jnp.float64)
        params, x = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), jnp.float64), (case.params, case.x)
        )
        expected = jit(jax.grad(functools.partial(loss, wide), argnums=(0, 1)))(params, x)
        assert all(g.dtype == jnp.float64 for g in jax.tree.leaves(expected))
        expected = jax.tree.map(np.asarray, expected)
    chex.assert_trees_all_close(grads, jax.tree.map(np.float32, expected), atol=2e-5, rtol=2e-3)


@pytest.mark.ci
@pytest.mark.parametrize(('kind', 'config'), once(CASES))
def test_extreme_inputs_stay_finite(kind, config):
    case = case_of(kind, config, compute='bfloat16')

    def f(params, x):
        y = case.call(params, x, case.info())[0]
        return loss_of(y, SEGMENTS).astype(jnp.float32), y

    run = jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))
    for scale in (0.0, 1e4):
        (_, y), grads = run(case.params, case.x * scale)
        chex.assert_tree_all_finite((y, grads))
        assert y.dtype == jnp.bfloat16
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads[0]))


@pytest.mark.ci
@pytest.mark.parametrize(('kind', 'config'), once(CASES))
def test_vmap_remat_and_scan_agree(kind, config):
    """A seed axis by vmap, a stack of layers by scan, and rematerialisation change nothing."""
    if kind in WIDE:
        with jax.enable_x64(True):
            _forms_agree(Case(kind, config, compute='float64', dtype=jnp.float64))
        return
    _forms_agree(case_of(kind, config))


def _forms_agree(case):
    info = case.info()
    two = jax.tree.map(lambda p: jnp.stack([p, 0.9 * p]), case.params)
    second = jax.tree.map(lambda p: 0.9 * p, case.params)

    def layer(x, params):
        return case.call(params, x, info)[0]

    def scanned(two, x, remat):
        body = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(lambda x, p: (body(x, p), None), x, two)[0]

    @jit
    def everything(two, x):
        def both(remat):
            def f(w):
                y = scanned(w, x, remat)
                return loss_of(y, SEGMENTS), y

            return jax.value_and_grad(f, has_aux=True)(two)

        return both(False), both(True), jax.vmap(layer, (None, 0))(x, two)

    ((value, stacked), grads), ((remat_value, _), remat_grads), mapped = everything(two, case.x)
    chex.assert_trees_all_close((value, grads), (remat_value, remat_grads), atol=1e-5, rtol=1e-4)
    first = case.forward(case.params, case.x, info)
    other = case.forward(second, case.x, info)
    chex.assert_trees_all_close(mapped, jnp.stack([first, other]), **TOLERANCE)
    chex.assert_trees_all_close(stacked, case.forward(second, first, info), **TOLERANCE)


class Jitted(chex.TestCase):
    """What both of these do, through chex's variants."""

    def agree(self, kind, config):
        case = case_of(kind, config)
        info = case.info()
        f = self.variant(lambda params, x: case.call(params, x, info)[0])
        expected = case.forward(case.params, case.x, info)
        chex.assert_trees_all_close(f(case.params, case.x), expected, **TOLERANCE)


@pytest.mark.ci
class Variants(Jitted):
    """With and without jit: one operation at a time, each is compiled by itself."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(*[case for case in FAST if case[1] in MAIN])
    def test_jit_changes_nothing(self, kind, config):
        self.agree(kind, config)


@pytest.mark.slow
class OtherVariants(Jitted):
    """The same for the mixers that are not of `MAIN`."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(*[case for case in FAST if case[1] not in MAIN])
    def test_jit_changes_nothing(self, kind, config):
        self.agree(kind, config)


@pytest.mark.parametrize(('kind', 'config'), CASES)
def test_costs_count_the_real_thing(kind, config):
    case = case_of(kind, config)
    cost = case.mixer.cost(3, LENGTH)
    assert cost.params == count(case.params)
    assert cost.params_used <= cost.params
    assert cost.model_flops > 0 and cost.activation_bytes > 0
    # Twice the rows cost twice as much; the cost does not look at arrays, which may be stacked.
    assert case.mixer.cost(6, LENGTH).model_flops == 2 * cost.model_flops
    if 'stepping' not in case.mixer.supports:
        assert cost.state_bytes == case.mixer.state_bytes(3, LENGTH, jnp.float32) == 0
        return
    for batch, max_len, dtype in ((1, 2, jnp.float32), (3, LENGTH, jnp.bfloat16)):
        state = jax.eval_shape(functools.partial(case.mixer.init_state, batch, max_len, dtype))
        assert case.mixer.state_bytes(batch, max_len, dtype) == nbytes(state)
    assert cost.state_bytes == nbytes(
        jax.eval_shape(functools.partial(case.mixer.init_state, 3, LENGTH, case.x.dtype))
    )


# Mixers whose published claim is a decoding state that no length makes larger.
CONSTANT = (
    'based', 'deltanet', 'gated_deltanet', 'gla', 'linear_attention', 'mamba', 'mamba2',
    'polysketch', 'retnet', 'rg_lru', 'rwkv4', 'rwkv6', 'rwkv7', 's4', 's4d', 's5',
)  # fmt: skip


@pytest.mark.parametrize('kind', CONSTANT)
def test_state_does_not_grow_with_the_length(kind):
    """Neither what is counted nor the arrays; attention's cache does."""
    mixer = case_of(kind, CONFIGS[kind][0]).mixer
    for length in (1, 64, 65536):
        state = jax.eval_shape(lambda n=length: mixer.init_state(2, n, jnp.bfloat16))
        assert mixer.state_bytes(2, length, jnp.bfloat16) == nbytes(state)
        assert nbytes(state) == mixer.state_bytes(2, 8, jnp.bfloat16)
    cache = case_of('attention', CONFIGS['attention'][0]).mixer
    assert cache.kv_bytes(2, 65536, jnp.bfloat16) == 1024 * cache.kv_bytes(2, 64, jnp.bfloat16)


@pytest.mark.parametrize(('kind', 'config'), CASES)
def test_says_what_it_cannot_do(kind, config):
    case = case_of(kind, config)
    assert isinstance(case.mixer.causal, bool) and isinstance(case.mixer.supports, frozenset)
    if 'context' not in case.mixer.supports:
        with pytest.raises(ValueError, match=f'{kind} .*no context; use '):
            case.mixer(case.x, info=make_info(), context=case.x)
    if not case.packs:
        with pytest.raises(ValueError, match=f'{kind}.*documents.*(use|set|give) '):
            case.mixer(case.x, info=make_info(SEGMENTS))
    if not _part(kind).causal:
        with pytest.raises(ValueError, match=f'{kind}.*causal.*use '):
            case_of(kind, config, causal=True)
    elif 'stepping' not in case.mixer.supports:
        _has_no_state(case, f'{kind}.*use ')
    if 'bidirectional' not in case.mixer.supports:
        with pytest.raises(ValueError, match=f'{kind} .*both directions; use '):
            case_of(kind, config, causal=False)
        return
    both = case_of(kind, config, causal=False)
    _has_no_state(both, f'{kind} .*both directions.*; use ')
    if not both.packs or getattr(both.mixer, 'directed', False):
        return
    info = make_info(SEGMENTS)
    y = both.forward(both.params, both.x, info)
    # The order of a document's tokens is known by positions only: reversing both reverses y.
    last = SEGMENTS.max() + 1  # documents are numbered upwards in the turned row too
    turned = jnp.asarray(np.where(SEGMENTS, last - SEGMENTS, 0)[:, ::-1])
    turned = SeqInfo(info.positions[:, ::-1], turned)
    moved = both.forward(both.params, both.x[:, ::-1], turned)
    real = (SEGMENTS != 0)[..., None]
    chex.assert_trees_all_close(
        np.where(real, moved[:, ::-1], 0), np.where(real, y, 0), **TOLERANCE
    )


@pytest.mark.parametrize(('kind', 'config'), once(STEPPING))
def test_refuses_the_state_of_another_config(kind, config):
    """Of other sizes, with an array too many, or without one: at once, not at a product inside."""
    case = case_of(kind, config)
    state = case.empty()
    name = max(state, key=lambda name: state[name].ndim)
    wider = jnp.pad(state[name], [(0, 0)] * (state[name].ndim - 1) + [(0, 1)])
    without = {key: value for key, value in state.items() if key != name}
    step, x = case.x[:, 0], case.x
    for wrong in ({**state, name: wider}, {**state, 'more': wider}, without, {}):
        with pytest.raises(
            ValueError, match=f'^{kind} got the state of another config: .*init_state'
        ):
            case.mixer.step(step, wrong)
        with pytest.raises(
            ValueError, match=f'^{kind} got the state of another config: .*init_state'
        ):
            case.mixer(x, info=make_info(), state=wrong)


SIZES = ('chunk', 'block', 'segment', 'window', 'reach', 'columns', 'rank', 'landmarks', 'order')


@pytest.mark.parametrize('kind', MIXERS)
def test_refuses_sizes_that_do_not_fit(kind):
    """A chunk, block, segment or window of less than no tokens; heads that do not divide."""
    config, known = CONFIGS[kind][0], parameters(_part(kind))
    for name in sorted(set(known) & set(SIZES)):
        with pytest.raises(ValueError, match=f'^{kind}: .*{name}'):
            Case(kind, {**config, name: -1})
    if 'heads' in known:
        with pytest.raises(ValueError, match=f'^{kind}: .*heads 10 do not divide'):
            Case(kind, {**{k: v for k, v in config.items() if 'dim' not in k}, 'heads': 10})


def _has_no_state(case, message):
    for call in (
        lambda: case.mixer.init_state(2, 4, jnp.float32),
        lambda: case.mixer.step(case.x[:, 0], {}),
        lambda: case.mixer(case.x, info=make_info(), return_state=True),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.mesh
@pytest.mark.parametrize(('kind', 'config'), [c for c in CASES if not c.marks])
def test_sharded_equals_unsharded(kind, config):
    """Rows over 'data' and heads over 'tensor': the same outputs and gradients."""
    case = case_of(kind, config)
    mesh = jax.make_mesh(
        (2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    meta = metadata(nnx.state(case.mixer, nnx.Param))

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def shard(p, m):
        over = ('heads', 'kv_heads', 'expert', 'mlp')
        pairs = zip(m.axes, p.shape, strict=True)
        return put(p, *('tensor' if a in over and n % 2 == 0 else None for a, n in pairs))

    def loss(params, x, info):
        return loss_of(case.call(params, x, info)[0], info.segment_ids)

    run = jit(jax.value_and_grad(loss, argnums=(0, 1)))
    info = case.info()
    expected = run(case.params, case.x, info)
    rows = jax.tree.map(lambda a: put(a, 'data'), (case.x, info))
    sharded = run(jax.tree.map(shard, case.params, meta), *rows)
    chex.assert_trees_all_close(sharded, expected, atol=1e-4, rtol=1e-3)
