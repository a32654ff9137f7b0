"""Linear recurrences on TPUs: in the TPU interpreter against float64, and compiled ahead."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.costs import walk
from effjax.kernels import last_choice, linear_recurrence, target
from effjax.kernels.linear_recurrence import cost, tpu_plan

B, T = 2, 41
# Documents end at a chunk's end (32) and inside; padding stands before, between and after.
SEGMENTS = np.repeat(
    np.array([[1, 0, 2, 3, 4, 5], [0, 1, 2, 0, 2, 0]], np.int32), [4, 3, 9, 16, 2, 7], axis=1
)
# (heads, query heads, K, V), decay, bonus
CASES = {
    'none': ((2, 2, 5, 3), None, False),
    'head': ((3, 3, 5, 3), 'head', False),
    'scalar': ((2, 2, 5, 3), 'scalar', False),
    'scalar_bonus': ((2, 2, 5, 3), 'scalar', True),
    'none_bonus': ((1, 1, 5, 3), None, True),
    'groups_in_a_step': ((4, 2, 5, 3), 'scalar', False),
    'steps_in_a_group': ((6, 1, 5, 3), 'scalar', False),
    'groups_none': ((2, 1, 5, 3), None, False),
    'vector': ((2, 2, 5, 3), 'vector', False),
    'vector_bonus': ((2, 2, 5, 3), 'vector', True),
    'groups_vector': ((2, 1, 5, 3), 'vector', False),
    'whole_lanes_vector': ((1, 1, 256, 128), 'vector', True),
    'whole_lanes': ((1, 1, 128, 256), 'scalar', False),
}


def inputs(name, seed=0, strength=0.3):
    """A dict of float32 arrays; some are None."""
    (heads, groups, key_dim, value_dim), decay, bonus = CASES[name]
    rng = np.random.default_rng(seed)
    decays = {'head': (heads,), 'scalar': (B, T, heads), 'vector': (B, T, heads, key_dim)}
    out = {
        'q': rng.normal(size=(B, T, groups, key_dim)) / key_dim**0.5,
        'k': rng.normal(size=(B, T, groups, key_dim)),
        'v': rng.normal(size=(B, T, heads, value_dim)),
        'log_decay': -rng.exponential(strength, size=decays[decay]) if decay else None,
        'bonus': rng.normal(size=(heads, key_dim)) if bonus else None,
        'initial_state': rng.normal(size=(B, heads, key_dim, value_dim)),
    }
    return {n: None if x is None else x.astype(np.float32) for n, x in out.items()}


def loss(arrays, segments, implementation):
    """A number that needs every output and the last state, and both of them."""
    o, last = linear_recurrence(
        **arrays, segment_ids=segments, return_state=True, implementation=implementation
    )
    weight = np.random.default_rng(9).normal(size=last.shape).astype(np.float32)
    return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.sin(last) * weight), (o, last)


def program(implementation='pallas_tpu'):
    """Of `loss`; by itself where it runs several times, since making it takes longest."""
    f = functools.partial(loss, implementation=implementation)
    return jax.jit(jax.value_and_grad(f, has_aux=True))


def run(arrays, segments, implementation='pallas_tpu', both=None):
    """((o, last), gradients); chunks of 32 tokens in the interpreter of TPU kernels."""
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


CHUNK = tpu_plan.CHUNK


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(tpu_plan, 'CHUNK', 32)  # whose halves are halved once, into leaves


# Without documents: each kind of decay here or in `..._extreme_decays_...`, and whole lanes. What
# heads share is the same with documents.
ALONE = ('none', 'head', 'whole_lanes', 'whole_lanes_vector')


def _tier(name, segments):
    if (name, segments) == ('scalar', True):
        return ()
    return pytest.mark.ci if segments or name in ALONE else pytest.mark.slow


EVERY = [
    pytest.param(name, segments, marks=_tier(name, segments))
    for name in CASES
    for segments in (True, False)
]


@pytest.mark.parametrize(('name', 'segments'), EVERY)
def test_values_and_gradients_in_the_interpreter(name, segments):
    arrays, ids = inputs(name), SEGMENTS if segments else None
    got, expected = run(arrays, ids), truth(arrays, ids)
    assert last_choice('linear_recurrence')['implementation'] == 'reference'
    # float32 sums of tens of terms, some of order 10
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)
    if segments:
        assert not any(np.any(np.asarray(got[1][n])[SEGMENTS == 0]) for n in 'qkv')


@pytest.mark.ci
@pytest.mark.parametrize(
    'name',
    [
        'scalar',
        'vector',
        *(pytest.param(n, marks=pytest.mark.slow) for n in ('none_bonus', 'steps_in_a_group')),
    ],
)
def test_bfloat16_inputs(name):
    arrays = {
        n: x if x is None or n in ('log_decay', 'initial_state') else np.asarray(jnp.bfloat16(x))
        for n, x in inputs(name).items()
    }
    (o, last), grads = run(arrays, SEGMENTS)
    assert o.dtype == grads['q'].dtype == grads['v'].dtype == jnp.bfloat16
    assert last.dtype == grads['initial_state'].dtype == jnp.float32
    (wide_o, wide_last), wide_grads = truth(arrays, SEGMENTS)
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b),
        (o, last, grads),
        (wide_o, wide_last, wide_grads),
    )
    # 8 bits of each factor
    assert max(jax.tree.leaves(errors)) < 0.02, errors


@pytest.mark.ci
@pytest.mark.parametrize('name', ['scalar', 'scalar_bonus', 'vector', 'vector_bonus'])
def test_extreme_decays_stay_finite_and_right(name):
    """Every third token decays by so much, the others a little: those must stay exact."""
    arrays = inputs(name, seed=4)
    strengths = np.float32([[0.0, -50.0], [-np.inf, -1e-4]])  # by row and head
    decay = arrays['log_decay']
    decay[:, ::3] = strengths.reshape(B, 1, 2, *[1] * (decay.ndim - 3))
    got = run(arrays, None)
    with jax.enable_x64(True):
        finite = {**arrays, 'log_decay': np.maximum(arrays['log_decay'], -1e4)}
    expected = truth(finite, None)
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize('name', ['scalar', 'vector_bonus'])
def test_padding_is_never_read_and_a_row_of_padding_keeps_its_state(name):
    arrays = inputs(name, seed=5)
    noisy = dict(arrays)
    for n in ('q', 'k', 'v', 'log_decay'):
        mask = (SEGMENTS == 0).reshape(B, T, *[1] * (arrays[n].ndim - 2))
        noisy[n] = np.where(mask, np.nan, arrays[n])
    both = program()
    clean, dirty = (run(a, SEGMENTS, both=both) for a in (arrays, noisy))
    chex.assert_trees_all_equal(clean, dirty)
    (o, last), _ = run(arrays, np.zeros((B, T), np.int32), both=both)
    chex.assert_trees_all_equal(np.asarray(last), arrays['initial_state'])
    assert not np.any(o)


@pytest.mark.ci
def test_under_vmap_scan_and_remat(monkeypatch):
    """As models call it: stacked layers that recompute, seeds side by side."""
    # The interpreter of TPU kernels has side effects, which rematerialisation refuses.
    monkeypatch.setattr(pl, 'pallas_call', functools.partial(pl.pallas_call, interpret=True))
    arrays = inputs('scalar', seed=6)
    names = ('q', 'k', 'v', 'log_decay')

    def model(implementation, q, k, v, log_decay):
        def layer(v, _):
            f = functools.partial(linear_recurrence, implementation=implementation)
            return v + f(q, k, v, log_decay, segment_ids=SEGMENTS) / 8, None

        saved = jax.checkpoint_policies.save_only_these_names('linear_recurrence_out')
        v, _ = jax.lax.scan(jax.checkpoint(layer, policy=saved), v, length=2)
        return jnp.sum(jnp.sin(v))

    args = [np.stack([arrays[n], arrays[n] / 2]) for n in names]
    f = jax.vmap(jax.grad(functools.partial(model, 'xla'), (0, 1, 2, 3)))
    expected = jax.jit(f)(*args)
    f = jax.vmap(jax.grad(functools.partial(model, 'pallas_tpu'), (0, 1, 2, 3)))
    with target('tpu'):
        got = jax.block_until_ready(jax.jit(f)(*args))
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-4)


def shapes(
    batch,
    length,
    heads,
    groups,
    key_dim,
    value_dim,
    dtype=jnp.bfloat16,
    *,
    decay='scalar',
    sharding=None,
):
    """Abstract arguments of a call with decays a token, documents and an initial state."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    qk = array((batch, length, groups, key_dim), dtype)
    arrays = {
        'q': qk,
        'k': qk,
        'v': array((batch, length, heads, value_dim), dtype),
        'log_decay': array(
            (batch, length, heads, key_dim)[: 4 if decay == 'vector' else 3], jnp.float32
        ),
        'initial_state': array((batch, heads, key_dim, value_dim), jnp.float32),
    }
    return arrays, array((batch, length), jnp.int32)


