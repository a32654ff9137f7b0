"""The delta rule on TPUs: in the TPU interpreter against float64, and compiled ahead."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.costs import walk
from effjax.kernels import delta_rule, last_choice, target
from effjax.kernels.delta_rule import cost, tpu, tpu_chunk, tpu_plan

B, T = 2, 41
# Documents end at a chunk's end (32) and inside; padding stands before, between and after.
SEGMENTS = np.repeat(
    np.array([[1, 0, 2, 3, 4, 5], [0, 1, 2, 0, 2, 0]], np.int32), [4, 3, 9, 16, 2, 7], axis=1
)
# heads, K, V, whether it decays
CASES = {
    'gated': (2, 5, 3, True),
    'plain': (2, 5, 3, False),
    'three_heads': (3, 5, 3, True),
    'whole_lanes': (1, 128, 256, True),
    'wide_keys': (1, 256, 128, False),
}
CHUNK = tpu_plan.CHUNK


def inputs(name, seed=0, length=T, strength=0.3):
    """A dict of float32 arrays, keys of norm 1; log_decay may be None."""
    heads, key_dim, value_dim, decay = CASES[name]
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(B, length, heads, key_dim))
    out = {
        'q': rng.normal(size=(B, length, heads, key_dim)) / key_dim**0.5,
        'k': k / np.linalg.norm(k, axis=-1, keepdims=True),
        'v': rng.normal(size=(B, length, heads, value_dim)),
        'beta': rng.uniform(0.05, 1.9, size=(B, length, heads)),
        'log_decay': -rng.exponential(strength, size=(B, length, heads)) if decay else None,
        'initial_state': rng.normal(size=(B, heads, key_dim, value_dim)),
    }
    return {n: None if x is None else x.astype(np.float32) for n, x in out.items()}


def loss(arrays, segments, implementation):
    """A number that needs every output and the last state, and both of them."""
    o, last = delta_rule(
        **arrays, scale=0.5, segment_ids=segments, return_state=True, implementation=implementation
    )
    weight = np.random.default_rng(9).normal(size=last.shape).astype(np.float32)
    return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.sin(last) * weight), (o, last)


def program(implementation='pallas_tpu'):
    """Of `loss`; by itself where it runs several times, since making it takes longest."""
    f = functools.partial(loss, implementation=implementation)
    return jax.jit(jax.value_and_grad(f, has_aux=True))


def run(arrays, segments, implementation='pallas_tpu', both=None):
    """((o, last), gradients); the kernels in the interpreter of TPU kernels."""
    both = both or program(implementation)
    if implementation != 'pallas_tpu':
        (_, out), grads = both(arrays, segments)
        return out, grads
    params = pltpu.InterpretParams(detect_races=True)  # raises on one; what is unwritten is NaN
    with target('tpu'), pltpu.force_tpu_interpret_mode(params):
        (_, out), grads = jax.block_until_ready(both(arrays, segments))
    return out, grads


def truth(arrays, segments):
    """The same by the token loop in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        return jax.tree.map(np.asarray, run(wide, segments, 'reference'))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(tpu_plan, 'CHUNK', 32)  # two leaves, merged once


def _tier(name, segments):
    """Without documents: `gated` is so below, with one key and with long chunks."""
    if (name, segments) == ('gated', True):
        return ()
    return pytest.mark.ci if segments or name == 'plain' else pytest.mark.slow


EVERY = [
    pytest.param(name, segments, marks=_tier(name, segments))
    for name in CASES
    for segments in (True, False)
]


@pytest.mark.parametrize(('name', 'segments'), EVERY)
def test_values_and_gradients_in_the_interpreter(name, segments):
    arrays, ids = inputs(name), SEGMENTS if segments else None
    got, expected = run(arrays, ids), truth(arrays, ids)
    assert last_choice('delta_rule')['implementation'] == 'reference'
    # float32 sums of tens of terms, some of order 10
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)
    if segments:
        assert not any(
            np.any(np.asarray(got[1][n])[SEGMENTS == 0]) for n in ('q', 'k', 'v', 'beta')
        )


@pytest.mark.ci
def test_chunks_of_128_tokens(monkeypatch):
    """Whose leaves are merged three times."""
    monkeypatch.setattr(tpu_plan, 'CHUNK', CHUNK)
    arrays = {n: x[:1] for n, x in inputs('gated', 1, length=150, strength=0.02).items()}
    chex.assert_trees_all_close(run(arrays, None), truth(arrays, None), atol=2e-4, rtol=2e-4)


@pytest.mark.ci
def test_bfloat16_inputs():
    arrays = {
        n: np.asarray(jnp.bfloat16(x)) if n in 'qkv' else x for n, x in inputs('gated').items()
    }
    (o, last), grads = run(arrays, SEGMENTS)
    assert o.dtype == grads['q'].dtype == grads['v'].dtype == jnp.bfloat16
    assert last.dtype == grads['beta'].dtype == grads['initial_state'].dtype == jnp.float32
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b),
        ((o, last), grads),
        truth(arrays, SEGMENTS),
    )
    # 8 bits of what comes in and goes out; all between is float32
    assert max(jax.tree.leaves(errors)) < 0.006, errors


