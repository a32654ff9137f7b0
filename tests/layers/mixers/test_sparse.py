"""Longformer, BigBird, MATE, LongNet: against transformers, and what mixers add to masks."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.core.trees import nbytes
from effjax.costs import walk
from effjax.kernels import MaskSpec, attention, last_choice
from effjax.layers.mixers.attention import Attention
from effjax.layers.mixers.bigbird import BigBird
from effjax.layers.mixers.longformer import Longformer
from effjax.layers.mixers.longnet import LongNet
from effjax.layers.mixers.mate import Mate

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'sparse_attention.npz'


def make(kind, causal=False, **kw):
    ctx = Context(width=12, policy=Policy(), causal=causal, max_len=64, init='lecun')
    return kind(ctx, **{'heads': 2, **kw}, rngs=nnx.Rngs(0))


def golden(name):
    with np.load(GOLDEN) as file:
        return {k.removeprefix(name + '/'): v for k, v in file.items() if k.startswith(name)}


def test_longformer_against_transformers():
    """Two global tokens with projections of their own, half a window of 4 on either side."""
    arrays = golden('longformer')
    mixer = make(Longformer, reach=5, global_tokens=2, bias=True)
    for path, leaf in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
        name = 'params/' + '/'.join(map(str, path))
        if path[0] != 'out':
            assert leaf[...].shape == arrays[name].shape, name
            leaf[...] = jnp.asarray(arrays[name])
    nnx.update(mixer, nnx.state(mixer, nnx.Param))
    mixer.out.kernel[...] = jnp.eye(12).reshape(2, 6, 12)
    state = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    assert {'params/' + '/'.join(map(str, p)) for p, _ in state if p[0] != 'out'} == {
        name for name in arrays if name.startswith('params')
    }
    x = jnp.asarray(arrays['x'])
    np.testing.assert_allclose(mixer(x, info=SeqInfo.of(2, 40))[0], arrays['y'], atol=2e-6)


def test_bigbird_against_transformers():
    """Its random blocks are put into the mask; near and global blocks follow from ours."""
    arrays = golden('bigbird')
    q, k, v = (jnp.asarray(arrays[name]) for name in 'qkv')
    masks = [
        MaskSpec(
            False, 2, block=4, global_tokens=4, last_tokens=4, random=2,
            table=((), *(tuple(map(int, row)) for row in blocks), ()),
        )
        for blocks in arrays['blocks']
    ]  # fmt: skip
    got = attention(q, k, v, mask=masks, implementation='xla')
    assert len(set(masks)) == 2
    # float32; transformers adds -10000 where nothing may be seen
    np.testing.assert_allclose(got, arrays['y'], atol=2e-6)


@pytest.mark.parametrize('causal', [True, False])
def test_long_rows_are_gathered(causal):
    ctx = Context(width=12, policy=Policy(), causal=causal, max_len=512)
    x = jax.ShapeDtypeStruct((1, 512, 12), jnp.float32)
    for kind, sizes in (
        (Longformer, {'reach': 32}),
        (BigBird, {'block': 16, 'random': 1}),
        (Mate, {'columns': 16}),
        (LongNet, {'segments': (32, 256), 'dilations': (1, 8)}),
    ):
        mixer = kind(ctx, heads=2, **sizes, rngs=nnx.Rngs(0))
        jax.eval_shape(lambda x: mixer(x, info=SeqInfo.of(1, 512))[0], x)  # noqa: B023
        seen = last_choice('attention')
        assert seen['mask'] == ('full' if kind is Longformer and not causal else 'sparse')
        # A pair of tokens that may not attend costs nothing.
        assert mixer._scored(512) < 512 * 513 / (2 if causal else 1) / 2


def test_random_blocks_differ_by_head_and_seed():
    first, second = make(BigBird, block=4).mask()
    assert first != second
    same, again = make(BigBird, block=4, kv_heads=1).mask()
    assert same == again
    assert make(BigBird, block=4, seed=1).mask()[0] != first
    # The seed fixes them: another model of that seed draws the same blocks, and no rng is read.
    assert make(BigBird, block=4).mask() == (first, second)
    np.testing.assert_array_equal(make(BigBird, block=4).mask()[0].dense(40), first.dense(40))


@pytest.mark.parametrize('causal', [True, False])
def test_longformer_that_reaches_over_the_row_is_attention(causal):
    wide, plain = make(Longformer, causal, reach=50, global_tokens=0), make(Attention, causal)
    x = jax.random.normal(jax.random.key(0), (2, 50, 12))
    info = SeqInfo.of(2, 50)
    np.testing.assert_allclose(wide(x, info=info)[0], plain(x, info=info)[0], atol=2e-6)


LINEAR = [
    (Longformer, {'reach': 32, 'global_tokens': 2}),
    (BigBird, {'block': 16, 'random': 2}),
    (LongNet, {'segments': (32, 64), 'dilations': (1, 2)}),
]


@pytest.mark.parametrize(('kind', 'sizes'), LINEAR, ids=['longformer', 'bigbird', 'longnet'])
def test_cost_and_memory_are_linear_in_the_length(kind, sizes):
    """Twice the tokens: twice the model's FLOPs and those that run, arrays at most so."""

    def measured(length):
        ctx = Context(width=12, policy=Policy(), causal=False, max_len=length, init='lecun')
        mixer = kind(ctx, heads=2, **sizes, rngs=nnx.Rngs(0))
        x = jax.ShapeDtypeStruct((1, length, 12), jnp.float32)
        run = lambda x: mixer(x, info=SeqInfo.of(1, length))[0].sum()  # noqa: E731
        arrays = _sizes(jax.make_jaxpr(jax.grad(run))(x).jaxpr)
        return mixer.cost(1, length).model_flops, walk(run, x).total, max(arrays)

    # The ends of a row see less than its middle: a few percent beside the factor of 2.
    *flops, array = (
        twice / once for once, twice in zip(measured(2048), measured(4096), strict=True)
    )
    assert all(1.9 < ratio < 2.1 for ratio in flops) and array < 2.1


