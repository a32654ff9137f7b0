"""Sharded initialisation and batches."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effjax.core.axes import Meta
from effjax.core.errors import ConfigError
from effjax.core.trees import flatten, nbytes
from effjax.parallel import (
    batch_sharding,
    check_batch,
    init_sharded,
    make_mesh,
    process_rows,
    put_batch,
    replicated,
    shardings,
)
from effjax.training import optimizers

META = {
    'embedding': Meta(('vocab', 'embed')),
    'up': Meta(('layers', 'embed', 'mlp')),
    'query': Meta(('layers', 'embed', 'heads', 'head_dim')),
    'scale': Meta(('layers', 'embed'), no_decay=True),
}
SHAPES = {'embedding': (64, 32), 'up': (3, 32, 128), 'query': (3, 32, 4, 8), 'scale': (3, 32)}


def _init(key):
    keys = jax.random.split(key, len(SHAPES))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}


def test_one_device():
    mesh = make_mesh({'data': 1})
    assert batch_sharding(mesh, sequence=True).spec == P(None, None)
    assert process_rows(12, mesh) == slice(0, 12)
    batch = {'tokens': np.arange(24).reshape(12, 2), 'label': np.arange(12)}
    out = put_batch(batch, mesh, sequence=True)
    assert all(np.array_equal(out[k], batch[k]) for k in batch)
    check_batch(7, mesh, seq_len=13)


def test_arrays_of_unequal_rows_are_refused():
    with pytest.raises(AssertionError):
        put_batch({'a': np.zeros(4), 'b': np.zeros(5)}, make_mesh({'data': 1}))


@pytest.mark.mesh
@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'fsdp': 4, 'tensor': 2}, {'data': 8}])
def test_initialisation_is_sharded_and_independent_of_the_mesh(sizes):
    """Parameters and moments: an eighth of the bytes on each device under fsdp."""
    mesh = make_mesh(sizes)
    abstract = jax.eval_shape(_init, jax.random.key(0))
    specs, _ = shardings(META, abstract, mesh)
    optimizer = optimizers.build({'kind': 'adamw'}, meta=META)
    state_specs = optimizer.state_shardings(abstract, specs)

    def init(key):
        params = _init(key)
        return params, optimizer.init(params)

    state = init_sharded(init, (specs, state_specs), jax.random.key(0))
    total = nbytes(state)
    on_first = sum(
        s.data.nbytes
        for x in jax.tree.leaves(state)
        for s in x.addressable_shards
        if s.device == mesh.devices.flat[0]
    )
    if 'data' in sizes:
        assert on_first == total
    else:
        # Under tensor 2 the norm scales (no tensor axis) are split in four only.
        assert on_first <= total / 8 * 1.02 + 64
    alone = jax.jit(init)(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        # The same random bits; XLA's vectorised erf_inv may differ in the last bits by shape.
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-7)


@pytest.mark.mesh
def test_initialisation_holds_nothing_whole_on_a_device():
    """The compiled program's temporary memory stays below one whole parameter."""
    mesh = make_mesh({'fsdp': 8})
    spec = {'w': jax.NamedSharding(mesh, P('fsdp'))}

    def init(key):
        return {'w': jax.random.normal(key, (8, 256, 256))}

    compiled = jax.jit(init, out_shardings=spec).lower(jax.random.key(0)).compile()
    memory = compiled.memory_analysis()
    whole = 8 * 256 * 256 * 4
    assert memory.output_size_in_bytes == whole // 8
    assert memory.temp_size_in_bytes < whole


@pytest.mark.mesh
@pytest.mark.parametrize('kind', ['adafactor', 'muon', 'lamb', 'lion', 'schedule_free_adamw'])
def test_moments_are_sharded_as_their_parameters(kind):
    mesh = make_mesh({'fsdp': 4, 'tensor': 2})
    abstract = jax.eval_shape(_init, jax.random.key(0))
    specs, _ = shardings(META, abstract, mesh)
    block = {'kind': kind} | ({'min_factored': 4} if kind == 'adafactor' else {})
    optimizer = optimizers.build(block, meta=META)
    state = optimizer.state_shardings(abstract, specs)
    if kind == 'adafactor':
        rows, columns = state[0].v_row, state[0].v_col
        assert (rows['up'].spec, columns['up'].spec) == (P(None, 'fsdp'), P(None, 'tensor'))
        # [vocab, embed] = [64, 32]: of the two, the larger is reduced first.
        assert (rows['embedding'].spec, columns['embedding'].spec) == (P('fsdp'), P('tensor'))
        # A square matrix: [embed, heads * head_dim] = [32, 32].
        assert (rows['query'].spec, columns['query'].spec) == (P(None, 'fsdp'), P(None, 'tensor'))
        assert state[0].v['scale'].spec == P(None, 'fsdp')
        assert state[0].count.spec == P()
    else:
        specs_of_up = {s.spec for name, s in flatten(state).items() if name.endswith('/up')}
        assert specs_of_up == {P(None, 'fsdp', 'tensor')}
    # The specs are accepted for the arrays.
    init_sharded(lambda key: optimizer.init(_init(key)), state, jax.random.key(0))


@pytest.mark.mesh
@pytest.mark.parametrize(
    'sizes', [{'data': 8}, {'data': 2, 'fsdp': 4}, {'fsdp': 2, 'tensor': 4}, {'sequence': 8}]
)
def test_batches(sizes):
    mesh = make_mesh(sizes)
    tokens = np.arange(16 * 8).reshape(16, 8)
    out = put_batch({'tokens': tokens, 'label': tokens[:, 0]}, mesh, sequence=True)
    assert np.array_equal(out['tokens'], tokens) and np.array_equal(out['label'], tokens[:, 0])
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    shard = out['tokens'].addressable_shards[0].data.shape
    assert shard == (16 // ways, 8 // mesh.shape['sequence'])
    assert out['tokens'].sharding == batch_sharding(mesh, sequence=True)
    assert replicated(mesh).spec == P()


@pytest.mark.mesh
def test_batches_that_do_not_divide():
    mesh = make_mesh({'data': 2, 'fsdp': 2, 'sequence': 2})
    check_batch(8, mesh, accumulate=2, seq_len=4)
    with pytest.raises(ConfigError, match=r'batch_size 6 is not .* 4 devices .* data 2 x fsdp 2; '):
        check_batch(6, mesh)
    with pytest.raises(ConfigError, match=r'batch_size 4 in 2 microbatches .* a multiple of 8'):
        check_batch(4, mesh, accumulate=2)
    with pytest.raises(ConfigError, match=r'seq_len 5 is not divisible by the 2 devices'):
        check_batch(4, mesh, seq_len=5)
