"""Linear recurrences on Hopper GPUs: in the GPU interpreter against float64, lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.costs import walk
from effjax.kernels import last_choice, linear_recurrence, target
from effjax.kernels.linear_recurrence import cost, hopper, hopper_kernels, hopper_plan

# (B, T, H, G, K, V), decay, documents
CASES = {
    'scalar': ((1, 150, 2, 1, 64, 64), 'scalar', True),
    'scalar_long': ((1, 330, 1, 1, 64, 64), 'scalar', False),
    'rows': ((2, 70, 2, 2, 64, 64), 'scalar', True),
    'head': ((2, 70, 2, 2, 64, 64), 'head', False),
    'none': ((1, 100, 1, 1, 64, 64), None, False),
    'none_documents': ((1, 100, 2, 2, 64, 64), None, True),
    'filled_up': ((1, 70, 1, 1, 40, 72), 'scalar', True),
    'wide_keys': ((1, 70, 1, 1, 256, 64), 'scalar', False),
    'wide_values': ((1, 70, 1, 1, 64, 512), 'scalar', True),
    'vector': ((1, 150, 2, 1, 64, 64), 'vector', True),
    'vector_rows': ((2, 70, 2, 2, 64, 64), 'vector', False),
    'vector_filled_up': ((1, 70, 1, 1, 72, 40), 'vector', True),
    'vector_wide': ((1, 70, 1, 1, 128, 256), 'vector', False),
    'vector_wide_keys': ((1, 130, 1, 1, 256, 64), 'vector', True),
    'bonus': ((1, 150, 2, 1, 64, 64), 'vector', True),
    'bonus_rows': ((2, 70, 2, 2, 64, 64), 'vector', False),
    'bonus_filled_up': ((1, 150, 1, 1, 72, 40), 'vector', True),
}


def inputs(name, seed=0, strength=0.1):
    """(a dict of arrays, segment ids or None)."""
    (batch, length, heads, groups, key_dim, value_dim), decay, documents = CASES[name]
    rng = np.random.default_rng(seed)
    tokens = batch, length, heads
    decays = {'head': (heads,), 'scalar': tokens, 'vector': (*tokens, key_dim)}
    out = {
        'q': rng.normal(size=(batch, length, groups, key_dim)) / key_dim**0.5,
        'k': rng.normal(size=(batch, length, groups, key_dim)),
        'v': rng.normal(size=(batch, length, heads, value_dim)),
    }
    out = {n: np.asarray(jnp.bfloat16(x)) for n, x in out.items()}
    if decay:
        out['log_decay'] = -rng.exponential(strength, size=decays[decay]).astype(np.float32)
    if name.startswith('bonus'):
        out['bonus'] = rng.normal(size=(heads, key_dim)).astype(np.float32)
    state = rng.normal(size=(batch, heads, key_dim, value_dim))
    out['initial_state'] = state.astype(np.float32)
    if not documents:
        return out, None
    ids = np.sort(rng.integers(0, 4, size=(batch, length)), axis=1).astype(np.int32)
    ids[:, 64:66] = 9  # a document begins with a chunk
    ids[:, 66:] += 10 * (ids[:, 66:] > 0)
    ids[:, 40:44] = 0
    return out, ids


def loss(arrays, segments, implementation):
    """A number that needs every output and the last state, and both of them."""
    o, last = linear_recurrence(
        **arrays, segment_ids=segments, return_state=True, implementation=implementation
    )
    rng = np.random.default_rng(9)
    weights = [rng.normal(size=x.shape).astype(np.float32) for x in (o, last)]
    return jnp.sum(o.astype(last.dtype) * weights[0]) + jnp.sum(last * weights[1]), (o, last)


def program(implementation='pallas_gpu'):
    """Of `loss`; by itself where it runs several times, since making it takes longest."""
    f = functools.partial(loss, implementation=implementation)
    return jax.jit(jax.value_and_grad(f, has_aux=True))


def run(arrays, segments, implementation='pallas_gpu', races=False, both=None):
    """((o, last), gradients)."""
    both = both or program(implementation)
    if implementation != 'pallas_gpu':
        (_, out), grads = both(arrays, segments)
        return out, grads
    params = plgpu.InterpretGPUParams(detect_races=races)
    with target('gpu'), plgpu.force_gpu_interpret_mode(params):
        (_, out), grads = jax.block_until_ready(both(arrays, segments))
    return out, grads


def truth(arrays, segments):
    """The same by the token loop in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        return jax.tree.map(np.asarray, run(wide, segments, 'reference'))


