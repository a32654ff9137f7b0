"""Pallas kernels of the selective scan: against float64, lowered, compiled ahead."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from effjax.costs import walk
from effjax.costs.products import KernelCall
from effjax.kernels import last_choice, selective_scan, target
from effjax.kernels.selective_scan import cost, plan

B, T, D, N = 2, 41, 5, 4
# Documents end at a tile's end (16, 32) and inside; padding stands before, between and after.
SEGMENTS = np.repeat(
    np.array([[1, 0, 2, 3, 4, 5], [0, 1, 2, 0, 2, 0]], np.int32), [4, 3, 9, 16, 2, 7], axis=1
)
KERNELS = list(plan.PLANS)
# The GPU interpreter takes a second a token: it gets the first 24 of a row, three chunks, or 9 or
# 11, two chunks, where what is proved happens in each of them.
FAST = ['pallas_tpu', pytest.param('pallas_gpu', marks=pytest.mark.ci)]


def inputs(seed=0, *, length=T, channels=D, states=N):
    """A dict of float32 arrays."""
    rng = np.random.default_rng(seed)
    out = {
        'u': rng.normal(size=(B, length, channels)),
        'dt': rng.exponential(0.3, size=(B, length, channels)),
        'A': -np.exp(rng.normal(size=(channels, states))),
        'B': rng.normal(size=(B, length, states)),
        'C': rng.normal(size=(B, length, states)),
        'D': rng.normal(size=channels),
        'initial_state': rng.normal(size=(B, channels, states)),
    }
    return {n: x.astype(np.float32) for n, x in out.items()}


def loss(arrays, segments, implementation):
    """A number that needs every output and the last state, and both of them."""
    y, last = selective_scan(
        **arrays, segment_ids=segments, return_state=True, implementation=implementation
    )
    weight = np.random.default_rng(9).normal(size=last.shape).astype(np.float32)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(jnp.sin(last) * weight), (y, last)


@contextlib.contextmanager
def interpreted(implementation):
    """Races raise, and what is unwritten is NaN."""
    if implementation == 'pallas_tpu':
        mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
    else:
        mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
    with target(implementation.removeprefix('pallas_')), mode:
        yield


def program(implementation='reference'):
    """Of `loss`; by itself where it runs several times, since making it takes longest."""
    f = functools.partial(loss, implementation=implementation)
    return jax.jit(jax.value_and_grad(f, has_aux=True))


def run(arrays, segments, implementation='reference', both=None):
    """((y, last), gradients)."""
    both = both or program(implementation)
    if implementation == 'reference':
        (_, out), grads = both(arrays, segments)
    else:
        with interpreted(implementation):
            (_, out), grads = jax.block_until_ready(both(arrays, segments))
    assert last_choice('selective_scan')['implementation'] == implementation
    return out, grads


def case(name, arrays, ids=SEGMENTS, tokens=24):
    """(arrays, segment ids) to go through an interpreter: all of them, or few."""
    if name != 'pallas_gpu':
        return arrays, ids
    cut = {n: x[:1, :tokens] if n in ('u', 'dt', 'B', 'C') else x for n, x in arrays.items()}
    cut['initial_state'] = cut['initial_state'][:1]
    return cut, None if ids is None else ids[:1, :tokens]


def truth(arrays, segments):
    """The same by the token loop in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        return jax.tree.map(np.asarray, run(wide, segments))


@pytest.mark.parametrize('segments', [True, pytest.param(False, marks=pytest.mark.ci)])
@pytest.mark.parametrize('name', FAST)
def test_values_and_gradients_in_the_interpreter(name, segments, monkeypatch):
    monkeypatch.setattr(plan, 'CHUNK', 16)
    arrays, ids = case(name, inputs(), SEGMENTS if segments else None)
    got, expected = run(arrays, ids, name), truth(arrays, ids)
    # float32 sums of some tens of terms of order 1
    chex.assert_trees_all_close(got, expected, atol=3e-5, rtol=1e-5)
    if segments:
        assert not any(np.any(np.asarray(got[1][n])[ids == 0]) for n in ('u', 'dt', 'B', 'C'))


