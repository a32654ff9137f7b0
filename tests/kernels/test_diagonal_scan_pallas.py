"""Pallas kernels of the diagonal recurrence: against float64, lowered, compiled ahead."""

import contextlib
import functools

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from effjax.costs import walk
from effjax.costs.products import KernelCall
from effjax.kernels import diagonal_scan, last_choice, target
from effjax.kernels.diagonal_scan import cost, plan

B, T, D = 2, 41, 5
# Documents end at a block's end (16, 32) and inside; padding stands before, between and after.
SEGMENTS = np.repeat(
    np.array([[1, 0, 2, 3, 4, 5], [0, 1, 2, 0, 2, 0]], np.int32), [4, 3, 9, 16, 2, 7], axis=1
)
BOTH = ['pallas_tpu', 'pallas_gpu']


def inputs(seed=0, *, length=T, channels=(D,), is_complex=False, strength=0.3):
    """A dict of float32 or complex64 arrays."""
    rng = np.random.default_rng(seed)
    shape = (B, length, *channels)
    out = {
        'x': rng.normal(size=shape),
        'log_decay': -rng.exponential(strength, size=shape),
        'initial_state': rng.normal(size=(B, *channels)),
    }
    if is_complex:
        out = {n: x + 1j * rng.normal(size=x.shape) for n, x in out.items()}
    return {n: x.astype(np.complex64 if is_complex else np.float32) for n, x in out.items()}


def loss(arrays, segments, reverse, implementation):
    """A number that needs every output and the last state, and both of them."""
    h, last = diagonal_scan(
        **arrays, segment_ids=segments, reverse=reverse, return_state=True,
        implementation=implementation,
    )  # fmt: skip

    def bent(a):
        return jnp.sin(a.real.astype(jnp.float32)) + jnp.cos(2 * a.imag)

    weight = np.random.default_rng(9).normal(size=last.shape).astype(np.float32)
    return jnp.sum(bent(h)) + jnp.sum(bent(last) * weight), (h, last)


@contextlib.contextmanager
def interpreted(implementation):
    """Races raise, and what is unwritten is NaN."""
    if implementation == 'pallas_tpu':
        mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
    else:
        mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
    with target(implementation.removeprefix('pallas_')), mode:
        yield


def program(reverse=False, implementation='reference'):
    """Of `loss`; by itself where it runs several times, since making it takes longest."""
    f = functools.partial(loss, reverse=reverse, implementation=implementation)
    return jax.jit(jax.value_and_grad(f, has_aux=True))


def run(arrays, segments, reverse=False, implementation='reference', both=None):
    """((h, last), gradients)."""
    both = both or program(reverse, implementation)
    if implementation == 'reference':
        (_, out), grads = both(arrays, segments)
    else:
        with interpreted(implementation):
            (_, out), grads = jax.block_until_ready(both(arrays, segments))
    assert last_choice('diagonal_scan')['implementation'] == implementation
    return out, grads


def truth(arrays, segments, reverse=False):
    """The same by the token loop in 64 bits."""
    with jax.enable_x64(True):
        wide = {
            n: jnp.asarray(x, jnp.complex128 if np.iscomplexobj(x) else jnp.float64)
            for n, x in arrays.items()
        }
        return jax.tree.map(np.asarray, run(wide, segments, reverse))


# Without documents and forwards are the tests of many blocks and of extreme decays.
CASES = [
    pytest.param(name, segments, is_complex, reverse, marks=[] if ci else [pytest.mark.slow])
    for name in BOTH
    for segments in (True, False)
    for is_complex in (False, True)
    for reverse in (False, True)
    for ci in [segments or (is_complex and reverse)]
]


@pytest.mark.ci
@pytest.mark.parametrize(('name', 'segments', 'is_complex', 'reverse'), CASES)
def test_values_and_gradients_in_the_interpreter(name, segments, is_complex, reverse, monkeypatch):
    monkeypatch.setattr(plan, 'SHARED', 0)  # rings of two blocks, so that they come round
    monkeypatch.setitem(plan.BLOCKS, 'pallas_tpu', plan.Plan(32, 128))
    arrays, ids = inputs(is_complex=is_complex), SEGMENTS if segments else None
    got, expected = run(arrays, ids, reverse, name), truth(arrays, ids, reverse)
    # float32 sums of about ten terms of order 1, and gradients of some such sums
    chex.assert_trees_all_close(got, expected, atol=2e-5, rtol=1e-5)
    if segments:
        assert not np.any(np.asarray(got[1]['x'])[SEGMENTS == 0])


