"""Operations that XLA cannot partition, run on each device's part."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import parallel
from effjax.core.context import Context
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.kernels import target
from effjax.layers.mixers.attention import Attention


def test_without_a_mesh_the_operation_is_called_as_it_is():
    op = lambda x, none: x + 1  # noqa: E731
    assert parallel.over(op, (('batch',), None), ('batch',))(np.ones(3), None).tolist() == [2, 2, 2]


@pytest.mark.mesh
def test_each_device_sees_its_part_and_gradients_are_summed():
    mesh = parallel.make_mesh({'data': 4, 'tensor': 2})
    seen = []

    def op(x, w):
        seen.append((x.shape, w.shape))
        return x * w

    def f(x, w):
        run = parallel.over(
            op, (('batch', None, 'heads'), (None, 'heads')), ('batch', None, 'heads')
        )
        return jnp.sum(jnp.sin(run(x, w)))

    x, w = (np.random.default_rng(0).normal(size=s).astype(np.float32) for s in ((8, 3, 4), (1, 4)))
    expected = jax.value_and_grad(f, (0, 1))(x, w)
    with parallel.mesh_context(mesh):
        got = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w)
    assert seen[-1] == ((2, 3, 2), (1, 2))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.mesh
@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 4), (4, 2), (4, 1), (6, 3), (3, 1)])
def test_attention_of_an_accelerator_over_rows_and_heads(heads, kv_heads):
    """Also where heads are shared, or do not divide over the mesh."""
    context = Context(width=12, policy=Policy(), positions={'kind': 'none'}, init='lecun')
    mixer = Attention(
        context, heads=heads, kv_heads=kv_heads, head_dim=4, implementation='xla', rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (4, 7, 12))
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0]] * 4)
    info = SeqInfo(jnp.asarray([[0, 1, 2, 0, 1, 0, 0]] * 4), ids)

    def f(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x, info=info)[0]))

    def run(params, x):
        return jax.jit(jax.value_and_grad(f, (0, 1)))(params, x)

    expected = run(params, x)
    with target('gpu'), parallel.mesh_context(parallel.make_mesh({'data': 4, 'tensor': 2})):
        assert 'shard_map' in str(jax.make_jaxpr(f)(params, x))
        chex.assert_trees_all_close(run(params, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.mesh
def test_splash_attention_lowers_for_a_mesh_of_tpus():
    """Without `over`, a Pallas kernel refuses to be partitioned."""
    policy = Policy(compute='bfloat16')
    context = Context(width=512, policy=policy, positions={'kind': 'rope'}, max_len=256)
    graphdef, params = nnx.split(Attention(context, heads=4, kv_heads=2, rngs=nnx.Rngs(0)))
    x = jnp.zeros((4, 256, 512), jnp.bfloat16)
    info = SeqInfo.of(4, 256, segment_ids=jnp.ones((4, 256), jnp.int32))

    def f(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x, info=info)[0].astype(jnp.float32))

    with target('tpu'), parallel.mesh_context(parallel.make_mesh({'data': 4, 'tensor': 2})):
        traced = jax.jit(jax.grad(f)).trace(params, x)
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
    assert text.count('tpu_custom_call') >= 2
    assert 'tensor<2x256x128xbf16>' in text  # a device's two heads
