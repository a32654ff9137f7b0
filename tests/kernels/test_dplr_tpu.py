"""Diagonal plus low-rank recurrences on TPUs: in the interpreter against float64, and ahead."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.costs import walk
from effjax.kernels import dplr, last_choice, target
from effjax.kernels.dplr import cost, tpu, tpu_plan

B, T = 2, 41
# Documents end at a chunk's end (32) and inside; padding stands before, between and after.
SEGMENTS = np.repeat(
    np.array([[1, 0, 2, 3, 4, 5], [0, 1, 2, 0, 2, 0]], np.int32), [4, 3, 9, 16, 2, 7], axis=1
)
# heads, K, V
CASES = {'two_heads': (2, 5, 3), 'three_heads': (3, 5, 3), 'whole_lanes': (1, 128, 256)}
NAMES = ('q', 'k', 'v', 'read', 'write', 'log_decay')
CHUNK = tpu_plan.CHUNK


def inputs(name, seed=0, length=T, strength=0.3):
    """A dict of float32 arrays as RWKV-7 has them: of keys of norm 1 a share is taken out."""
    heads, key_dim, value_dim = CASES[name]
    rng = np.random.default_rng(seed)
    tokens = B, length, heads
    out = {n: rng.normal(size=(*tokens, value_dim if n == 'v' else key_dim)) for n in NAMES}
    out['q'] /= key_dim**0.5
    out['k'] /= key_dim**0.5
    out['read'] /= np.linalg.norm(out['read'], axis=-1, keepdims=True)
    out['write'] = -out['read'] * rng.uniform(size=out['read'].shape)
    out['log_decay'] = -rng.exponential(strength, size=out['q'].shape)
    out['initial_state'] = rng.normal(size=(B, heads, key_dim, value_dim))
    return {n: x.astype(np.float32) for n, x in out.items()}


def loss(arrays, segments, implementation):
    """A number that needs every output and the last state, and both of them."""
    o, last = dplr(
        **arrays, scale=0.5, segment_ids=segments, return_state=True, implementation=implementation
    )
    weight = np.random.default_rng(9).normal(size=last.shape).astype(np.float32)
    return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.sin(last) * weight), (o, last)


def run(arrays, segments, implementation='pallas_tpu'):
    """((o, last), gradients); the kernels in the interpreter of TPU kernels."""
    both = jax.value_and_grad(functools.partial(loss, implementation=implementation), has_aux=True)
    if implementation != 'pallas_tpu':
        (_, out), grads = jax.jit(both)(arrays, segments)
        return out, grads
    params = pltpu.InterpretParams(detect_races=True)  # raises on one; what is unwritten is NaN
    with target('tpu'), pltpu.force_tpu_interpret_mode(params):
        (_, out), grads = jax.block_until_ready(jax.jit(both)(arrays, segments))
    return out, grads


def truth(arrays, segments):
    """The same by the token loop in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        return jax.tree.map(np.asarray, run(wide, segments, 'reference'))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(tpu_plan, 'CHUNK', 32)  # two leaves of the system, four of the pairs


EVERY = [
    ('two_heads', True),
    pytest.param('two_heads', False, marks=pytest.mark.ci),
    pytest.param('three_heads', True, marks=pytest.mark.ci),
    pytest.param('whole_lanes', True, marks=pytest.mark.ci),
]


@pytest.mark.parametrize(('name', 'segments'), EVERY)
def test_values_and_gradients_in_the_interpreter(name, segments):
    arrays, ids = inputs(name), SEGMENTS if segments else None
    got, expected = run(arrays, ids), truth(arrays, ids)
    assert last_choice('dplr')['implementation'] == 'reference'
    # float32 sums of tens of terms, some of order 10
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)
    if segments:
        assert not any(np.any(np.asarray(got[1][n])[SEGMENTS == 0]) for n in NAMES)


@pytest.mark.ci
def test_chunks_of_128_tokens(monkeypatch):
    """Whose leaves are merged three times, and halved four times."""
    monkeypatch.setattr(tpu_plan, 'CHUNK', CHUNK)
    arrays = {n: x[:1] for n, x in inputs('two_heads', 1, length=150, strength=0.02).items()}
    chex.assert_trees_all_close(run(arrays, None), truth(arrays, None), atol=2e-4, rtol=2e-4)