def errors(got, expected):
    """Relative errors of outputs and gradients by name."""
    (o, last), grads = got
    (wide_o, wide_last), wide = expected

    def error(a, b):
        return float(np.linalg.norm(np.float64(a) - b) / (np.linalg.norm(b) + 1e-12))

    return {
        'o': error(o, wide_o),
        'last': error(last, wide_last),
        **{n: error(x, wide[n]) for n, x in grads.items()},
    }


@pytest.fixture(autouse=True)
def through_shared_memory(monkeypatch):
    """The interpreter has no products of registers."""
    monkeypatch.setattr(hopper, 'STAGED', True)


FAST = ('scalar', 'vector')
# What other tests of the tier `ci` hold to the same truth: rows in `..._extreme_decays_...`, a row
# of six chunks in `..._stretches`, wide values of a vector in `..._exact_gradients`; the rest is of
# two properties that the others have one by one.
BY_HAND = (
    'scalar_long', 'rows', 'none', 'vector_rows', 'vector_filled_up', 'vector_wide', 'bonus_rows',
)  # fmt: skip


def by_hand(names, which):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in which else []) for n in names]


@pytest.mark.ci
@pytest.mark.parametrize('name', by_hand(CASES, BY_HAND))
def test_values_and_gradients_in_the_interpreter(name):
    arrays, ids = inputs(name)
    got = run(arrays, ids, races=name in (*FAST, 'wide_keys', 'vector_wide'))
    (o, last), grads = got
    assert o.dtype == grads['q'].dtype == grads['k'].dtype == grads['v'].dtype == jnp.bfloat16
    assert last.dtype == grads['initial_state'].dtype == jnp.float32
    found = errors(got, truth(arrays, ids))
    # 8 bits of each factor. The gradient of a decay is a sum of differences of such products, and
    # that of a head's decay again a sum of those, of which a part cancels.
    many = found.pop('log_decay', 0.0)
    assert max(found.values()) < 5e-3, found
    assert many < (0.1 if name == 'head' else 0.02)
    if ids is not None:
        assert not any(np.any(np.asarray(grads[n])[ids == 0]) for n in 'qkv')
        assert not np.any(np.asarray(o)[ids == 0])


CUT = {'scalar_long': 2, 'scalar': 4, 'rows': 2, 'head': 2, 'none': 2, 'none_documents': 4}


@pytest.mark.ci
@pytest.mark.parametrize('name', by_hand(CUT, ('rows', 'none', 'none_documents')))
def test_rows_cut_into_stretches(name, monkeypatch):
    """With documents, one decay for all rows, and a stretch that is nothing but fill."""
    monkeypatch.setattr(hopper, 'stretches', lambda *_: CUT[name])
    arrays, ids = inputs(name, seed=4)
    if name == 'head':
        arrays['log_decay'] /= 10
    got = run(arrays, ids, races=name == 'scalar_long')
    for what, error in errors(got, truth(arrays, ids)).items():
        assert error < (0.02 if what == 'log_decay' else 0.008), what


def test_few_blocks_of_threads_are_made_more():
    count = hopper_plan.stretches
    assert count(1, 32768, 16, 128) == 4  # 32 blocks of threads
    assert count(4, 8192, 16, 128) == 1
    assert count(1, 2048, 1, 64) == 2 and count(1, 1024, 1, 64) == 1  # too short to be cut
    assert count(1, 65536, 1, 64) == 64 and count(1, 65536, 8, 512) == 2


