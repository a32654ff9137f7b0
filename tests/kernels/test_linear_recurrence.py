"""Linear recurrences: against their equation in numpy, in chunks of any size, with documents."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import last_choice, linear_recurrence
from effjax.kernels.linear_recurrence import cost

B, T, H, K, V = 2, 13, 2, 5, 3
SEGMENTS = np.array(
    [[1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4], [0, 0, 5, 5, 5, 0, 5, 6, 6, 6, 6, 0, 0]], np.int32
)
WHOLE = np.ones((B, T), np.int32)
CASES = {
    'none': {'decay': None},
    'head': {'decay': 'head'},
    'scalar': {'decay': 'scalar'},
    'scalar_bonus': {'decay': 'scalar', 'bonus': True},
    'vector': {'decay': 'vector'},
    'vector_bonus': {'decay': 'vector', 'bonus': True},
    'none_bonus': {'decay': None, 'bonus': True},
    'groups': {'decay': 'scalar', 'groups': 1},
    'groups_none': {'decay': None, 'groups': 1},
    'groups_vector_bonus': {'decay': 'vector', 'groups': 1, 'bonus': True},
}
LATER = ('head', 'scalar_bonus', 'none_bonus', 'groups_none', 'groups_vector_bonus')
NAMES = [pytest.param(n, marks=[pytest.mark.ci] if n in LATER else []) for n in CASES]
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(decay='scalar', bonus=False, groups=H, seed=0, length=T, strength=0.3):
    """A dict of float32 arrays; some are None."""
    rng = np.random.default_rng(seed)
    shapes = {'head': (H,), 'scalar': (B, length, H), 'vector': (B, length, H, K)}
    out = {
        'q': rng.normal(size=(B, length, groups, K)),
        'k': rng.normal(size=(B, length, groups, K)),
        'v': rng.normal(size=(B, length, H, V)),
        'log_decay': -rng.exponential(strength, size=shapes[decay]) if decay else None,
        'bonus': rng.normal(size=(H, K)) if bonus else None,
        'initial_state': rng.normal(size=(B, H, K, V)),
    }
    return {name: None if x is None else x.astype(np.float32) for name, x in out.items()}


def call(arrays, **kw):
    return linear_recurrence(**arrays, return_state=True, **kw)


def equation(arrays, segments):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T and what is read of it, head by head in float64."""
    a = {n: None if x is None else np.asarray(x, np.float64) for n, x in arrays.items()}
    shape = a['q'].shape[:2]
    group = H // a['q'].shape[2]
    o, s = np.zeros((*shape, H, V)), a['initial_state'].copy()
    decay = np.zeros(1) if a['log_decay'] is None else a['log_decay']
    if decay.ndim <= 1:
        decay = np.broadcast_to(decay, (*shape, H))
    if decay.ndim == 3:
        decay = np.broadcast_to(decay[..., None], (*shape, H, K))
    for b, h in np.ndindex(B, H):
        current = None
        for t in range(shape[1]):
            if segments[b, t] == 0:
                continue
            if current is not None and segments[b, t] != current:
                s[b, h] = 0
            current = segments[b, t]
            q, new = a['q'][b, t, h // group], np.outer(a['k'][b, t, h // group], a['v'][b, t, h])
            if a['bonus'] is not None:
                o[b, t, h] = q @ (s[b, h] + a['bonus'][h][:, None] * new)
            s[b, h] = np.exp(decay[b, t, h])[:, None] * s[b, h] + new
            if a['bonus'] is None:
                o[b, t, h] = q @ s[b, h]
    return o, s


@pytest.mark.parametrize('name', NAMES)
def test_equals_the_equation(name, monkeypatch):
    arrays = inputs(**CASES[name])
    runs = [('reference', 64, 16), ('xla', 64, 16), ('xla', 4, 2), ('xla', 8, 1)]
    if name == 'vector_bonus':
        runs += [('xla', 1, 16), ('xla', 5, 16), ('xla', 16, 2)]
    for implementation, chunk, leaf in runs:
        monkeypatch.setattr(cost, 'LEAF', leaf)
        keys = dict(chunk=chunk, implementation=implementation)
        run = jit(lambda a, ids, keys=keys: call(a, segment_ids=ids, **keys))
        for segments in (WHOLE, SEGMENTS):
            got, expected = run(arrays, segments), equation(arrays, segments)
            # float32 sums of tens of terms of order 1
            np.testing.assert_allclose(got[0], expected[0], atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(got[1], expected[1], atol=1e-5, rtol=1e-5)
        assert last_choice('linear_recurrence')['implementation'] == implementation


@pytest.mark.ci
@pytest.mark.parametrize('name', ['head', 'scalar', 'vector', 'none'])
def test_without_documents_states_and_with_a_scale(name):
    arrays = inputs(**CASES[name], length=70)
    arrays['initial_state'] *= 0
    expected, _ = equation(arrays, np.ones((B, 70), np.int32))
    del arrays['initial_state']
    o = jit(lambda a: linear_recurrence(**a, scale=0.5, chunk=32))(arrays)
    np.testing.assert_allclose(o, 0.5 * expected, atol=3e-5, rtol=1e-4)
    half = {n: None if x is None else jnp.bfloat16(x) for n, x in arrays.items()}
    half['log_decay'] = arrays['log_decay']
    o, state = jit(functools.partial(call, scale=0.5))(half)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    # 8 bits of each factor
    np.testing.assert_allclose(np.float32(o), 0.5 * expected, atol=0.3, rtol=0.05)


@pytest.mark.ci
@pytest.mark.parametrize('name', NAMES)
def test_gradients_of_inputs_and_states(name, monkeypatch):
    """In chunks and float32 against the token loop in float64, through outputs and last state."""
    monkeypatch.setattr(cost, 'LEAF', 2)
    arrays = inputs(**CASES[name], seed=1)
    weight = np.random.default_rng(2).normal(size=(B, H, K, V)).astype(np.float32)

    def loss(arrays, implementation, chunk=4):
        o, last = call(arrays, segment_ids=SEGMENTS, chunk=chunk, implementation=implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(last) * weight)

    grads = jit(jax.grad(lambda a: loss(a, 'xla')))(arrays)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        expected = jit(jax.grad(lambda a: loss(a, 'reference')))(wide)
        assert all(g.dtype == jnp.float64 for g in jax.tree.leaves(expected))
        chunked = jit(jax.grad(lambda a: loss(a, 'xla', 8)))(wide)
        chex.assert_trees_all_close(chunked, expected, atol=1e-12)
        expected = jax.tree.map(np.float32, expected)
    chex.assert_trees_all_close(grads, expected, atol=5e-5, rtol=1e-4)
    assert not any(np.any(np.asarray(grads[n])[SEGMENTS == 0]) for n in 'qkv')


@pytest.mark.ci
@pytest.mark.parametrize('name', ['scalar', 'vector', 'vector_bonus'])
def test_a_row_may_be_cut_anywhere(name):
    arrays = inputs(**CASES[name], seed=3)
    run = jit(functools.partial(call, chunk=4))
    whole, last = run(arrays)
    for cut in (1, 6, T - 1):
        timed = ('q', 'k', 'v', 'log_decay')
        head = {n: x[:, :cut] if n in timed else x for n, x in arrays.items()}
        tail = {n: x[:, cut:] if n in timed else x for n, x in arrays.items()}
        first, tail['initial_state'] = run(head)
        second, end = run(tail)
        np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-5)
        np.testing.assert_allclose(end, last, atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize('name', ['scalar', 'vector', 'vector_bonus'])
def test_extreme_decays_stay_finite_and_right(name):
    """Every third token decays by so much, the others a little: those must stay exact."""
    run = jit(jax.value_and_grad(lambda a: _sum(call(a)), has_aux=True))
    for strength in (0.0, -1e-4, -50.0, -1e30, -np.inf):
        arrays = inputs(**CASES[name], seed=4, length=70)
        arrays['log_decay'][:, ::3] = strength
        (_, o), grads = run(arrays)
        expected, _ = equation(arrays, np.ones((B, 70), np.int32))
        # Without decay 70 products of order 5 add up.
        np.testing.assert_allclose(o, expected, atol=3e-5, rtol=3e-5)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def _sum(result):
    return jnp.sum(jnp.sin(result[0])) + jnp.sum(result[1]), result[0]


@pytest.mark.parametrize('name', ['head', 'scalar', 'vector_bonus'])
def test_padding_is_never_read(name):
    arrays = inputs(**CASES[name], seed=5)
    noisy = dict(arrays)
    for n in ('q', 'k', 'v', 'log_decay'):
        if arrays[n].ndim > 1:
            mask = (SEGMENTS == 0).reshape(B, T, *[1] * (arrays[n].ndim - 2))
            noisy[n] = np.where(mask, np.nan, arrays[n])
    for implementation in ('xla', 'reference'):
        run = jit(lambda a, ids, i=implementation: call(a, segment_ids=ids, implementation=i))
        clean, dirty = run(arrays, SEGMENTS), run(noisy, SEGMENTS)
        chex.assert_trees_all_equal(clean, dirty)
        assert not np.any(np.asarray(clean[0])[SEGMENTS == 0])
        nothing = run(arrays, np.zeros((B, T), np.int32))
        chex.assert_trees_all_close(nothing[1], arrays['initial_state'])
        assert not np.any(nothing[0])


@pytest.mark.parametrize('name', ['none', 'scalar', 'vector', 'vector_bonus', 'groups'])
@pytest.mark.parametrize('length', [1, 16, 100, 130])
def test_costs_against_the_walk(name, length):
    case = CASES[name]
    arrays = inputs(**case, length=length)
    keys = dict(decay=case['decay'] or 'none', bonus=case.get('bonus', False))
    for implementation in ('xla', 'reference'):
        walked = walk(lambda a, i=implementation: call(a, implementation=i), arrays)
        expected = cost.executed_flops(
            implementation, B, length, H, K, V, groups=case.get('groups'), **keys
        )
        got = walked.total if implementation == 'xla' else walked.kind('matmul')
        scale = 1 if implementation == 'xla' else 2  # the loop's products: the read alone
        assert got * scale == expected, walked
    keys['decay'] = case['decay'] is not None
    model = cost.model_flops(B, length, H, K, V, **keys)
    assert model == 2 * cost.model_flops(1, length, H, K, V, **keys)
    assert model >= 4 * B * length * H * K * V


def test_memory_does_not_grow_with_the_square():
    """No array of the compiled program, gradients included, has T x T elements."""
    arrays = inputs('vector', length=1024)

    def loss(arrays):
        return jnp.sum(linear_recurrence(**arrays))

    compiled = jax.jit(jax.grad(loss)).lower(arrays).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * B * H * 1024**2 * 2


def test_what_does_not_fit_is_said():
    arrays = inputs()
    q, k, v = arrays['q'], arrays['k'], arrays['v']
    bad = (
        ((q, k[:, :-1], v), {}, r'q and k are both \[B, T, H, K\]'),
        ((q, k, v[:, :-1]), {}, r'v is \[B, T, H, V\]'),
        ((q, k, v[:, :, :1]), {}, r'v is \[B, T, H, V\]'),
        ((q, k, v.astype(np.float16)), {}, 'dtypes differ'),
        ((q, k, v, q[:, :, :1]), {}, r'log_decay is \[H\]'),
        ((q, k, v), {'bonus': q}, r'bonus is \[H, K\] = \[2, 5\]'),
        ((q, k, v), {'initial_state': q}, r'initial_state is \[B, H, K, V\]'),
        ((q, k, v), {'segment_ids': SEGMENTS[:1]}, 'segment_ids'),
        ((q, k, v), {'chunk': 0}, 'chunk must be at least 1'),
        ((q, k, v), {'implementation': 'hopper'}, 'no implementation'),
    )
    for args, kw, message in bad:
        with pytest.raises(ValueError, match=message):
            linear_recurrence(*args, **kw)