@pytest.mark.ci
def test_bfloat16_inputs():
    """`read` and `write` come in float32, as RWKV-7 gives them, and are rounded."""
    arrays = {
        n: np.asarray(jnp.bfloat16(x)) if n in 'qkv' else x for n, x in inputs('two_heads').items()
    }
    (o, last), grads = run(arrays, SEGMENTS)
    assert o.dtype == grads['q'].dtype == grads['v'].dtype == jnp.bfloat16
    assert last.dtype == grads['read'].dtype == grads['initial_state'].dtype == jnp.float32
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b),
        ((o, last), grads),
        truth(arrays, SEGMENTS),
    )
    # 8 bits of what comes in, goes out and meets over a border
    assert max(jax.tree.leaves(errors)) < 0.01, errors


@pytest.mark.ci
@pytest.mark.parametrize('strength', [0.0, -1e-4, -50.0, -np.inf])
def test_one_key_throughout_and_extreme_decays(strength):
    """Every third token decays by so much, the others a little; each takes the whole key out."""
    arrays = inputs('two_heads', seed=4)
    arrays['read'] = np.broadcast_to(arrays['read'][:, :1], arrays['read'].shape)
    arrays['write'] = -arrays['read']
    arrays['log_decay'][:, ::3] = strength
    finite = {**arrays, 'log_decay': np.maximum(arrays['log_decay'], -1e4)}
    chex.assert_trees_all_close(run(arrays, None), truth(finite, None), atol=1e-4, rtol=1e-4)


@pytest.mark.ci
def test_padding_is_never_read_and_a_row_of_padding_keeps_its_state():
    arrays = inputs('two_heads', seed=5)
    padding = (SEGMENTS == 0)[..., None, None]
    noisy = {n: np.where(padding, np.nan, x) if n in NAMES else x for n, x in arrays.items()}
    chex.assert_trees_all_equal(run(arrays, SEGMENTS), run(noisy, SEGMENTS))
    (o, last), _ = run(arrays, np.zeros((B, T), np.int32))
    chex.assert_trees_all_equal(np.asarray(last), arrays['initial_state'])
    assert not np.any(o)


@pytest.mark.ci
def test_under_vmap_scan_and_remat(monkeypatch):
    """As models call it: stacked layers that recompute, seeds side by side."""
    # The interpreter of TPU kernels has side effects, which rematerialisation refuses.
    monkeypatch.setattr(pl, 'pallas_call', functools.partial(pl.pallas_call, interpret=True))
    arrays = inputs('two_heads', seed=6)

    def model(implementation, q, k, v, read, write, log_decay):
        def layer(q, _):
            f = functools.partial(dplr, implementation=implementation, segment_ids=SEGMENTS)
            o = f(q, k, v, read, write, log_decay)
            return q + jnp.pad(o, [(0, 0)] * 3 + [(0, 2)]) / 8, None

        saved = jax.checkpoint_policies.save_only_these_names('dplr_out')
        q, _ = jax.lax.scan(jax.checkpoint(layer, policy=saved), q, length=2)
        return jnp.sum(jnp.sin(q))

    args = [np.stack([arrays[n], arrays[n] / 2]) for n in NAMES]
    f = jax.vmap(jax.grad(functools.partial(model, 'xla'), range(6)))
    expected = jax.jit(f)(*args)
    f = jax.vmap(jax.grad(functools.partial(model, 'pallas_tpu'), range(6)))
    with target('tpu'):
        got = jax.block_until_ready(jax.jit(f)(*args))
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)