@pytest.mark.ci
@pytest.mark.parametrize('name', ['rows', 'vector_rows', 'bonus_rows'])
def test_extreme_decays_stay_finite_and_right(name):
    """Every third token decays by so much, the others a little: those must stay exact."""
    arrays, _ = inputs(name, seed=4)
    strengths = np.float32([[0.0, -50.0], [-np.inf, -1e-4]])  # by row and head
    decay = arrays['log_decay']
    decay[:, ::3] = strengths.reshape(2, 1, 2, *[1] * (decay.ndim - 3))
    got = run(arrays, None)
    expected = truth({**arrays, 'log_decay': np.maximum(decay, -1e4)}, None)
    for row, head in np.ndindex(2, 2):
        # Each by itself, so that a larger one hides nothing; all rows share the bonus.
        at = lambda x: x[row, head] if x.shape[1] == 2 else x[row, :, head]  # noqa: B023, E731
        mine = [
            (jax.tree.map(at, out), {n: x[head] if n == 'bonus' else at(x) for n, x in g.items()})
            for out, g in (got, expected)
        ]
        found = errors(*mine)
        assert max(found.values()) < 0.02, (strengths[row, head], found)  # as above


@pytest.mark.ci
@pytest.mark.parametrize(
    'name',
    by_hand(
        ('scalar', 'scalar_long', 'wide_values', 'vector', 'vector_wide', 'bonus'),
        ('scalar_long', 'wide_values'),
    ),
)
def test_small_integers_give_exact_gradients(name, monkeypatch):
    """Without rounding the flow through decays, a sum of differences, has no error at all."""
    arrays, ids = inputs(name, seed=6)
    rng = np.random.default_rng(7)
    for n, x in arrays.items():
        few = rng.integers(-1, 2, size=x.shape) * (rng.random(x.shape) < 0.2)
        arrays[n] = few.astype(x.dtype)
    arrays['log_decay'] *= 0

    def loss(arrays, segments, implementation):
        o, last = linear_recurrence(
            **arrays, segment_ids=segments, return_state=True, implementation=implementation
        )
        pick = np.random.default_rng(8)
        few = [pick.integers(-1, 2, x.shape) * (pick.random(x.shape) < 0.2) for x in (o, last)]
        return jnp.sum(o.astype(last.dtype) * few[0]) + jnp.sum(last * few[1]), (o, last)

    monkeypatch.setitem(globals(), 'loss', loss)
    found = errors(run(arrays, ids), truth(arrays, ids))
    # Outputs, and gradients of q, k and v, are rounded to bfloat16 where they leave.
    assert found.pop('log_decay') < 1e-6 and max(found.values()) < 3e-3, found


@pytest.mark.ci
@pytest.mark.parametrize(
    'name', [*FAST, 'bonus', pytest.param('bonus_filled_up', marks=pytest.mark.slow)]
)
def test_documents_do_not_meet_and_padding_is_never_read(name):
    """Other documents change nothing, to the bit; nor does what padding holds; of one head."""
    arrays, ids = inputs(name, seed=5)
    for n, axis in (('v', 2), ('log_decay', 2), ('initial_state', 1), ('bonus', 0)):
        if n in arrays:
            arrays[n] = arrays[n].take([0], axis)
    one = ids == ids[0, -1]
    other = dict(arrays)
    for n in ('q', 'k', 'v', 'log_decay'):
        rest = ~one.reshape(*ids.shape, *[1] * (arrays[n].ndim - 2))
        other[n] = np.where(rest, -arrays[n] / 2 if n != 'log_decay' else -0.5, arrays[n])
        padding = (ids == 0).reshape(rest.shape)
        other[n] = np.where(padding, np.nan, other[n]).astype(arrays[n].dtype)
    both = program()
    (o, last), grads = run(arrays, ids, both=both)
    (o_other, last_other), grads_other = run(other, ids, both=both)
    np.testing.assert_array_equal(np.asarray(last), np.asarray(last_other))
    np.testing.assert_array_equal(np.asarray(o)[one], np.asarray(o_other)[one])
    for n in 'qkv':
        np.testing.assert_array_equal(np.asarray(grads[n])[one], np.asarray(grads_other[n])[one])
    assert all(np.all(np.isfinite(np.float32(x))) for x in jax.tree.leaves((o_other, grads_other)))


def shapes(batch, length, heads, groups, key_dim, value_dim, dtype='bfloat16', vector=False):
    """Abstract arguments of a call with decays a token, documents and an initial state."""
    array = jax.ShapeDtypeStruct
    qk = array((batch, length, groups, key_dim), dtype)
    arrays = {
        'q': qk,
        'k': qk,
        'v': array((batch, length, heads, value_dim), dtype),
        'log_decay': array((batch, length, heads, key_dim)[: 3 + vector], jnp.float32),
        'initial_state': array((batch, heads, key_dim, value_dim), jnp.float32),
    }
    return arrays, array((batch, length), jnp.int32)


