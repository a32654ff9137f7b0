"""Diagonal plus low-rank recurrences: against their equation in numpy, in chunks of any size."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import delta_rule, dplr, last_choice
from effjax.kernels.dplr import cost

B, T, H, K, V = 2, 13, 2, 5, 3
SEGMENTS = np.array(
    [[1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4], [0, 0, 5, 5, 5, 0, 5, 6, 6, 6, 6, 0, 0]], np.int32
)
WHOLE = np.ones((B, T), np.int32)
NAMES = ('q', 'k', 'v', 'read', 'write', 'log_decay')
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(seed=0, length=T, strength=0.3):
    """Arrays as RWKV-7 has them: keys of norm 1, of which a share is taken out."""
    rng = np.random.default_rng(seed)
    out = {name: rng.normal(size=(B, length, H, V if name == 'v' else K)) for name in NAMES}
    out['read'] /= np.linalg.norm(out['read'], axis=-1, keepdims=True)
    out['write'] = -out['read'] * rng.uniform(size=out['read'].shape)
    out['log_decay'] = -rng.exponential(strength, size=out['q'].shape)
    out['initial_state'] = rng.normal(size=(B, H, K, V))
    return {name: x.astype(np.float32) for name, x in out.items()}


def call(arrays, **kw):
    return dplr(**arrays, return_state=True, **kw)


def equation(arrays, segments):
    """(diag(a_t) + write_t read_t^T) S_{t-1} + k_t v_t^T, head by head in float64."""
    a = {name: np.float64(x) for name, x in arrays.items()}
    o, s = np.zeros(a['v'].shape), a['initial_state'].copy()
    for b, h in np.ndindex(B, H):
        current = None
        for t in range(o.shape[1]):
            if segments[b, t] == 0:
                continue
            if current is not None and segments[b, t] != current:
                s[b, h] = 0
            current = segments[b, t]
            q, k, v, read, write, decay = (a[name][b, t, h] for name in NAMES)
            transition = np.diag(np.exp(decay)) + np.outer(write, read)
            s[b, h] = transition @ s[b, h] + np.outer(k, v)
            o[b, t, h] = q @ s[b, h]
    return o, s


@pytest.mark.parametrize(
    ('implementation', 'chunk', 'leaf'),
    [('reference', 64, 16), ('xla', 64, 16), ('xla', 64, 1), ('xla', 4, 2), ('xla', 1, 16)],
)
def test_equals_the_equation(implementation, chunk, leaf, monkeypatch):
    monkeypatch.setattr(cost, 'LEAF', leaf)
    arrays = inputs()
    run = jit(lambda a, s: call(a, segment_ids=s, chunk=chunk, implementation=implementation))
    for segments in (WHOLE, SEGMENTS):
        got, expected = run(arrays, segments), equation(arrays, segments)
        # float32 sums of tens of terms of order 1
        np.testing.assert_allclose(got[0], expected[0], atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(got[1], expected[1], atol=2e-5, rtol=2e-5)
    assert last_choice('dplr')['implementation'] == implementation


@pytest.mark.ci
def test_gradients_of_inputs_and_states(monkeypatch):
    """In chunks and float32 against the token loop in float64, through outputs and last state."""
    monkeypatch.setattr(cost, 'LEAF', 2)
    arrays = inputs(seed=1)
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
    chex.assert_trees_all_close(grads, expected, atol=1e-4, rtol=2e-4)
    assert not any(np.any(np.asarray(grads[n])[SEGMENTS == 0]) for n in NAMES)


@pytest.mark.ci
def test_large_problems_go_through_pieces_in_turn(monkeypatch):
    """Five chunks in pieces of two: values, gradients, FLOPs; less memory for the pairs."""
    arrays, ids = inputs(seed=6, length=70), np.sort(np.arange(140).reshape(2, 70) % 5 + 1, 1)

    def run():
        def loss(arrays):
            o, last = call(arrays, segment_ids=ids.astype(np.int32), chunk=16)
            return jnp.sum(jnp.sin(o)) + jnp.sum(last**2), o

        return jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    whole = run()
    monkeypatch.setattr(cost, 'PIECE', 2 * 4 * B * H * 16 * 16 * K)
    assert cost.pieces(B, 70, H, K, 16) == (3, 2)
    chex.assert_trees_all_close(run(), whole, atol=1e-5)  # float32, other fusions
    walked = walk(lambda a: call(a, implementation='xla', chunk=16), arrays)
    assert walked.total == cost.executed_flops('xla', B, 70, H, K, V, chunk=16)


def test_is_the_delta_rule_where_it_should_be():
    arrays = inputs(seed=3, length=70)
    rng = np.random.default_rng(3)
    beta = rng.uniform(size=(B, 70, H)).astype(np.float32)
    key = arrays['read']
    arrays |= {'k': key * beta[..., None], 'write': -key * beta[..., None]}
    arrays['log_decay'] = np.zeros_like(key)
    got = call(arrays, chunk=32, scale=0.5)
    expected = delta_rule(
        arrays['q'], key, arrays['v'], beta, scale=0.5, return_state=True,
        initial_state=arrays['initial_state'],
    )  # fmt: skip
    chex.assert_trees_all_close(got, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.ci
def test_extreme_decays_stay_finite_and_right():
    """Every third token decays by so much, the others a little: those must stay exact."""

    def both(arrays):
        o, last = call(arrays)
        return jnp.sum(jnp.sin(o)) + jnp.sum(last), o

    run = jit(jax.value_and_grad(both, has_aux=True))
    for strength in (0.0, -1e-4, -50.0, -1e30, -np.inf):
        arrays = inputs(seed=4, length=70)
        arrays['log_decay'][:, ::3] = strength
        (_, o), grads = run(arrays)
        expected, _ = equation(arrays, np.ones((B, 70), np.int32))
        np.testing.assert_allclose(o, expected, atol=1e-4, rtol=1e-4)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.ci
def test_a_row_may_be_cut_anywhere_and_padding_is_never_read():
    arrays = inputs(seed=5)
    run = jit(functools.partial(call, chunk=4))
    whole, last = run(arrays)
    for cut in (1, 6, T - 1):
        head = {n: x[:, :cut] if n in NAMES else x for n, x in arrays.items()}
        tail = {n: x[:, cut:] if n in NAMES else x for n, x in arrays.items()}
        first, tail['initial_state'] = run(head)
        second, end = run(tail)
        np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-5)
        np.testing.assert_allclose(end, last, atol=1e-5)
    noisy = dict(arrays)
    for name in NAMES:
        noisy[name] = np.where((SEGMENTS == 0)[..., None, None], np.nan, arrays[name])
    for implementation in ('xla', 'reference'):
        run = jit(lambda a, i=implementation: call(a, segment_ids=SEGMENTS, implementation=i))
        chex.assert_trees_all_equal(run(arrays), run(noisy))


@pytest.mark.parametrize('length', [1, 16, 100])
def test_costs_against_the_walk(length):
    arrays = inputs(length=length)
    for implementation in ('xla', 'reference'):
        walked = walk(lambda a, i=implementation: call(a, implementation=i), arrays)
        expected = cost.executed_flops(implementation, B, length, H, K, V)
        got = walked.total if implementation == 'xla' else walked.kind('matmul')
        assert got == expected, walked
    assert cost.model_flops(B, length, H, K, V) == 9 * B * length * H * K * V


def test_what_does_not_fit_is_said():
    arrays = inputs()
    bad = (
        ({'q': arrays['q'][0]}, r'q is \[B, T, H, K\], not'),
        ({'write': arrays['v']}, r'write is \[B, T, H, K\] as q is'),
        ({'v': arrays['v'][:, 1:]}, r'v is \[B, T, H, V\]'),
        ({'initial_state': arrays['q']}, r'initial_state is \[B, H, K, V\]'),
        ({'segment_ids': SEGMENTS[:1]}, 'segment_ids'),
        ({'chunk': 0}, 'chunk must be at least 1'),
        ({'implementation': 'hopper'}, 'no implementation'),
    )
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            dplr(**{**arrays, **change})