@pytest.mark.parametrize('decay', ['scalar', 'vector'])
def test_lowers_for_tpu(decay, monkeypatch):
    monkeypatch.undo()
    f = jax.value_and_grad(lambda *a: loss(*a, None), has_aux=True)
    with target('tpu'):
        traced = jax.jit(f).trace(*shapes(2, 300, 4, 4, 64, 64, decay=decay))
        lowered = traced.lower(lowering_platforms=('tpu',))
        assert last_choice('linear_recurrence')['implementation'] == 'pallas_tpu'
    text = lowered.as_text()
    assert text.count('tpu_custom_call') == 2  # forward and backward
    assert 'tensor<2x384x512xbf16>' in text  # whole chunks and lanes, heads side by side


# The second has the least memory for a kernel; the third, by hand, as much as the first.
CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
AHEAD = [  # all for the first chip, the first two for the others too
    ((8, 4096, 16, 16, 128, 128), 'bfloat16', 'scalar'),
    ((8, 4096, 16, 16, 128, 128), 'bfloat16', 'vector'),
    ((1, 1000, 4, 4, 256, 512), 'bfloat16', 'scalar'),
    ((1, 1000, 6, 1, 128, 64), 'float32', 'scalar'),
    ((1, 1000, 2, 1, 256, 512), 'float32', 'vector'),
]