# Products through shared memory are for the interpreter: lowered for one shape. Of the sizes, the
# least and the most of keys and values; `test_plans_fit` has those between.
LOWERED = [
    pytest.param((1, 300, 2, 2, k, v), staged, marks=marks)
    for k in (64, 128, 256)
    for v in (64, 256, 512)
    for staged in (False, True)
    for outer in [k != 128 and v != 256]
    for marks in [pytest.mark.ci if outer and not staged else pytest.mark.slow]
]


@pytest.mark.parametrize(
    ('dims', 'staged'),
    [
        ((2, 300, 4, 2, 128, 128), False),
        pytest.param((2, 300, 4, 2, 128, 128), True, marks=pytest.mark.ci),
        *LOWERED,
    ],
)
@pytest.mark.parametrize('vector', [False, True])
def test_lowers_for_cuda(dims, vector, staged, monkeypatch):
    """This decides on layouts and sees whether shared memory is enough."""
    monkeypatch.setattr(hopper, 'STAGED', staged)
    f = jax.value_and_grad(lambda *a: loss(*a, 'pallas_gpu'), has_aux=True)
    with target('gpu'):
        lowered = (
            jax.jit(f).trace(*shapes(*dims, vector=vector)).lower(lowering_platforms=('cuda',))
        )
    # Forward, dv, dq and dk; or walks for o and dv, before each their weights, then all gradients.
    assert lowered.as_text().count('custom_call @mosaic_gpu') == (5 if vector else 4)


@pytest.mark.ci
@pytest.mark.parametrize('name', ['head', 'rows'])
def test_decays_that_nothing_trains_cost_nothing(name, monkeypatch):
    """The other gradients are the same, and no walk keeps states or sums up products."""
    arrays, ids = inputs(name)
    arrays = {n: x if n == 'log_decay' and name == 'head' else x[:1] for n, x in arrays.items()}
    ids = None if ids is None else ids[:1]
    fixed = {n: arrays.pop(n) for n in ('log_decay', 'initial_state')}

    def f(arrays, decay):
        given = {**arrays, 'log_decay': decay, 'initial_state': fixed['initial_state']}
        return jnp.sum(jnp.sin(linear_recurrence(**given, segment_ids=ids).astype(jnp.float32)))

    alone = jax.grad(lambda a: f(a, fixed['log_decay']))
    with target('gpu'), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = jax.block_until_ready(jax.jit(alone)(arrays))
        expected = jax.block_until_ready(jax.jit(jax.grad(f, (0, 1)))(arrays, fixed['log_decay']))
    jax.tree.map(np.testing.assert_array_equal, got, expected[0])
    walks, real = [], hopper_kernels.run
    monkeypatch.setattr(
        hopper_kernels, 'run', lambda walk, *rest: (walks.append(walk), real(walk, *rest))[1]
    )
    with target('gpu'):
        jax.eval_shape(alone, arrays)
        assert len(walks) == 4 and not any(walk.save or walk.like for walk in walks)
        jax.eval_shape(jax.grad(f, 1), arrays, fixed['log_decay'])
    assert [bool(walk.save) for walk in walks[4:]] == [True, True, False, False]
    assert [walk.like for walk in walks[4:]] == [False, False, True, True]


@pytest.mark.ci
@pytest.mark.parametrize('vector', [False, pytest.param(True, marks=pytest.mark.ci)])
@pytest.mark.parametrize('remat', [False, True])
def test_lowers_under_vmap_and_remat(remat, vector):
    """As studies run it, a lane a seed."""
    arrays, _ = shapes(2, 128, 2, 2, 64, 64, vector=vector)

    def f(arrays):
        named = functools.partial(linear_recurrence, implementation='pallas_gpu')
        run = lambda a: jnp.sum(named(**a).astype(jnp.float32))  # noqa: E731
        return (jax.checkpoint(run) if remat else run)(arrays)

    lanes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), arrays)
    with target('gpu'):
        traced = jax.jit(jax.vmap(jax.grad(f))).trace(lanes)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert last_choice('linear_recurrence')['implementation'] == 'pallas_gpu'
    assert text.count('@mosaic_gpu_v2(') >= 4