@pytest.mark.parametrize('kind', ['one_key', 'one_key_twice', 'any'])
@pytest.mark.parametrize('size', [16, 128])
def test_inverse(kind, size):
    """One key throughout and beta 1, or 2, are the hardest systems: powers of A are huge."""
    k = np.random.default_rng(3).normal(size=(size, 6))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    k = k if kind == 'any' else k[:1].repeat(size, 0)
    system = np.tril((2 if kind == 'one_key_twice' else 1) * k @ k.T, -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(size) + system.astype(np.float64))
    # float32 sums of up to 128 terms of order 1
    np.testing.assert_allclose(jax.jit(tpu_chunk.invert)(system), expected, atol=1e-5)


@pytest.mark.ci
def test_one_key_throughout_and_extreme_decays():
    """Every third token decays by so much, the others a little; each replaces the whole value."""
    arrays = inputs('gated', seed=4)
    arrays['k'] = np.broadcast_to(arrays['k'][:, :1], arrays['k'].shape)
    arrays['beta'] = np.ones_like(arrays['beta'])
    # By row and head.
    arrays['log_decay'][:, ::3] = np.float32([[[0.0, -1e-4]], [[-50.0, -np.inf]]])
    got = run(arrays, None)
    finite = {**arrays, 'log_decay': np.maximum(arrays['log_decay'], -1e4)}
    chex.assert_trees_all_close(got, truth(finite, None), atol=1e-4, rtol=1e-4)


@pytest.mark.ci
def test_padding_is_never_read_and_a_row_of_padding_keeps_its_state():
    arrays = inputs('gated', seed=5)
    noisy = dict(arrays)
    for n in ('q', 'k', 'v', 'beta', 'log_decay'):
        mask = (SEGMENTS == 0).reshape(B, T, *[1] * (arrays[n].ndim - 2))
        noisy[n] = np.where(mask, np.nan, arrays[n])
    both = program()
    chex.assert_trees_all_equal(*(run(a, SEGMENTS, both=both) for a in (arrays, noisy)))
    (o, last), _ = run(arrays, np.zeros((B, T), np.int32), both=both)
    chex.assert_trees_all_equal(np.asarray(last), arrays['initial_state'])
    assert not np.any(o)


@pytest.mark.ci
def test_under_vmap_scan_and_remat(monkeypatch):
    """As models call it: stacked layers that recompute, seeds side by side."""
    # The interpreter of TPU kernels has side effects, which rematerialisation refuses.
    monkeypatch.setattr(pl, 'pallas_call', functools.partial(pl.pallas_call, interpret=True))
    arrays = inputs('gated', seed=6)
    names = ('q', 'k', 'v', 'beta', 'log_decay')

    def model(implementation, q, k, v, beta, log_decay):
        def layer(v, _):
            f = functools.partial(delta_rule, implementation=implementation)
            return v + f(q, k, v, beta, log_decay, segment_ids=SEGMENTS) / 8, None

        saved = jax.checkpoint_policies.save_only_these_names('delta_rule_out')
        v, _ = jax.lax.scan(jax.checkpoint(layer, policy=saved), v, length=2)
        return jnp.sum(jnp.sin(v))

    args = [np.stack([arrays[n], arrays[n] / 2]) for n in names]
    f = jax.vmap(jax.grad(functools.partial(model, 'xla'), range(5)))
    expected = jax.jit(f)(*args)
    f = jax.vmap(jax.grad(functools.partial(model, 'pallas_tpu'), range(5)))
    with target('tpu'):
        got = jax.block_until_ready(jax.jit(f)(*args))
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)