@pytest.mark.ci
@pytest.mark.parametrize('is_complex', [False, True], ids=['real', 'complex'])
@pytest.mark.parametrize('name', BOTH)
def test_many_blocks_and_dimensions_of_channels(name, is_complex):
    """Two blocks of channels and as many of tokens as the ring's stages (at most 8) and more."""
    length = {'pallas_tpu': 300, 'pallas_gpu': 9 * plan.GPU.size - 5}[name]
    arrays = inputs(1, length=length, channels=(2, 70), is_complex=is_complex)
    got, expected = run(arrays, None, False, name), truth(arrays, None)
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize(
    ('reverse', 'halves', 'bound'),
    [
        (False, ('x',), 2**-8),  # of 8 bits
        pytest.param(True, ('x',), 2**-8, marks=pytest.mark.slow),
        # A gradient that is itself rounded, of the product of two rounded numbers.
        (False, ('x', 'log_decay'), 2**-7),
    ],
)
@pytest.mark.parametrize('name', BOTH)
def test_bfloat16_inputs(name, reverse, halves, bound):
    arrays = inputs(2)
    arrays.update({n: np.asarray(jnp.bfloat16(arrays[n])) for n in halves})
    (h, last), grads = run(arrays, SEGMENTS, reverse, name)
    assert h.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    assert all(grads[n].dtype == arrays[n].dtype for n in arrays)
    expected = truth(arrays, SEGMENTS, reverse)
    (wide_h, wide_last), wide_grads = expected
    # Only what is stored is rounded: the state goes on in float32.
    np.testing.assert_allclose(last, wide_last, atol=1e-5)
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b),
        (h, grads),
        (wide_h, wide_grads),
    )
    assert max(jax.tree.leaves(errors)) < bound, errors


@pytest.mark.ci
@pytest.mark.parametrize('name', BOTH)
def test_extreme_decays_stay_finite_and_right(name):
    """Every third token decays by so much, each channel by its own, the others a little."""
    strengths = np.float32([0.0, -1e-4, -50.0, -3e38, -np.inf])
    arrays = inputs(4)
    arrays['log_decay'][:, ::3] = strengths
    got = run(arrays, None, False, name)
    assert not np.any(np.asarray(got[1]['log_decay'])[:, ::3][..., strengths < -100])
    finite = {**arrays, 'log_decay': np.maximum(arrays['log_decay'], -1e4)}
    chex.assert_trees_all_close(got, truth(finite, None), atol=2e-5, rtol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize('name', BOTH)
def test_padding_is_never_read_and_a_row_of_padding_keeps_its_state(name):
    arrays, at = inputs(5), (SEGMENTS == 0)[..., None]
    noisy = {**arrays, **{n: np.where(at, np.nan, arrays[n]) for n in ('x', 'log_decay')}}
    both = program(False, name)
    clean, dirty = (run(a, SEGMENTS, False, name, both) for a in (arrays, noisy))
    chex.assert_trees_all_equal(clean[0], dirty[0])
    chex.assert_trees_all_equal(clean[1]['x'], dirty[1]['x'])
    (h, last), _ = run(arrays, np.zeros((B, T), np.int32), False, name, both)
    np.testing.assert_array_equal(last, arrays['initial_state'])
    assert not np.any(h)


@pytest.mark.ci
def test_under_vmap_scan_and_remat(monkeypatch):
    """As models call it: stacked layers that recompute, seeds side by side."""
    # The interpreter of TPU kernels has side effects, which rematerialisation refuses.
    monkeypatch.setattr(pl, 'pallas_call', functools.partial(pl.pallas_call, interpret=True))
    arrays = inputs(6)

    def model(implementation, x, log_decay):
        def layer(x, _):
            f = functools.partial(diagonal_scan, implementation=implementation)
            return x + f(x, log_decay, segment_ids=SEGMENTS) / 8, None

        saved = jax.checkpoint_policies.save_only_these_names('diagonal_scan_out')
        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=saved), x, length=2)
        return jnp.sum(jnp.sin(x))

    args = [np.stack([arrays[n], arrays[n] / 2]) for n in ('x', 'log_decay')]

    def grads(name):
        return jax.jit(jax.vmap(jax.grad(functools.partial(model, name), (0, 1))))

    expected = grads('xla')(*args)
    with target('tpu'):
        got = jax.block_until_ready(grads('pallas_tpu')(*args))
    chex.assert_trees_all_close(got, expected, atol=2e-5, rtol=1e-5)
    with target('gpu'):  # lowered only
        grads('pallas_gpu').trace(*args).lower(lowering_platforms=('cuda',))