def _sizes(jaxpr):
    """Number of elements of every array that a program makes."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, 'size'))
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')
        ):
            inner = getattr(value, 'jaxpr', value)
            yield from _sizes(inner) if hasattr(inner, 'eqns') else ()


def test_longnet_of_one_whole_segment_is_attention():
    mixer, plain = make(LongNet, segments=(64,), dilations=(1,)), make(Attention)
    x = jax.random.normal(jax.random.key(0), (2, 50, 12))
    info = SeqInfo.of(2, 50)
    np.testing.assert_allclose(mixer(x, info=info)[0], plain(x, info=info)[0], atol=2e-6)
    # Heads take turns in what they see of a dilated segment.
    offsets = [m.branches[1].offset for m in make(LongNet, heads=4, segments=(2, 6),
                                                  dilations=(1, 3)).mask()]  # fmt: skip
    assert offsets == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ('kind', 'sizes', 'slots'),
    [
        (Longformer, {'reach': 5, 'global_tokens': 3}, 8),
        *[
            pytest.param(*case, marks=pytest.mark.ci)
            for case in (
                (Longformer, {'reach': 7, 'global_tokens': 0, 'dilation': 2}, 7),
                (LongNet, {'segments': (4, 12), 'dilations': (1, 3)}, 12),
                (BigBird, {'block': 2, 'near': 2, 'random': 0}, 6),
            )
        ],
    ],
    ids=['longformer', 'dilated', 'longnet', 'bigbird'],
)
def test_a_ring_and_the_first_tokens_are_enough(kind, sizes, slots):
    """60 steps through two documents, from a prompt on, equal the parallel form."""
    mixer = make(kind, causal=True, kv_heads=1, **sizes)
    x = jax.random.normal(jax.random.key(2), (2, 60, 12))
    ids = jnp.where(jnp.arange(60) < jnp.array([[41], [2]]), 1, 2)
    begins = jnp.array([[41], [2]])
    info = SeqInfo(jnp.where(ids == 2, jnp.arange(60) - begins, jnp.arange(60)), ids)
    state = jax.eval_shape(lambda: mixer.init_state(2, 64, jnp.float32))
    assert state['key'].shape == (2, 1, slots, 6)
    assert mixer.state_bytes(2, 64, jnp.float32) == nbytes(state)
    # A cache with room for all the tokens there will be is no ring.
    assert mixer.init_state(2, slots - 1, jnp.float32)['key'].shape[2] == slots - 1

    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    def run(x):
        prompt = jax.tree.map(lambda a: a[:, :21], info)
        first, state, _ = mixer(x[:, :21], info=prompt, return_state=True)

        def one(state, inputs):
            y, state = mixer.step(inputs[0], state, reset=inputs[1])
            return state, y

        begin = (info.positions == 0)[:, 21:].T
        _, rest = jax.lax.scan(one, state, (x[:, 21:].swapaxes(0, 1), begin))
        return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1), mixer(x, info=info)[0]

    np.testing.assert_allclose(*run(x), atol=2e-6)


def test_what_has_no_end_keeps_the_whole_cache():
    for kind, sizes in ((BigBird, {'block': 4, 'random': 1}), (Mate, {'columns': 4})):
        mixer = make(kind, causal=True, **sizes)
        assert mixer.init_state(1, 64, jnp.float32)['key'].shape[2] == 64


def test_packed_rows_are_gathered_where_distances_decide():
    ids = jnp.repeat(jnp.arange(1, 5), 128)[None]
    info = SeqInfo((jnp.arange(512) % 128)[None], ids)
    ctx = Context(width=12, policy=Policy(), causal=True, max_len=512)
    x = jax.ShapeDtypeStruct((1, 512, 12), jnp.float32)
    for kind, sizes, form in (
        (Longformer, {'reach': 32, 'global_tokens': 4}, 'gather'),
        (LongNet, {'segments': (32, 128), 'dilations': (1, 8)}, 'gather'),
        (Mate, {'columns': 16, 'global_tokens': 1}, 'gather'),
        (BigBird, {'block': 16, 'random': 1}, 'dense'),
    ):
        mixer = kind(ctx, heads=2, **sizes, rngs=nnx.Rngs(0))
        jax.eval_shape(lambda x: mixer(x, info=info)[0], x)  # noqa: B023
        assert last_choice('attention')['form'] == form, kind


def test_causal_longformer_has_no_projections_of_its_own():
    assert not hasattr(make(Longformer, causal=True), 'global_query')
    assert hasattr(make(Longformer), 'global_query')
    assert not hasattr(make(Longformer, global_projections=False), 'global_query')


def test_what_they_refuse():
    with pytest.raises(ConfigError, match='longformer: reach must be at least 1, got 0'):
        make(Longformer, reach=0)
    with pytest.raises(ConfigError, match='bigbird: random must be at least 0, got -1'):
        make(BigBird, random=-1)
    with pytest.raises(ConfigError, match='mate: heads must be even'):
        make(Mate, heads=3, columns=4)
    for sizes in ({'segments': (8, 9)}, {'dilations': (1, 2)}, {'dilations': (2, 4, 16)}):
        with pytest.raises(ConfigError, match='longnet: segments and dilations are as many'):
            make(LongNet, **{'segments': (8, 8, 16), 'dilations': (1, 2, 4), **sizes})
    with pytest.raises(ConfigError, match='has no decoding state'):
        make(Longformer)(jnp.zeros((1, 4, 12)), info=SeqInfo.of(1, 4), return_state=True)
