"""Kernels on 8 simulated devices: XLA partitions them, and the results do not change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.kernels import attention, linear_cross_entropy

pytestmark = pytest.mark.mesh


def mesh():
    return jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)


def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh(), P(*spec)))


@pytest.mark.parametrize('spec', [('data', None), (None, 'tensor'), ('data', 'tensor')])
@pytest.mark.parametrize('chunks', [1, 4])
def test_cross_entropy_partitions_over_rows_and_vocabulary(spec, chunks):
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((64, 8), (8, 32)))
    targets, weights = rng.integers(0, 32, 64), rng.random(64).astype(np.float32)

    def f(x, w, targets, weights):
        return linear_cross_entropy(x, w, targets, weights, chunks=chunks, z_loss=0.1)[0]

    run = jax.jit(jax.value_and_grad(f, (0, 1)))
    expected = run(x, w, targets, weights)
    rows, vocab = spec
    sharded = (put(x, rows), put(w, None, vocab), put(targets, rows), put(weights, rows))
    chex.assert_trees_all_close(run(*sharded), expected, rtol=1e-4, atol=1e-5)
    if vocab is None:  # rows stay where they are: only sums cross devices
        text = run.lower(*sharded).compile().as_text()
        assert 'all-to-all' not in text and 'collective-permute' not in text
        assert 'all-gather' not in text


@pytest.mark.parametrize('window', [None, 40])
@pytest.mark.parametrize('length', [24, 1100])
def test_attention_partitions_over_batch_and_heads(window, length):
    """The catalogue's check of multi-head attention: sharded over 'tensor' equals unsharded."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, length, h, 4)).astype(np.float32) for h in (4, 2, 2))
    ids = np.sort(rng.integers(0, 3, (4, length)))[:, ::-1].astype(np.int32)

    def f(q, k, v, ids):
        return jnp.sum(jnp.sin(attention(q, k, v, segment_ids=ids, window=window)))

    run = jax.jit(jax.value_and_grad(f, (0, 1, 2)))
    expected = run(q, k, v, ids)
    spec = ('data', None, 'tensor')
    sharded = (*(put(x, *spec) for x in (q, k, v)), put(ids, 'data'))
    chex.assert_trees_all_close(run(*sharded), expected, rtol=1e-4, atol=1e-5)
    text = run.lower(*sharded).compile().as_text()
    assert 'all-gather' not in text and 'all-to-all' not in text