@pytest.mark.ci
def test_seeds_side_by_side_on_a_gpu():
    """Under vmap, as studies run them: lowered, and right in the interpreter."""
    arrays, ids = inputs(7), SEGMENTS

    def f(name):
        return lambda a: loss(a, ids, False, name)

    def both(name):
        return jax.jit(jax.vmap(jax.value_and_grad(f(name), has_aux=True)))

    seeds = {n: np.stack([x, x / 2]) for n, x in arrays.items()}
    with target('gpu'):
        lowered = both('pallas_gpu').trace(seeds).lower(lowering_platforms=('cuda',))
    assert lowered.as_text().count('custom_call @mosaic_gpu') == 2
    with interpreted('pallas_gpu'):
        got = jax.block_until_ready(both('pallas_gpu')(seeds))
    # float32 sums of about ten terms of order 1, and gradients of some such sums
    chex.assert_trees_all_close(got, both('reference')(seeds), atol=3e-5, rtol=1e-5)


def shapes(batch, length, channels, dtype='float32', sharding=None):
    """Abstract arguments of a call with an initial state, and documents."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    wide = jnp.promote_types(dtype, jnp.float32)
    arrays = {
        'x': array((batch, length, channels), dtype),
        'log_decay': array((batch, length, channels), wide),
        'initial_state': array((batch, channels), wide),
    }
    return arrays, array((batch, length), jnp.int32)


@pytest.mark.parametrize(
    ('name', 'platform', 'call'),
    [('pallas_tpu', 'tpu', 'tpu_custom_call'), ('pallas_gpu', 'cuda', '@mosaic_gpu')],
)
@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('complex64', marks=pytest.mark.ci)])
def test_lowers(name, platform, call, dtype):
    """For a GPU this decides on layouts and sees whether shared memory is enough."""
    f = jax.value_and_grad(lambda *a: loss(*a, False, name), has_aux=True)
    with target(name.removeprefix('pallas_')):
        lowered = (
            jax.jit(f).trace(*shapes(2, 300, 200, dtype)).lower(lowering_platforms=(platform,))
        )
        assert last_choice('diagonal_scan')['implementation'] == name
    assert lowered.as_text().count(f'custom_call {call}' if platform == 'cuda' else call) == 2


@pytest.mark.parametrize('name', BOTH)
def test_whole_blocks_of_real_numbers_go_to_the_kernel_as_they_are(name):
    """Then nothing beside it goes over memory."""
    arrays, _ = shapes(2, 256, 256)

    def f(x, log_decay):
        return jax.vjp(functools.partial(diagonal_scan, implementation=name), x, log_decay)[1](x)

    with target(name.removeprefix('pallas_')):
        made = jax.make_jaxpr(f)(arrays['x'], arrays['log_decay'])
    found = set()

    def look(jaxpr):
        for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
            inner = list(jax.extend.core.jaxprs_in_params(eqn.params))
            if eqn.primitive.name in ('pallas_call', 'core_map', 'mpmd_map'):
                found.add('kernel')
            elif inner:
                for each in inner:
                    look(each)
            elif any(v.aval.size >= 2 * 256 * 256 for v in eqn.outvars):
                found.add(eqn.primitive.name)

    look(made)
    # Those beside it change nothing here: no ends are filled up or cut off.
    assert {'kernel'} <= found <= {'kernel', 'pad', 'slice', 'name', 'reshape'}


# The second has the least memory for a kernel; the third, by hand, as much as the first.
CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
AHEAD = [  # all for the first chip, the first for the others too
    ((8, 4096, 2048), 'float32'),
    ((8, 4096, 2048), 'bfloat16'),
    ((2, 1000, 1300), 'complex64'),
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
def test_compiles_for_a_tpu_ahead(topology, dims, dtype, tpu_sharding):
    args = shapes(*dims, dtype, sharding=tpu_sharding(topology))
    f = jax.value_and_grad(lambda *a: loss(*a, False, 'pallas_tpu'), has_aux=True)
    with target('tpu'):
        compiled = jax.jit(f).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    # Decays, what is written, the gradients of h and of both, and a copy in whole blocks.
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(args[0])]
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * max(sizes)


@pytest.mark.parametrize('is_complex', [False, True], ids=['real', 'complex'])
@pytest.mark.parametrize('name', BOTH)
def test_costs_against_the_walk(name, is_complex):
    arrays, _ = shapes(2, 300, 200, 'complex64' if is_complex else 'float32')
    f = functools.partial(diagonal_scan, implementation=name)
    with target(name.removeprefix('pallas_')):
        walked = walk(lambda a: f(**a), arrays, strict=True)
        both = walk(jax.grad(lambda a: jnp.sum(f(**a).real)), arrays, strict=True)
    expected = cost.executed_flops(name, 2, 300, 200, is_complex=is_complex)
    assert walked.total == expected
    assert both.kind('kernel') == 3 * walked.kind('kernel')
    # Before jax 0.12 kernels for GPUs cannot say it themselves.
    blocks = plan.plan_for(300, 200, plan.BLOCKS[name])
    a = jax.ShapeDtypeStruct((2, -(-300 // blocks.size) * blocks.size, 256), jnp.float32)
    call = KernelCall('diagonal_scan_backward', (a,) * (10 if is_complex else 5), (), {})
    assert cost.kernel_flops(call) == 2 * walked.total


@pytest.mark.parametrize('length', [1, 16, 41, 257, 300, 4096, 5000])
@pytest.mark.parametrize('name', BOTH)
def test_blocks_fill_up_little(name, length):
    most = plan.BLOCKS[name]
    for channels in (1, 128, 200, 2048, 2560):
        blocks = plan.plan_for(length, channels, most)
        whole = -(-length // blocks.size) * blocks.size
        assert blocks.size <= most.size and not blocks.size % plan.ROWS
        assert whole - length < plan.ROWS * (whole // blocks.size)
        assert blocks.width <= most.width
        assert -(-channels // blocks.width) * blocks.width - channels < plan.LANES


def test_what_cannot_run_is_said():
    def chosen(platform, *shape, dtype=jnp.float32):
        x = jax.ShapeDtypeStruct(shape, dtype)
        with target(platform):
            decay = jax.ShapeDtypeStruct(shape, jnp.float32)
            jax.eval_shape(lambda *a: diagonal_scan(*a), x, decay)  # traced anew
        return last_choice('diagonal_scan')

    for platform in ('tpu', 'gpu'):
        name = f'pallas_{platform}'
        assert chosen(platform, 16, 20, 129)['implementation'] == name
        refused = chosen(platform, 1, 4, 2, dtype=jnp.float16)['refused'][name]
        assert refused == 'it takes float32, bfloat16 or complex64, not float16 in float32'
        assert 'no empty arrays' in chosen(platform, 0, 4, 2)['refused'][name]
        mesh = jax.sharding.AbstractMesh((2,), ('data',))
        with jax.sharding.use_abstract_mesh(mesh):
            choice = chosen(platform, 1, 4, 2)
        assert 'along the mesh axes data: call it in a shard_map' in choice['refused'][name]
    assert chosen('tpu', 1, 16, 2)['implementation'] == 'pallas_tpu'
    x = np.zeros((1, 4, 1), np.float32)
    for name, why in (('tpu', 'a TPU'), ('gpu', 'a Hopper GPU')):
        with pytest.raises(ValueError, match=f'cannot run as .pallas_{name}.: it needs {why}, not'):
            diagonal_scan(x, x, implementation=f'pallas_{name}')


@pytest.mark.parametrize('dtype', ['float32', 'complex64'])
def test_few_rows_and_channels_take_the_prefix_unless_named(dtype):
    x = jax.ShapeDtypeStruct((31, 4, 2, 64), dtype)
    with target('gpu'):
        jax.eval_shape(lambda *a: diagonal_scan(*a), x, x)
        choice = last_choice('diagonal_scan')
        assert (choice['implementation'], choice['form']) == ('xla', 'prefix')
        assert choice['refused']['pallas_gpu'] == (
            'it has 31 blocks of 128 channels of a row, with fewer than 32 the parallel prefix of '
            "'xla' is faster"
        )
        jax.eval_shape(lambda *a: diagonal_scan(*a, implementation='pallas_gpu'), x, x)
    assert last_choice('diagonal_scan')['implementation'] == 'pallas_gpu'