@pytest.mark.ci
@pytest.mark.parametrize(
    ('length', 'chunk', 'channels', 'states'), [(150, plan.CHUNK, 130, 16), (41, 16, 3, 19)]
)
@pytest.mark.parametrize('name', KERNELS)
def test_blocks_of_channels_and_more_states(name, length, chunk, channels, states, monkeypatch):
    monkeypatch.setattr(plan, 'CHUNK', chunk)
    arrays = inputs(1, length=length, channels=channels, states=states)
    arrays, _ = case(name, arrays, tokens=9)
    got, expected = run(arrays, None, name), truth(arrays, None)
    # sums over hundreds of channels or tokens
    chex.assert_trees_all_close(got, expected, atol=3e-4, rtol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize('name', KERNELS)
def test_bfloat16_inputs(name):
    arrays = inputs(2)
    for n in ('u', 'dt', 'B', 'C'):
        arrays[n] = np.asarray(jnp.bfloat16(arrays[n]))
    arrays, ids = case(name, arrays, tokens=11)
    (y, last), grads = run(arrays, ids, name)
    assert all(grads[n].dtype == arrays[n].dtype for n in arrays)
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    (wide_y, wide_last), wide_grads = truth(arrays, ids)
    # Only what is stored is rounded: the state goes on in float32.
    np.testing.assert_allclose(last, wide_last, atol=1e-5)
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b),
        (y, grads),
        (wide_y, wide_grads),
    )
    assert max(jax.tree.leaves(errors)) < 0.02, errors  # y has 8 bits, before the loss bends it


@pytest.mark.ci
@pytest.mark.parametrize('steps', [(0.0, 1e-6, 80.0), (1e30,)], ids=['', 'endless'])
@pytest.mark.parametrize('name', KERNELS)
def test_extreme_steps_stay_finite_and_right(name, steps):
    """Every third step is so long, each channel's its own, with what it writes in bounds."""
    arrays = inputs(4)
    by_channel = np.resize(np.float32(steps), D)
    arrays['dt'][:, ::3] = by_channel
    arrays['u'][:, ::3] /= np.maximum(by_channel, 1.0)
    arrays, _ = case(name, arrays, tokens=11)
    (y, last), grads = run(arrays, None, name)
    expected, wide_grads = truth(arrays, None)
    chex.assert_trees_all_close((y, last), expected, atol=3e-5, rtol=1e-5)
    if max(steps) == 1e30:
        return

    def error(a, b):
        return np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b)

    errors = {n: error(grads[n], wide_grads[n]) for n in 'BC'}  # all channels share these
    for i, step in enumerate(steps):
        own = by_channel == np.float32(step)
        at = {'A': np.s_[own], 'D': np.s_[own], 'initial_state': np.s_[:, own]}
        for n in ('u', 'dt', *at):
            here = at.get(n, np.s_[..., own])
            errors[n, i] = error(grads[n][here], wide_grads[n][here])
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.ci
@pytest.mark.parametrize('name', KERNELS)
def test_padding_is_never_read_and_a_row_of_padding_keeps_its_state(name):
    arrays, ids = case(name, inputs(5), tokens=9)
    at = (ids == 0)[..., None]
    moving = ('u', 'dt', 'B', 'C')
    noisy = {**arrays, **{n: np.where(at, np.nan, arrays[n]) for n in moving}}
    both = program(name)
    clean, dirty = (run(a, ids, name, both) for a in (arrays, noisy))
    chex.assert_trees_all_equal(clean, dirty)
    (y, last), _ = run(arrays, np.zeros_like(ids), name, both)
    np.testing.assert_array_equal(last, arrays['initial_state'])
    assert not np.any(y)


@pytest.mark.ci
def test_seeds_side_by_side_on_a_gpu():
    """Under vmap, as studies run them: lowered, and right in the interpreter."""
    arrays, ids = case('pallas_gpu', inputs(7), tokens=9)

    def f(name):
        return lambda a: loss(a, ids, name)

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


