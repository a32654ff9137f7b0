"""Sparse masks on TPUs: splash attention visits the blocks that hold a pair, and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from effjax import parallel
from effjax.core.context import Context
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.costs import walk
from effjax.kernels import MaskSpec, attention, last_choice, target
from effjax.kernels.attention import blocks, cost
from effjax.layers.mixers.longformer import Longformer

WIDE = {
    'window and globals': MaskSpec(True, 100, global_tokens=3),
    'blocks drawn': MaskSpec(False, 1, block=64, random=1, seed=2),
    'segments': MaskSpec(True, segment=128),
    'strides': MaskSpec(True, 50, stride=3),
    'both sides': MaskSpec(False, 90),
    'all kinds': MaskSpec(False, 2, block=16, global_tokens=4, last_tokens=4, random=2),
    'columns': MaskSpec(False, stride=7, global_tokens=1),
    'causal, drawn': MaskSpec(True, 2, block=32, global_tokens=4, random=2, seed=3),
}
LONGNET = MaskSpec(branches=(MaskSpec(segment=4), MaskSpec(segment=32, stride=4, offset=3)))


@pytest.mark.parametrize('length', [130, 1024])
@pytest.mark.parametrize('spec', WIDE.values(), ids=WIDE)
def test_filled_tiles_are_those_of_the_dense_mask(spec, length):
    more = -length % 128
    dense = np.pad(spec.dense(length), ((0, more), (0, more)))
    count = len(dense) // 128
    expected = dense.reshape(count, 128, count, 128).any((1, 3))
    np.testing.assert_array_equal(blocks.filled(spec, length), expected)
    if not more:
        rows, columns = blocks.block_sizes(spec, length)
        visited = blocks.visited(spec, length, rows, columns)
        by_block = dense.reshape(length // rows, rows, length // columns, columns).any((1, 3))
        np.testing.assert_array_equal(visited, by_block)


def test_blocks_shrink_where_that_skips_more():
    near = MaskSpec(True, 100)
    assert blocks.block_sizes(near, 8192) == (128, 128)
    assert blocks.executed(near, 8192) == (2 * 64 - 1) * 128**2
    assert blocks.block_sizes(MaskSpec(True, segment=1024), 8192) == (512, 512)


def inputs(length=256, ids=False):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, length, heads, 128))
        for key, heads in zip(keys, (2, 1, 1), strict=True)
    )
    documents = np.arange(length) // 100 + 1
    return q, k, v, jnp.asarray(np.where(documents > 2, 0, documents), jnp.int32)[None]


BY_HAND = ('segments', 'strides', 'causal, drawn')


@pytest.mark.ci
@pytest.mark.parametrize(
    ('spec', 'documents'),
    [
        (WIDE['window and globals'], False),
        (WIDE['both sides'], True),
        *[
            # Whose tiles, tested above, are all that is left to the kernel of these.
            pytest.param(spec, False, marks=pytest.mark.slow if name in BY_HAND else ())
            for name, spec in WIDE.items()
            if name not in ('window and globals', 'both sides')
        ],
    ],
)
def test_equals_the_reference_with_gradients(spec, documents):
    """In the interpreter of TPU kernels; documents where only distances matter."""
    *qkv, ids = inputs()

    def run(implementation):
        def f(q, k, v):
            o = attention(
                q, k, v, mask=spec, segment_ids=ids if documents else None, soft_cap=20.0,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(jnp.sin(o)), o

        return jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(*qkv)

    expected = run('reference')
    with target('tpu'), pltpu.force_tpu_interpret_mode():
        got = run(None)
    assert last_choice('attention')['implementation'] == 'splash'
    # float32 sums in another order; the first is one of 32768 sines
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), got, expected)


def test_what_is_booked_are_the_blocks_that_are_visited():
    spec = WIDE['window and globals']
    s = jax.ShapeDtypeStruct((2, 1024, 2, 128), jnp.bfloat16)
    with target('tpu'):
        walked = walk(lambda q, k, v: attention(q, k, v, mask=spec), s, s, s)
    expected = cost.executed_flops('splash', 2, 1024, 2, 128, mask='sparse', spec=spec)
    assert walked.total == expected == 4 * 2 * 2 * 128 * blocks.executed(spec, 1024)


@pytest.mark.parametrize(
    ('spec', 'documents', 'why'),
    [
        (LONGNET, False, 'a mask of branches mixes several'),
        (MaskSpec(stride=4, offset=1), False, 'a mask with an offset leaves some out'),
        (WIDE['segments'], True, 'a MaskSpec of places in the row'),
    ],
)
def test_what_it_refuses(spec, documents, why):
    *qkv, ids = inputs()
    with target('tpu'):
        jax.eval_shape(
            lambda *qkv: attention(*qkv, mask=spec, segment_ids=ids if documents else None), *qkv
        )
    chosen = last_choice('attention')
    assert chosen['implementation'] == 'xla' and why in chosen['refused']['splash']


@pytest.mark.mesh
def test_each_device_has_its_rows_and_heads():
    """A sparse mixer on a mesh compiles for TPUs only if its kernel stands inside a shard_map."""
    ctx = Context(width=256, policy=Policy(), causal=True, max_len=256)
    mixer = Longformer(ctx, heads=2, reach=64, rngs=nnx.Rngs(0))
    graphdef, arrays = nnx.split(mixer)
    x = jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)
    info = SeqInfo(jnp.broadcast_to(jnp.arange(256), (4, 256)), None)
    mesh = jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
    with target('tpu'), parallel.mesh_context(mesh, parallel.DEFAULT_RULES):
        run = jax.jit(lambda arrays, x: nnx.merge(graphdef, arrays)(x, info=info)[0])
        text = run.trace(arrays, x).lower(lowering_platforms=('tpu',)).as_text()
    assert last_choice('attention')['implementation'] == 'splash'
    assert last_choice('attention')['shape'][0] == 1 and 'tpu_custom_call' in text