@pytest.mark.parametrize('key_dim', range(64, 257, 64))
@pytest.mark.parametrize('value_dim', [64, 128, 512])
def test_plans_fit(key_dim, value_dim):
    for decay in ('none', 'scalar', 'vector'):
        plan = hopper_plan.plan_for(4, 2, key_dim, value_dim, decay=decay)
        walks = [f(save=save) for f in (plan.forward, plan.values) for save in (False, True)]
        for reverse in (False, True):
            walks += [plan.queries(reverse=reverse, like=like) for like in (False, True)]
        for found in walks:
            assert found.shared_bytes <= hopper_plan.SHARED
            # A reader waits on the same barriers again and again, as their phases demand.
            assert not found.stages % found.readers and not found.slots % found.readers
            assert sum(found.registers) + (found.readers - 1) * found.registers[0] <= 512
        if decay != 'vector':
            assert plan.states().shared_bytes <= hopper_plan.SHARED


@pytest.mark.parametrize('dims', [(2, 300, 4, 2, 64, 64), (1, 40, 6, 1, 128, 200)])
@pytest.mark.parametrize(
    'decay, bonus, cut',
    [('scalar', False, 1), ('scalar', False, 4), ('vector', False, 1), ('vector', True, 1)],
)
def test_costs_against_the_walk(dims, decay, bonus, cut, monkeypatch):
    monkeypatch.setattr(hopper, 'stretches', lambda *_: cut)
    arrays, _ = shapes(*dims, vector=decay == 'vector')
    batch, length, heads, groups, key_dim, value_dim = dims
    if bonus:
        arrays['bonus'] = jax.ShapeDtypeStruct((heads, key_dim), jnp.float32)
    f = functools.partial(linear_recurrence, implementation='pallas_gpu')
    with target('gpu'):
        walked = walk(lambda a: f(**a), arrays, strict=True)
        both = walk(jax.grad(lambda a: jnp.sum(f(**a).astype(jnp.float32))), arrays, strict=True)
    kind = {'decay': decay, 'bonus': bonus, 'groups': groups, 'stretches': cut}
    expected = cost.executed_flops('pallas_gpu', batch, length, heads, key_dim, value_dim, **kind)
    assert walked.total == expected
    facts = {'decay': decay, 'strict': bonus, 'stretches': cut}
    plan = hopper_plan.plan_for(heads, groups, key_dim, value_dim, **facts)
    chunks = batch * cut * -(-length // (cut * hopper_plan.CHUNK))
    assert both.kind('kernel') == chunks * (plan.forward_flops + plan.backward_flops)


def test_what_cannot_run_is_said(monkeypatch):
    def refusal(implementation=None, **kw):
        arrays, _ = shapes(1, 64, 2, 2, 64, 64)
        f = functools.partial(linear_recurrence, implementation=implementation)
        with target('gpu'):
            jax.eval_shape(lambda a: f(**a), {**arrays, **kw})
        chosen = last_choice('linear_recurrence')
        why = chosen['refused'].get('pallas_gpu')
        assert chosen['implementation'] == ('xla' if why else 'pallas_gpu')
        return why

    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    assert refusal() is None
    wide = {n: like(1, 64, 2, 64, dtype=jnp.float32) for n in 'qkv'}
    assert refusal(**wide) == 'it takes bfloat16, not float32'
    vector = like(1, 64, 2, 64, dtype=jnp.float32)
    assert refusal(log_decay=vector) is None
    bonus = like(2, 64, dtype=jnp.float32)
    assert refusal(bonus=bonus) == 'it has a bonus only beside a decay of each key dimension'
    large = {n: like(1, 64, 2, 320) for n in 'qk'}
    state = like(1, 2, 320, 64, dtype=jnp.float32)
    assert refusal(**large, initial_state=state) == 'K = 320 is more than 256'
    empty = like(0, 64, 2, 64)
    with target('gpu'):
        assert 'no empty arrays' in hopper.refuse(empty, empty, 'none', False)
    mesh = jax.sharding.AbstractMesh((2,), ('data',))
    with jax.sharding.use_abstract_mesh(mesh):
        assert 'along the mesh axes data: call it in a shard_map' in refusal()
    x = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(ValueError, match='cannot run as .pallas_gpu.: it needs a Hopper GPU, not'):
        linear_recurrence(x, x, x, implementation='pallas_gpu')