def shapes(batch, length, heads, key_dim, value_dim, dtype=jnp.bfloat16, sharding=None):
    """Abstract arguments of a call with documents and an initial state."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    tokens = batch, length, heads
    key = array((*tokens, key_dim), dtype)
    arrays = dict.fromkeys(NAMES, key) | {'v': array((*tokens, value_dim), dtype)}
    arrays['log_decay'] = array((*tokens, key_dim), jnp.float32)
    arrays['initial_state'] = array((batch, heads, key_dim, value_dim), jnp.float32)
    return arrays, array((batch, length), jnp.int32)


@pytest.mark.ci
def test_lowers_for_tpu(monkeypatch):
    monkeypatch.undo()
    f = jax.value_and_grad(lambda *a: loss(*a, None), has_aux=True)
    with target('tpu'):
        lowered = jax.jit(f).trace(*shapes(2, 300, 4, 64, 64)).lower(lowering_platforms=('tpu',))
        assert last_choice('dplr')['implementation'] == 'pallas_tpu'
    text = lowered.as_text()
    assert text.count('tpu_custom_call') == 2  # forward and backward
    assert 'tensor<2x384x512xbf16>' in text  # whole chunks and lanes, heads side by side


@pytest.mark.ci
@pytest.mark.parametrize(  # the second has the least memory for a kernel, the third as the first
    'topology', ['v5e:2x2', 'v5p:2x2x1', pytest.param('v6e:2x2', marks=pytest.mark.slow)]
)
def test_compiles_for_a_tpu_ahead(topology, tpu_sharding, monkeypatch):
    monkeypatch.setattr(tpu_plan, 'CHUNK', CHUNK)
    dims = 8, 4096, 16, 64, 64
    args = shapes(*dims, sharding=tpu_sharding(topology))
    f = jax.value_and_grad(lambda *a: loss(*a, 'pallas_tpu'), has_aux=True)
    with target('tpu'):
        compiled = jax.jit(f).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    batch, length, heads, key_dim, value_dim = dims
    key_dim, value_dim = (-(-x // 128) * 128 for x in (key_dim, value_dim))
    tokens = batch * length * heads * (key_dim + value_dim) * 4
    states = batch * -(-length // 128) * heads * key_dim * value_dim * 4
    # The states of all chunks, copies of what comes in and goes out, sums of decays in four parts.
    assert compiled.memory_analysis().temp_size_in_bytes < states + 8 * tokens


@pytest.mark.ci
@pytest.mark.parametrize('dims', [(2, 300, 4, 128, 64), (1, 40, 3, 128, 200)])
def test_costs_against_the_walk(dims, monkeypatch):
    monkeypatch.undo()
    arrays, _ = shapes(*dims)
    f = functools.partial(dplr, implementation='pallas_tpu')
    with target('tpu'):
        walked = walk(lambda a: f(**a), arrays)
        both = walk(jax.grad(lambda a: jnp.sum(f(**a).astype(jnp.float32))), arrays)
    assert walked.total == cost.executed_flops('pallas_tpu', *dims)
    assert 2 < both.kind('kernel') / walked.kind('kernel') < 5


def test_chunks_are_bounded_by_memory(monkeypatch):
    monkeypatch.undo()
    assert tpu_plan.chunk_size(4096, 64, 64, 2) == 128
    assert tpu_plan.chunk_size(41, 128, 128, 2) == 64
    assert tpu_plan.chunk_size(4096, 1024, 512, 4) < 128
    assert tpu_plan.chunk_size(4096, 2048, 2048, 2) is None
    for dims in ((128, 128), (256, 512), (1024, 512)):
        plan = tpu_plan.plan_for(4096, 16, *dims, itemsize=2)
        assert tpu_plan.vmem_bytes(plan.size, plan.block, *dims, 2) <= tpu_plan.BUDGET
    with pytest.raises(ValueError, match='dplr: pallas_tpu has no plan for'):
        cost.executed_flops('pallas_tpu', 1, 64, 1, 4096, 4096)


def test_what_cannot_run_is_said():
    def chosen(length=64, key_dim=16, value_dim=16, **dtypes):
        arrays, _ = shapes(1, length, 2, key_dim, value_dim)
        for name, dtype in dtypes.items():
            arrays[name] = jax.ShapeDtypeStruct(arrays[name].shape, dtype)
        with target('tpu'):
            jax.eval_shape(lambda a: dplr(**a), arrays)
        return last_choice('dplr')

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
    x = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(ValueError, match='cannot run as .pallas_tpu.: it needs a TPU, not cpu'):
        dplr(x, x, x, x, x, x, implementation='pallas_tpu')
