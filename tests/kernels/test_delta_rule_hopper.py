"""The delta rule on Hopper GPUs: in the GPU interpreter against float64, lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.costs import walk
from effjax.kernels import delta_rule, last_choice, target
from effjax.kernels.delta_rule import cost, hopper, hopper_plan, hopper_system

# (B, T, H, K, V), whether it decays, documents
CASES = {
    'gated': ((1, 130, 1, 64, 64), True, True),
    'heads': ((2, 150, 2, 64, 128), True, True),
    'gated_long': ((1, 330, 1, 64, 64), True, False),
    'plain': ((2, 100, 1, 64, 64), False, False),
    'plain_documents': ((1, 100, 2, 64, 64), False, True),
    'filled_up': ((1, 70, 1, 40, 72), True, True),
    'wide_keys': ((1, 130, 1, 256, 64), True, False),
    'wide_values': ((1, 130, 1, 128, 512), True, True),
}


def inputs(name, seed=0, strength=0.1):
    """(a dict of arrays, segment ids or None); keys have norm 1."""
    (batch, length, heads, key_dim, value_dim), decay, documents = CASES[name]
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(batch, length, heads, key_dim))
    out = {
        'q': rng.normal(size=(batch, length, heads, key_dim)) / key_dim**0.5,
        'k': k / np.linalg.norm(k, axis=-1, keepdims=True),
        'v': rng.normal(size=(batch, length, heads, value_dim)),
    }
    out = {n: np.asarray(jnp.bfloat16(x)) for n, x in out.items()}
    out['beta'] = rng.uniform(0.05, 1.9, size=(batch, length, heads)).astype(np.float32)
    if decay:
        out['log_decay'] = -rng.exponential(strength, size=out['beta'].shape).astype(np.float32)
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
    o, last = delta_rule(
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


# By hand what differs of the others in one thing that another case has.
BY_HAND = ('gated_long', 'plain')
EVERY = [pytest.param(n, marks=[pytest.mark.slow] if n in BY_HAND else []) for n in CASES]


@pytest.mark.ci
@pytest.mark.parametrize('name', EVERY)
def test_values_and_gradients_in_the_interpreter(name):
    arrays, ids = inputs(name)
    got = run(arrays, ids, races=name in ('gated', 'wide_keys'))
    (o, last), grads = got
    assert o.dtype == grads['q'].dtype == grads['k'].dtype == grads['v'].dtype == jnp.bfloat16
    assert last.dtype == grads['beta'].dtype == grads['initial_state'].dtype == jnp.float32
    found = errors(got, truth(arrays, ids))
    # 8 bits of each factor. The gradient of a decay is a sum of differences of such products.
    assert found.pop('log_decay', 0.0) < 0.03
    assert max(found.values()) < 6e-3, found
    if ids is not None:
        assert not any(np.any(np.asarray(grads[n])[ids == 0]) for n in ('q', 'k', 'v', 'beta'))
        assert not np.any(np.asarray(o)[ids == 0])


@pytest.mark.ci
def test_one_key_throughout_and_extreme_decays():
    """Every third token decays by so much, the others a little; each replaces the whole value."""
    arrays, _ = inputs('heads', seed=4)
    arrays = {n: x if n == 'initial_state' else x[:, :100] for n, x in arrays.items()}
    arrays['k'] = np.broadcast_to(arrays['k'][:, :1], arrays['k'].shape)
    arrays['beta'] = np.ones_like(arrays['beta'])
    strengths = np.float32([[0.0, -1e-4], [-50.0, -np.inf]])  # by row and head
    arrays['log_decay'][:, ::3] = strengths[:, None]
    got = run(arrays, None)
    expected = truth({**arrays, 'log_decay': np.maximum(arrays['log_decay'], -1e4)}, None)
    # Where each token replaces all that a key holds, little is left of what is rounded, and of what
    # flows through decays hardly anything: what is found is the rounding of terms of order 10.
    gradients = (grads.pop('log_decay') for _, grads in (got, expected))
    np.testing.assert_allclose(*gradients, atol=0.3)
    for row, head in np.ndindex(2, 2):
        # Each by itself, so that a larger one hides nothing.
        at = lambda x: x[row, head] if x.shape[1] == 2 else x[row, :, head]  # noqa: B023, E731
        found = errors(*(jax.tree.map(at, x) for x in (got, expected)))
        assert max(found.values()) < 0.03, (strengths[row, head], found)


@pytest.mark.ci
def test_documents_do_not_meet_and_padding_is_never_read():
    """Other documents change nothing, to the bit; nor does what padding holds."""
    arrays, ids = inputs('gated', seed=5)
    one = ids == ids[0, -1]
    other = dict(arrays)
    for n in ('q', 'k', 'v', 'beta', 'log_decay'):
        rest = ~one.reshape(*ids.shape, *[1] * (arrays[n].ndim - 2))
        other[n] = np.where(rest, -0.5 if n == 'log_decay' else arrays[n] / 2, arrays[n])
        padding = (ids == 0).reshape(rest.shape)
        other[n] = np.where(padding, np.nan, other[n]).astype(arrays[n].dtype)
    both = program()
    (o, last), grads = run(arrays, ids, both=both)
    (o_other, last_other), grads_other = run(other, ids, both=both)
    np.testing.assert_array_equal(np.asarray(last), np.asarray(last_other))
    np.testing.assert_array_equal(np.asarray(o)[one], np.asarray(o_other)[one])
    for n in ('q', 'k', 'v', 'beta'):
        np.testing.assert_array_equal(np.asarray(grads[n])[one], np.asarray(grads_other[n])[one])
    assert all(np.all(np.isfinite(np.float32(x))) for x in jax.tree.leaves((o_other, grads_other)))


@pytest.mark.parametrize(
    'kind', ['any', *(pytest.param(k, marks=pytest.mark.ci) for k in ('one_key', 'one_key_twice'))]
)
def test_inverse(kind):
    """One key throughout and beta 1, or 2, are the hardest systems: powers of A are huge."""
    size, dim = hopper_plan.CHUNK, 64
    rng = np.random.default_rng(3)
    k = rng.normal(size=(size, dim))
    k = k[:1].repeat(size, 0) if kind != 'any' else k
    k = np.asarray(jnp.bfloat16(k / np.linalg.norm(k, axis=1, keepdims=True)))
    beta = np.full(size, 2.0 if kind == 'one_key_twice' else 1.0, np.float32)
    rows = np.stack([np.zeros(size)] * 2 + [np.ones(size)] * 2 + [beta]).astype(np.float32)
    plan = hopper_plan.plan_for(1, dim, dim)
    x = k[None, :, None]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        solved = jax.jit(functools.partial(hopper_system.solve, plan))(x, x, rows[None, None, None])
    wide = k.astype(np.float64)
    expected = np.linalg.inv(np.eye(size) + np.tril(beta[:, None] * (wide @ wide.T), -1))
    # It is rounded to bfloat16 where it leaves, and so is what it multiplied, from sums of such.
    found = np.asarray(solved.inverse, np.float64)[0, 0, 0]
    np.testing.assert_allclose(found, expected, atol=2**-8 * np.abs(expected).max())
    values = np.asarray(solved.values, np.float64)[0, :, 0]
    np.testing.assert_allclose(values, expected @ (beta[:, None] * wide), atol=0.03)


def shapes(batch, length, heads, key_dim, value_dim, dtype=jnp.bfloat16):
    """Abstract arguments of a call with decays, documents and an initial state."""
    array = jax.ShapeDtypeStruct
    tokens = batch, length, heads
    qk, one = array((*tokens, key_dim), dtype), array(tokens, jnp.float32)
    v, state = array((*tokens, value_dim), dtype), (batch, heads, key_dim, value_dim)
    arrays = {'q': qk, 'k': qk, 'v': v, 'beta': one, 'log_decay': one}
    arrays['initial_state'] = array(state, jnp.float32)
    return arrays, array((batch, length), jnp.int32)


@pytest.mark.parametrize(
    'dims',
    [
        (2, 300, 4, 128, 128),
        *(
            # The least and the most of each, and one between; `test_plans_fit` has the others.
            pytest.param((1, 300, 2, k, v), marks=pytest.mark.ci if ends else pytest.mark.slow)
            for k in (64, 192, 256)
            for v in (64, 256, 512)
            for ends in [(k == 192) == (v == 256)]
        ),
    ],
)
def test_lowers_for_cuda(dims):
    """This decides on layouts and sees whether shared memory is enough."""
    f = jax.value_and_grad(lambda *a: loss(*a, 'pallas_gpu'), has_aux=True)
    with target('gpu'):
        lowered = jax.jit(f).trace(*shapes(*dims)).lower(lowering_platforms=('cuda',))
    # The system, both walks, and what comes after them.
    assert lowered.as_text().count('custom_call @mosaic_gpu') == 4


@pytest.mark.ci
@pytest.mark.parametrize('remat', [pytest.param(False, marks=pytest.mark.ci), True])
def test_lowers_under_vmap_and_remat(remat):
    """As studies run it, a lane a seed."""
    arrays, _ = shapes(2, 128, 2, 64, 64)

    def f(arrays):
        run = lambda a: jnp.sum(  # noqa: E731
            delta_rule(**a, implementation='pallas_gpu').astype(jnp.float32)
        )
        return (jax.checkpoint(run) if remat else run)(arrays)

    lanes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), arrays)
    with target('gpu'):
        traced = jax.jit(jax.vmap(jax.grad(f))).trace(lanes)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('@mosaic_gpu_v2(') >= 4


@pytest.mark.parametrize('key_dim', range(64, 257, 64))
@pytest.mark.parametrize('value_dim', [64, 128, 512])
def test_plans_fit(key_dim, value_dim):
    plan = hopper_plan.plan_for(4, key_dim, value_dim)
    assert plan.system_bytes <= hopper_plan.SHARED
    for reverse in (False, True):
        for save in (False, True):
            assert plan.walk(reverse=reverse, save=save).shared_bytes <= hopper_plan.SHARED


@pytest.mark.parametrize('decay', [True, False])
@pytest.mark.parametrize('dims', [(2, 300, 4, 64, 64), (1, 40, 3, 128, 200)])
def test_costs_against_the_walk(dims, decay):
    arrays, _ = shapes(*dims)
    if not decay:
        del arrays['log_decay']
    f = functools.partial(delta_rule, implementation='pallas_gpu')
    with target('gpu'):
        walked = walk(lambda a: f(**a), arrays, strict=True)
        both = walk(jax.grad(lambda a: jnp.sum(f(**a).astype(jnp.float32))), arrays, strict=True)
    assert walked.total == cost.executed_flops('pallas_gpu', *dims, decay=decay)
    batch, length, heads, key_dim, value_dim = dims
    plan = hopper_plan.plan_for(heads, key_dim, value_dim)
    chunks = batch * -(-length // hopper_plan.CHUNK)
    assert both.kind('kernel') == chunks * (plan.forward_flops + plan.backward_flops)


def test_what_cannot_run_is_said():
    def refusal(key_dim=64, value_dim=64, **dtypes):
        arrays, _ = shapes(1, 64, 2, key_dim, value_dim)
        for name, dtype in dtypes.items():
            arrays[name] = jax.ShapeDtypeStruct(arrays[name].shape, dtype)
        with target('gpu'):
            jax.eval_shape(lambda a: delta_rule(**a), arrays)
        chosen = last_choice('delta_rule')
        why = chosen['refused'].get('pallas_gpu')
        assert chosen['implementation'] == ('xla' if why else 'pallas_gpu')
        return why

    assert refusal() is None
    assert refusal(v='float32') == 'it takes bfloat16, not float32'
    assert refusal(320, 64) == 'a state of 320 x 64 is more than 256 x 512'
    assert refusal(64, 640) == 'a state of 64 x 640 is more than 256 x 512'
    empty = jax.ShapeDtypeStruct((0, 64, 2, 64), jnp.bfloat16)
    with target('gpu'):
        assert 'no empty arrays' in hopper.refuse(empty, empty, empty)
    mesh = jax.sharding.AbstractMesh((2,), ('data',))
    with jax.sharding.use_abstract_mesh(mesh):
        assert 'along the mesh axes data: call it in a shard_map' in refusal()
    x = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(ValueError, match='cannot run as .pallas_gpu.: it needs a Hopper GPU, not'):
        delta_rule(x, x, x, x[..., 0], implementation='pallas_gpu')
    with pytest.raises(ValueError, match='pallas_gpu has no plan for'):
        cost.executed_flops('pallas_gpu', 1, 64, 1, 4096, 4096)
