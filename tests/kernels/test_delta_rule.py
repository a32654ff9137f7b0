"""The delta rule: against its equation in numpy, in chunks of any size, with documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import delta_rule, last_choice
from effjax.kernels.delta_rule import cost

B, T, H, K, V = 2, 13, 2, 5, 3
SEGMENTS = np.array(
    [[1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4], [0, 0, 5, 5, 5, 5, 0, 6, 6, 6, 6, 0, 0]], np.int32
)
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(seed=0, length=T):
    """q, k, v, beta, log_decay, state: keys of norm 1, beta in (0, 1), log-decays below 0."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, length, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(B, length, H, V))
    beta = rng.uniform(0.05, 0.98, size=(B, length, H))
    log_decay = -rng.exponential(0.3, size=(B, length, H))
    state = rng.normal(size=(B, H, K, V))
    return tuple(x.astype(np.float32) for x in (q, k, v, beta, log_decay, state))


def equation(q, k, v, beta, log_decay, state, segments):
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, as the papers print it."""
    q, k, v, beta, state = (x.astype(np.float64) for x in (q, k, v, beta, state))
    a = np.ones_like(beta) if log_decay is None else np.exp(log_decay.astype(np.float64))
    o, s = np.zeros((*q.shape[:3], V)), state.copy()
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        current = None
        for t in range(q.shape[1]):
            if segments[b, t] == 0:
                continue
            if current is not None and segments[b, t] != current:
                s[b, h] = 0
            current = segments[b, t]
            key = k[b, t, h]
            erase = np.eye(K) - beta[b, t, h] * np.outer(key, key)
            s[b, h] = a[b, t, h] * erase @ s[b, h] + beta[b, t, h] * np.outer(key, v[b, t, h])
            o[b, t, h] = q[b, t, h] @ s[b, h]
    return o, s


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize('decay', [True, False], ids=['gated', 'plain'])
def test_equals_the_equation(implementation, decay):
    *qkvb, log_decay, state = inputs()
    log_decay = log_decay if decay else None
    for segments in (np.ones((B, T), np.int32), SEGMENTS):
        expected = equation(*qkvb, log_decay, state, segments)
        for chunk in (1, 4, 5, 64) if implementation == 'xla' else (64,):
            run = functools.partial(
                delta_rule, return_state=True, chunk=chunk, implementation=implementation
            )
            got = jit(run)(*qkvb, log_decay, initial_state=state, segment_ids=segments)
            # float32 sums of about ten terms of order 1
            np.testing.assert_allclose(got[0], expected[0], atol=5e-6)
            np.testing.assert_allclose(got[1], expected[1], atol=5e-6)


def test_without_documents_scale_and_decay_a_head():
    q, k, v, beta, log_decay, _ = inputs()
    ids = np.ones((B, T), np.int32)
    o = delta_rule(q, k, v, beta, log_decay[0, 0], scale=0.5, chunk=5)
    shared = np.broadcast_to(log_decay[0, 0], (B, T, H))
    zero = np.zeros((B, H, K, V))
    np.testing.assert_allclose(o, 0.5 * equation(q, k, v, beta, shared, zero, ids)[0], atol=5e-6)
    assert o.shape == (B, T, H, V) and o.dtype == jnp.float32
    half = [x.astype(jnp.bfloat16) for x in (q, k, v, beta)]
    o, state = delta_rule(*half, return_state=True)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32


@pytest.mark.parametrize('decay', [True, False], ids=['gated', 'plain'])
def test_gradients_of_inputs_and_states(decay):
    """In chunks and float32 against the token loop in float64, through outputs and last state."""
    arrays = inputs(1)
    weight = np.random.default_rng(2).normal(size=(B, H, K, V)).astype(np.float32)

    def loss(arrays, implementation, chunk=4):
        *qkvb, log_decay, state = arrays
        o, last = delta_rule(
            *qkvb, log_decay if decay else None, initial_state=state, segment_ids=SEGMENTS,
            return_state=True, chunk=chunk, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(last) * weight)

    grads = jit(jax.grad(lambda a: loss(a, 'xla')))(arrays)
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(x, jnp.float64) for x in arrays)
        expected = jit(jax.grad(lambda a: loss(a, 'reference')))(wide)
        assert all(g.dtype == jnp.float64 for g in expected)
        chunked = jit(jax.grad(lambda a: loss(a, 'xla')))(wide)
        for got, want in zip(chunked, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-12)
        expected = [np.asarray(g) for g in expected]
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert not np.any(np.asarray(grads[0])[SEGMENTS == 0])


def test_a_row_may_be_cut_anywhere():
    q, k, v, beta, log_decay, state = inputs(3)
    run = jit(functools.partial(delta_rule, return_state=True, chunk=4))
    whole, last = run(q, k, v, beta, log_decay, initial_state=state)
    for cut in (1, 4, 6, T - 1):
        first, middle = run(*(x[:, :cut] for x in (q, k, v, beta, log_decay)), initial_state=state)
        rest = (x[:, cut:] for x in (q, k, v, beta, log_decay))
        second, end = run(*rest, initial_state=middle)
        np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=5e-6)
        np.testing.assert_allclose(end, last, atol=5e-6)


@pytest.mark.parametrize('strength', [0.0, -1e-4, -50.0, -1e30])
def test_extreme_gates_and_keys_stay_finite_and_right(strength):
    """One key throughout and beta 1 is the hardest system: each token replaces the whole value."""
    q, k, v, beta, _, state = inputs(4, length=70)
    k = np.broadcast_to(k[:, :1], k.shape)
    beta = np.ones_like(beta)
    log_decay = np.full_like(beta, strength)

    def run(q, k, v, beta, log_decay, state):
        o, s = delta_rule(q, k, v, beta, log_decay, initial_state=state, return_state=True)
        return jnp.sum(jnp.sin(o)) + jnp.sum(s), o

    args = (q, k, v, beta, log_decay, state)
    (_, o), grads = jit(jax.value_and_grad(run, argnums=tuple(range(6)), has_aux=True))(*args)
    expected, _ = equation(*args, np.ones((B, 70), np.int32))
    np.testing.assert_allclose(o, expected, atol=2e-5)
    assert all(np.isfinite(g).all() for g in grads)


def test_what_a_decay_to_0_stands_before_is_not_lost():
    """Infinite and huge log-decays beside weak ones, whose plain running sums would drown them."""
    *qkvb, log_decay, state = inputs(seed=6, length=40)
    log_decay[:, 3], log_decay[:, 4], log_decay[:, 20] = -np.inf, -3e4, -200.0

    def loss(qkvb, log_decay, implementation):
        run = functools.partial(delta_rule, initial_state=state, return_state=True)
        o, last = run(*qkvb, log_decay, chunk=32, implementation=implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(last)), (o, last)

    def grads(implementation):
        return jit(jax.value_and_grad(lambda *a: loss(*a, implementation), (0, 1), has_aux=True))(
            qkvb, log_decay
        )

    for a, b in zip(*map(jax.tree.leaves, (grads('xla'), grads('reference'))), strict=True):
        # float32 sums of some products of order 1
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4)


def test_padding_is_never_read():
    q, k, v, beta, log_decay, _ = inputs(5)
    noise = [np.where((SEGMENTS == 0).reshape(B, T, *[1] * (x.ndim - 2)), np.nan, x)
             for x in (q, k, v, beta, log_decay)]  # fmt: skip
    for implementation in ('xla', 'reference'):
        run = functools.partial(
            delta_rule, segment_ids=SEGMENTS, return_state=True, implementation=implementation
        )
        clean, noisy = run(q, k, v, beta, log_decay), run(*noise)
        np.testing.assert_array_equal(clean[0], noisy[0])
        np.testing.assert_array_equal(clean[1], noisy[1])
        assert not np.any(np.asarray(noisy[0])[SEGMENTS == 0])


@pytest.mark.parametrize(
    ('length', 'chunk'), [(12, 4), (13, 4), (3, 64), (200, 64), (5, 1), (1, 64)]
)
def test_costs_equal_the_walk(length, chunk):
    arrays = inputs(length=length)[:5]
    for decay in (True, False):
        run = functools.partial(delta_rule, chunk=chunk)
        walked = walk(run, *arrays[: 5 if decay else 4], strict=True)
        executed = cost.executed_flops('xla', B, length, H, K, V, decay=decay, chunk=chunk)
        assert walked.total == executed
    loop = walk(functools.partial(delta_rule, implementation='reference'), *arrays[:4])
    assert loop.total == cost.executed_flops('reference', B, length, H, K, V)
    per_token = cost.model_flops(1, 1, H, K, V, decay=False)
    assert per_token == 6 * H * K * V
    assert cost.model_flops(2, length, H, K, V, decay=True) == 2 * length * H * 7 * K * V


def test_memory_grows_with_the_length_and_not_its_square():
    length, chunk = 512, 16
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length=length)[:5]]
    jaxpr = jax.make_jaxpr(functools.partial(delta_rule, chunk=chunk))(*shapes)
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    assert max(sizes) <= B * H * length * 2 * chunk < B * length * length


def test_says_what_it_cannot_do_and_what_ran():
    q, k, v, beta, *_ = inputs()
    delta_rule(q, k, v, beta)
    assert last_choice('delta_rule')['implementation'] == 'xla'
    cases = [
        ((q[0], k, v, beta), {}, r'q and k are both \[B, T, H, K\]'),
        ((q, k, v[:, 1:], beta), {}, 'v is'),
        ((q, k, v, beta[..., None]), {}, r'beta is \[B, T, H\]'),
        ((q, k, v, beta, q), {}, 'log_decay is one number a head'),
        ((q, k, v, beta), {'initial_state': v}, 'initial_state is'),
        ((q, k, v, beta), {'segment_ids': SEGMENTS[:, 1:]}, 'segment_ids are integers'),
        ((q, k, v, beta), {'chunk': 0}, 'chunk must be at least 1'),
        ((q, k, v, beta), {'implementation': 'pallas'}, "no implementation 'pallas'"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            delta_rule(*args, **options)
