"""RWKV-7's recurrence on Hopper GPUs: in the GPU interpreter against float64, lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.costs import walk
from effjax.kernels import dplr, last_choice, target
from effjax.kernels.dplr import cost, hopper, hopper_plan

NAMES = ('q', 'k', 'v', 'read', 'write', 'log_decay')
# (B, T, H, K, V), documents
CASES = {
    'packed': ((1, 130, 1, 64, 64), True),
    'heads': ((2, 70, 2, 64, 64), False),
    'long': ((1, 330, 1, 64, 64), False),
    'filled_up': ((1, 70, 1, 40, 72), True),
    'wide': ((1, 130, 1, 128, 128), True),
}


def inputs(name, seed=0, strength=0.3):
    """(a dict of arrays as RWKV-7 has them, segment ids or None)."""
    (batch, length, heads, key_dim, value_dim), documents = CASES[name]
    rng = np.random.default_rng(seed)
    shape = batch, length, heads, key_dim
    read = rng.normal(size=shape)
    read /= np.linalg.norm(read, axis=-1, keepdims=True)
    out = {
        'q': rng.normal(size=shape) / key_dim**0.5,
        'k': rng.normal(size=shape) / key_dim**0.5,
        'v': rng.normal(size=(*shape[:3], value_dim)),
        'read': read,
        'write': -read * rng.uniform(size=shape),
    }
    out = {n: np.asarray(jnp.bfloat16(x)) for n, x in out.items()}
    out['log_decay'] = -rng.exponential(strength, size=shape).astype(np.float32)
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
    o, last = dplr(**arrays, segment_ids=segments, return_state=True, implementation=implementation)
    rng = np.random.default_rng(9)
    weights = [rng.normal(size=x.shape).astype(np.float32) for x in (o, last)]
    return jnp.sum(o.astype(last.dtype) * weights[0]) + jnp.sum(last * weights[1]), (o, last)


def run(arrays, segments, implementation='pallas_gpu', races=False):
    """((o, last), gradients)."""
    both = jax.value_and_grad(functools.partial(loss, implementation=implementation), has_aux=True)
    if implementation != 'pallas_gpu':
        (_, out), grads = jax.jit(both)(arrays, segments)
        return out, grads
    params = plgpu.InterpretGPUParams(detect_races=races)
    with target('gpu'), plgpu.force_gpu_interpret_mode(params):
        (_, out), grads = jax.block_until_ready(jax.jit(both)(arrays, segments))
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


@pytest.mark.ci
@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_in_the_interpreter(name):
    arrays, ids = inputs(name)
    got = run(arrays, ids, races=name in ('packed', 'wide'))
    (o, last), grads = got
    assert all(grads[n].dtype == jnp.bfloat16 for n in NAMES[:5]) and o.dtype == jnp.bfloat16
    assert last.dtype == grads['log_decay'].dtype == grads['initial_state'].dtype == jnp.float32
    found = errors(got, truth(arrays, ids))
    # 8 bits of each factor. The gradient of a decay is a sum of differences of such products.
    assert found.pop('log_decay') < 0.015
    assert max(found.values()) < 8e-3, found
    if ids is not None:
        assert not any(np.any(np.asarray(grads[n])[ids == 0]) for n in NAMES)
        assert not np.any(np.asarray(o)[ids == 0])


@pytest.mark.ci
def test_values_alone():
    """Without a backward pass, nothing is kept for one; `read` and `write` may be float32."""
    arrays, ids = inputs('packed', seed=3)
    expected = truth(arrays, ids)[0]
    arrays |= {n: arrays[n].astype(np.float32) for n in ('read', 'write')}
    params = plgpu.InterpretGPUParams(detect_races=True)
    with target('gpu'), plgpu.force_gpu_interpret_mode(params):
        got = jax.jit(lambda a: loss(a, ids, 'pallas_gpu')[1])(arrays)
    for a, b in zip(got, expected, strict=True):
        assert np.linalg.norm(np.float64(a) - b) < 6e-3 * np.linalg.norm(b)


@pytest.mark.ci
@pytest.mark.parametrize('strength', [0.0, -50.0, -np.inf])
def test_one_key_throughout_and_extreme_decays(strength):
    """Every third token decays by so much, the others a little; each takes out the whole value."""
    arrays, _ = inputs('packed', seed=4)
    read = np.broadcast_to(arrays['read'][:, :1], arrays['read'].shape)
    arrays |= {'read': read, 'write': -read, 'k': read}
    arrays['log_decay'][:, ::3] = strength
    got = run(arrays, None)
    finite = {**arrays, 'log_decay': np.maximum(arrays['log_decay'], -1e4)}
    expected = truth(finite, None)
    found = errors(got, expected)
    # Where each token replaces all that a key holds, little is left of what is rounded.
    assert found.pop('log_decay') < 0.05
    assert max(found.values()) < 0.03, found


@pytest.mark.ci
def test_documents_do_not_meet_and_padding_is_never_read():
    """Other documents change nothing, to the bit; nor does what padding holds."""
    arrays, ids = inputs('packed', seed=5)
    one = ids == ids[0, -1]
    other = dict(arrays)
    for n in NAMES:
        rest = ~one.reshape(*ids.shape, 1, 1)
        other[n] = np.where(rest, -0.5 if n == 'log_decay' else arrays[n] / 2, arrays[n])
        padding = (ids == 0).reshape(rest.shape)
        other[n] = np.where(padding, np.nan, other[n]).astype(arrays[n].dtype)
    (o, last), grads = run(arrays, ids)
    (o_other, last_other), grads_other = run(other, ids)
    np.testing.assert_array_equal(np.asarray(last), np.asarray(last_other))
    np.testing.assert_array_equal(np.asarray(o)[one], np.asarray(o_other)[one])
    for n in NAMES[:5]:
        np.testing.assert_array_equal(np.asarray(grads[n])[one], np.asarray(grads_other[n])[one])
    assert all(np.all(np.isfinite(np.float32(x))) for x in jax.tree.leaves((o_other, grads_other)))


def shapes(batch, length, heads, key_dim, value_dim, dtype=jnp.bfloat16):
    """Abstract arguments of a call with an initial state."""
    array = jax.ShapeDtypeStruct
    tokens = batch, length, heads
    keys, state = array((*tokens, key_dim), dtype), (batch, heads, key_dim, value_dim)
    arrays = dict.fromkeys(('q', 'k', 'read', 'write'), keys)
    arrays['v'] = array((*tokens, value_dim), dtype)
    arrays['log_decay'] = array((*tokens, key_dim), jnp.float32)
    arrays['initial_state'] = array(state, jnp.float32)
    return arrays, array((batch, length), jnp.int32)


@pytest.mark.ci
@pytest.mark.parametrize(
    'dims', [(2, 300, 4, 64, 64), *((1, 300, 2, k, v) for k, v in ((64, 256), (128, 64)))]
)
def test_lowers_for_cuda(dims):
    """This decides on layouts and sees whether shared memory is enough."""
    f = jax.value_and_grad(lambda *a: loss(*a, 'pallas_gpu'), has_aux=True)
    with target('gpu'):
        lowered = jax.jit(f).trace(*shapes(*dims)).lower(lowering_platforms=('cuda',))
    # The systems and the walk, and again backwards, what transitions read, and what comes after.
    assert lowered.as_text().count('custom_call @mosaic_gpu') == 6


@pytest.mark.ci
@pytest.mark.parametrize('remat', [False, True])
def test_lowers_under_vmap_and_remat(remat):
    """As studies run it, a lane a seed."""
    arrays, _ = shapes(2, 128, 2, 64, 64)

    def f(arrays):
        run = lambda a: jnp.sum(  # noqa: E731
            dplr(**a, implementation='pallas_gpu').astype(jnp.float32)
        )
        return (jax.checkpoint(run) if remat else run)(arrays)

    lanes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), arrays)
    with target('gpu'):
        traced = jax.jit(jax.vmap(jax.grad(f))).trace(lanes)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('@mosaic_gpu_v2(') >= 5


@pytest.mark.parametrize('key_dim', (64, 128))
@pytest.mark.parametrize('value_dim', [64, 128, 512])
def test_plans_fit(key_dim, value_dim):
    plan = hopper_plan.plan_for(4, key_dim, value_dim)
    room = hopper_plan.SHARED
    assert max(plan.system_bytes, plan.gradients_bytes) <= room
    for save in (False, True):
        assert plan.forward(save=save).shared_bytes <= room
        assert plan.values(save=save).shared_bytes <= room


@pytest.mark.parametrize('dims', [(2, 300, 4, 64, 64), (1, 40, 3, 128, 200)])
def test_costs_against_the_walk(dims):
    arrays, _ = shapes(*dims)
    f = functools.partial(dplr, implementation='pallas_gpu')
    with target('gpu'):
        walked = walk(lambda a: f(**a), arrays, strict=True)
        both = walk(jax.grad(lambda a: jnp.sum(f(**a).astype(jnp.float32))), arrays, strict=True)
    assert walked.total == cost.executed_flops('pallas_gpu', *dims)
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
            jax.eval_shape(lambda a: dplr(**a), arrays)
        chosen = last_choice('dplr')
        why = chosen['refused'].get('pallas_gpu')
        assert chosen['implementation'] == ('xla' if why else 'pallas_gpu')
        return why

    assert refusal() is None and refusal(read='float32') is None
    assert refusal(v='float32') == 'it takes bfloat16, not float32'
    assert refusal(192, 64) == 'K = 192 is more than 128'
    empty = jax.ShapeDtypeStruct((0, 64, 2, 64), jnp.bfloat16)
    with target('gpu'):
        assert 'no empty arrays' in hopper.refuse(empty, empty, empty)
    mesh = jax.sharding.AbstractMesh((2,), ('data',))
    with jax.sharding.use_abstract_mesh(mesh):
        assert 'along the mesh axes data: call it in a shard_map' in refusal()
    x = np.zeros((1, 4, 1, 4), np.float32)
    with pytest.raises(ValueError, match='cannot run as .pallas_gpu.: it needs a Hopper GPU, not'):
        dplr(x, x, x, x, x, x, implementation='pallas_gpu')
    with pytest.raises(ValueError, match='pallas_gpu has no plan for'):
        cost.executed_flops('pallas_gpu', 1, 64, 1, 4096, 4096)