@pytest.mark.ci
@pytest.mark.parametrize(
    ('topology', 'dims', 'dtype', 'decay'),
    [
        pytest.param(chip, *case, marks=[pytest.mark.slow] if chip == CHIPS[2] else [])
        for chip in CHIPS
        for case in (AHEAD if chip == CHIPS[0] else AHEAD[:2])
    ],
)
def test_compiles_for_a_tpu_ahead(topology, dims, dtype, decay, tpu_sharding, monkeypatch):
    monkeypatch.setattr(tpu_plan, 'CHUNK', CHUNK)
    args = shapes(*dims, dtype, decay=decay, sharding=tpu_sharding(topology))
    f = jax.value_and_grad(lambda *a: loss(*a, 'pallas_tpu'), has_aux=True)
    with target('tpu'):
        compiled = jax.jit(f).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    batch, length, heads, _, key_dim, value_dim = dims
    tokens = batch * length * heads * (key_dim + value_dim) * 4
    states = batch * -(-length // 128) * heads * key_dim * value_dim * 4
    # The states of all chunks, some copies of what comes in and goes out, and of decays.
    copies = 4 if decay == 'scalar' else 8
    assert compiled.memory_analysis().temp_size_in_bytes < states + copies * tokens


@pytest.mark.parametrize('decay', ['scalar', 'vector'])
@pytest.mark.parametrize('dims', [(2, 300, 4, 2, 64, 64), (1, 40, 6, 1, 128, 200)])
def test_costs_against_the_walk(dims, decay, monkeypatch):
    monkeypatch.undo()
    arrays, _ = shapes(*dims, decay=decay)
    batch, length, heads, groups, key_dim, value_dim = dims
    f = functools.partial(linear_recurrence, implementation='pallas_tpu')
    keys = dict(decay=decay, groups=groups)
    with target('tpu'):
        walked = walk(lambda a: f(**a), arrays)
        both = walk(jax.grad(lambda a: jnp.sum(f(**a).astype(jnp.float32))), arrays)
    expected = cost.executed_flops('pallas_tpu', batch, length, heads, key_dim, value_dim, **keys)
    assert walked.total == expected
    assert 2 < both.kind('kernel') / walked.kind('kernel') < 4


def test_chunks_are_bounded_by_memory(monkeypatch):
    monkeypatch.undo()
    assert tpu_plan.chunk_size(4096, 128, 128, 2) == 128
    assert tpu_plan.chunk_size(41, 128, 128, 2) == 48
    assert tpu_plan.chunk_size(4096, 256, 512, 4) == 128
    assert tpu_plan.chunk_size(4096, 1024, 512, 4) < 128
    assert tpu_plan.chunk_size(4096, 2048, 2048, 2) is None
    assert tpu_plan.chunk_size(41, 128, 128, 2, vector=True) == 64
    for dims in ((128, 128), (256, 512), (1024, 512)):
        plan = tpu_plan.plan_for(4096, 16, 16, *dims, decay='scalar', strict=False, itemsize=2)
        taken = tpu_plan.vmem_bytes(plan.size, plan.block, *dims, 2)
        assert taken <= tpu_plan.BUDGET and plan.size % 16 == 0


def test_what_cannot_run_is_said():
    def chosen(**kw):
        arrays, _ = shapes(1, 64, 2, 2, 16, 16)
        with target('tpu'):
            jax.eval_shape(lambda a: linear_recurrence(**a), {**arrays, **kw})
        return last_choice('linear_recurrence')

    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    assert chosen()['implementation'] == 'pallas_tpu'
    half = {n: like(1, 64, 2, 16, dtype=jnp.float16) for n in 'qkv'}
    for change, why in (
        (half, 'it takes bfloat16 or float32, not float16'),
        (
            {
                **{n: like(1, 64, 2, 4096) for n in 'qkv'},
                'initial_state': like(1, 2, 4096, 4096, dtype=jnp.float32),
            },
            'a state of 4096 x 4096 leaves too little VMEM',
        ),
    ):
        choice = chosen(**change)
        assert choice['implementation'] == 'xla'
        assert why in choice['refused']['pallas_tpu']
    mesh = jax.sharding.AbstractMesh((2,), ('data',))
    with jax.sharding.use_abstract_mesh(mesh):
        assert (
            'along the mesh axes data: call it in a shard_map'
            in (chosen()['refused']['pallas_tpu'])
        )
    x = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(ValueError, match='cannot run as .pallas_tpu.: it needs a TPU, not cpu'):
        linear_recurrence(x, x, x, implementation='pallas_tpu')


@pytest.mark.mesh
def test_a_mesh_takes_it_in_a_shard_map_only():
    """XLA cannot partition a kernel: refused under a mesh, each device's own part is not."""
    arrays, _ = shapes(8, 256, 4, 4, 64, 64)
    del arrays['initial_state']
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec('data')

    def f(arrays):
        return jnp.sum(linear_recurrence(**arrays).astype(jnp.float32))[None]

    def lower(f):
        with target('tpu'), jax.set_mesh(mesh):
            traced = jax.jit(jax.grad(lambda a: jnp.sum(f(a)))).trace(arrays)
            text = traced.lower(lowering_platforms=('tpu',)).as_text()
        return last_choice('linear_recurrence'), text

    choice, text = lower(f)
    assert choice['implementation'] == 'xla' and 'tpu_custom_call' not in text
    assert 'along the mesh axes data' in choice['refused']['pallas_tpu']
    choice, text = lower(jax.shard_map(f, in_specs=rows, out_specs=rows, check_vma=False))
    assert choice['implementation'] == 'pallas_tpu' and text.count('tpu_custom_call') == 2