def shapes(batch, length, channels, states, dtype='bfloat16', sharding=None):
    """Abstract arguments of a call with an initial state, and documents."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    arrays = {
        **dict.fromkeys(('u', 'dt'), array((batch, length, channels), dtype)),
        'A': array((channels, states), 'float32'),
        **dict.fromkeys(('B', 'C'), array((batch, length, states), dtype)),
        'D': array((channels,), 'float32'),
        'initial_state': array((batch, channels, states), 'float32'),
    }
    return arrays, array((batch, length), 'int32')


@pytest.mark.parametrize('name', KERNELS)
def test_lowers(name):
    """For a GPU this decides on layouts and sees whether shared memory is enough."""
    f = jax.value_and_grad(lambda *a: loss(*a, name), has_aux=True)
    tpu = name == 'pallas_tpu'
    with target(name.removeprefix('pallas_')):
        traced = jax.jit(f).trace(*shapes(2, 300, 200, 16))
        lowered = traced.lower(lowering_platforms=('tpu' if tpu else 'cuda',))
        assert last_choice('selective_scan')['implementation'] == name
    assert lowered.as_text().count('tpu_custom_call' if tpu else 'custom_call @mosaic_gpu') == 2


# The second has the least memory for a kernel; the third, by hand, as much as the first.
CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
AHEAD = [  # all for the first chip, the first for the others too
    ((8, 4096, 4096, 16), 'bfloat16'),
    ((1, 1000, 300, 5), 'float32'),
    ((1, 300, 256, 128), 'float32'),
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
    f = jax.value_and_grad(lambda *a: loss(*a, 'pallas_tpu'), has_aux=True)
    with target('tpu'):
        compiled = jax.jit(f).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    # Linear in tokens, without the states of a channel: some copies of what is as large as u, maps
    # in and out for each block of channels, and one state a chunk.
    batch, length, channels, states = dims
    blocks = plan.tpu_plan(length, channels, states)
    tokens = 4 * batch * -(-length // blocks.size) * blocks.size
    wide = -(-channels // blocks.width) * blocks.width
    maps = 2 * (wide // blocks.width + 3) * blocks.states
    once = 8 * 4 * batch * wide * blocks.states
    kept = wide * blocks.states // blocks.size
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < tokens * (8 * wide + maps + kept) + once


@pytest.mark.parametrize('name', KERNELS)
def test_costs_against_the_walk(name):
    arrays, _ = shapes(2, 300, 200, 5)
    f = functools.partial(selective_scan, implementation=name)
    with target(name.removeprefix('pallas_')):
        walked = walk(lambda a: f(**a), arrays, strict=True)
        both = walk(jax.grad(lambda a: jnp.sum(f(**a).astype(jnp.float32))), arrays, strict=True)
    assert walked.total == cost.executed_flops(name, 2, 300, 200, 5)
    assert both.kind('kernel') == 3 * walked.kind('kernel')
    # Before jax 0.12 kernels for GPUs cannot say it themselves.
    blocks = plan.PLANS[name](300, 200, 5)
    u = jax.ShapeDtypeStruct((2, -(-300 // blocks.size) * blocks.size, 256), jnp.bfloat16)
    A = jax.ShapeDtypeStruct((blocks.states, 256), jnp.float32)
    call = KernelCall('selective_scan_backward', (u, u, A), (), {})
    assert cost.kernel_flops(call) == 2 * walked.total


def test_what_cannot_run_is_said():
    def chosen(platform, *dims, dtype=jnp.float32):
        arrays, _ = shapes(*dims, dtype)
        with target(platform):
            jax.eval_shape(lambda a: selective_scan(**a), arrays)
        return last_choice('selective_scan')

    for name in KERNELS:
        platform = name.removeprefix('pallas_')
        assert chosen(platform, 1, 16, 2, 3)['implementation'] == name
        refused = chosen(platform, 1, 4, 2, 3, dtype=jnp.float16)['refused'][name]
        assert refused == 'it takes float32 or bfloat16, not float16'
        assert 'no empty arrays' in chosen(platform, 0, 4, 2, 3)['refused'][name]
        assert 'states a channel, not 129' in chosen(platform, 1, 4, 2, 129)['refused'][name]
    x = np.zeros((1, 4, 1), np.float32)
    with pytest.raises(ValueError, match='cannot run as .pallas_tpu.: it needs a TPU, not cpu'):
        selective_scan(x, x, x[0, :1], x, x, implementation='pallas_tpu')