def shapes(batch, length, heads, key_dim, value_dim, dtype=jnp.bfloat16, sharding=None):
    """Abstract arguments of a call with decays, documents and an initial state."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    tokens = batch, length, heads
    qk, one = array((*tokens, key_dim), dtype), array(tokens, jnp.float32)
    v, state = array((*tokens, value_dim), dtype), (batch, heads, key_dim, value_dim)
    arrays = {'q': qk, 'k': qk, 'v': v, 'beta': one, 'log_decay': one}
    arrays['initial_state'] = array(state, jnp.float32)
    return arrays, array((batch, length), jnp.int32)


@pytest.mark.ci
def test_lowers_for_tpu(monkeypatch):
    monkeypatch.undo()
    f = jax.value_and_grad(lambda *a: loss(*a, None), has_aux=True)
    with target('tpu'):
        lowered = jax.jit(f).trace(*shapes(2, 300, 4, 64, 64)).lower(lowering_platforms=('tpu',))
        assert last_choice('delta_rule')['implementation'] == 'pallas_tpu'
    text = lowered.as_text()
    assert text.count('tpu_custom_call') == 2  # forward and backward
    assert 'tensor<2x384x512xbf16>' in text  # whole chunks and lanes, heads side by side


# The second has the least memory for a kernel; the third, by hand, as much as the first.
CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
AHEAD = [  # all for the first chip, the first for the others too
    ((8, 4096, 16, 128, 128), 'bfloat16'),
    ((1, 1000, 3, 256, 512), 'float32'),
]


@pytest.mark.ci
@pytest.mark.parametrize(
    ('topology', 'dims', 'dtype'),
    [
        pytest.param(chip, *case, marks=[pytest.mark.slow] if chip == CHIPS[2] else [])
        for chip in CHIPS
        for case in (AHEAD if chip == CHIPS[0] else AHEAD[:1])
    ],
)
def test_compiles_for_a_tpu_ahead(topology, dims, dtype, tpu_sharding, monkeypatch):
    monkeypatch.setattr(tpu_plan, 'CHUNK', CHUNK)
    args = shapes(*dims, dtype, tpu_sharding(topology))
    f = jax.value_and_grad(lambda *a: loss(*a, 'pallas_tpu'), has_aux=True)
    with target('tpu'):
        compiled = jax.jit(f).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    batch, length, heads, key_dim, value_dim = dims
    tokens = batch * length * heads * (key_dim + value_dim) * 4
    states = batch * -(-length // 128) * heads * key_dim * value_dim * 4
    # The states of all chunks, some copies of what comes in and goes out, and of decays.
    assert compiled.memory_analysis().temp_size_in_bytes < states + 4 * tokens


@pytest.mark.ci
@pytest.mark.parametrize('decay', [True, False])
@pytest.mark.parametrize('dims', [(2, 300, 4, 64, 64), (1, 40, 3, 128, 200)])
def test_costs_against_the_walk(dims, decay, monkeypatch):
    monkeypatch.undo()
    arrays, _ = shapes(*dims)
    if not decay:
        del arrays['log_decay']
    f = functools.partial(delta_rule, implementation='pallas_tpu')
    with target('tpu'):
        walked = walk(lambda a: f(**a), arrays)
        both = walk(jax.grad(lambda a: jnp.sum(f(**a).astype(jnp.float32))), arrays)
    assert walked.total == cost.executed_flops('pallas_tpu', *dims, decay=decay)
    assert 2 < both.kind('kernel') / walked.kind('kernel') < 4


def test_chunks_are_bounded_by_memory(monkeypatch):
    monkeypatch.undo()
    assert tpu_plan.chunk_size(4096, 128, 128, 2) == 128
    assert tpu_plan.chunk_size(41, 128, 128, 2) == 64
    assert tpu_plan.chunk_size(4096, 256, 512, 4) == 128
    assert tpu_plan.chunk_size(4096, 1024, 512, 4) < 128
    assert tpu_plan.chunk_size(4096, 2048, 2048, 2) is None
    for dims in ((128, 128), (256, 512), (1024, 512)):
        plan = tpu_plan.plan_for(4096, 16, *dims, itemsize=2)
        assert tpu_plan.vmem_bytes(plan.size, plan.block, *dims, 2) <= tpu_plan.BUDGET
    with pytest.raises(ValueError, match='pallas_tpu has no plan for'):
        cost.executed_flops('pallas_tpu', 1, 64, 1, 4096, 4096)


def test_what_cannot_run_is_said():
    def chosen(length=64, key_dim=16, value_dim=16, **dtypes):
        arrays, _ = shapes(1, length, 2, key_dim, value_dim)
        for name, dtype in dtypes.items():
            arrays[name] = jax.ShapeDtypeStruct(arrays[name].shape, dtype)
        with target('tpu'):
            jax.eval_shape(lambda a: delta_rule(**a), arrays)
        return last_choice('delta_rule')

    assert chosen()['implementation'] == 'pallas_tpu'
    for change, why in (
        (dict.fromkeys('qkv', 'float16'), 'it takes bfloat16 or float32, not float16'),
        ({'v': 'float32'}, 'it takes one dtype, not bfloat16, bfloat16 and float32'),
        ({'key_dim': 4096, 'value_dim': 4096}, 'a state of 4096 x 4096 leaves too little VMEM'),
        ({'length': 1}, 'rows of fewer than 16 tokens'),
    ):
        choice = chosen(**change)
        assert choice['implementation'] == 'xla'
        assert why in choice['refused']['pallas_tpu']
    empty = jax.ShapeDtypeStruct((1, 64, 2, 0), jnp.float32)
    with target('tpu'):
        assert 'it takes no empty arrays' in tpu.refuse(empty, empty, empty)
    mesh = jax.sharding.AbstractMesh((2,), ('data',))
    with jax.sharding.use_abstract_mesh(mesh):
        assert 'along the mesh axes data' in chosen()['refused']['pallas_tpu']
    x = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(ValueError, match='cannot run as .pallas_tpu.: it needs a TPU, not cpu'):
        delta_rule(x, x, x, x[..., 0], implementation='pallas_tpu')
