"""PolySketchFormer against its weights pair by pair in numpy, and what sketches promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.costs import walk
from effjax.kernels import linear_recurrence
from effjax.layers.mixers.polysketch import PolySketch

WIDTH, LENGTH = 12, 11


def make(causal=True, positions=None, width=WIDTH, **kw):
    ctx = Context(
        width=width, policy=Policy(), causal=causal, init='lecun', positions=positions or {}
    )
    return PolySketch(ctx, **{'heads': 2, **kw}, rngs=nnx.Rngs(0))


def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p['scale'] + p['bias']


def paper(mixer, x):
    """Every pair of x [T, D] by itself: exact in its block, else the square of sketches."""
    p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(mixer, nnx.Param)))
    q, k, v = (
        np.einsum('td,dhk->thk', x, p['inputs'][n]['linear']['kernel'])
        for n in ('query', 'key', 'value')
    )
    q, k = norm(p['query_norm'], q), norm(p['key_norm'], k)
    f = lambda x: np.float64(jax.jit(mixer.sketch)(np.float32(x)))  # noqa: E731
    rough_q, rough_k, out = f(q), f(k), np.zeros_like(v)
    for h in range(2):
        for i in range(len(x)):
            weights = np.zeros(i + 1)
            for j in range(i + 1):
                near = mixer.block and i // mixer.block == j // mixer.block
                exact, rough = q[i, h] @ k[j, h], rough_q[i, h] @ rough_k[j, h]
                weights[j] = exact**mixer.degree if near else rough**2
            assert np.all(weights >= 0)
            out[i, h] = weights @ v[: i + 1, h] / (1 + weights.sum())
    return np.einsum('thv,hvd->td', out, p['out']['kernel'])


@pytest.mark.parametrize(
    'kw',
    [
        {'sketch': 5, 'block': 4},
        pytest.param({'sketch': 3, 'block': 0}, marks=pytest.mark.ci),
        {'sketch': 4, 'learned': True, 'block': 3},
        pytest.param({'degree': 2, 'block': 4}, marks=pytest.mark.ci),
        pytest.param({'degree': 8, 'sketch': 3, 'block': 16}, marks=pytest.mark.ci),
    ],
)
def test_against_its_weights(kw):
    """Two documents in a row, neither of a whole number of blocks."""
    mixer = make(**kw)
    x = np.random.default_rng(0).normal(size=(1, LENGTH, WIDTH)).astype(np.float32)
    ids = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]], np.int32)
    y = jax.jit(lambda x, info: mixer(x, info=info)[0])(x, SeqInfo(positions, jnp.asarray(ids)))
    expected = np.concatenate([paper(mixer, np.float64(x[0, :6])), paper(mixer, x[0, 6:])])
    # Fourth (eighth) powers of float32 numbers.
    np.testing.assert_allclose(y[0], expected, atol=1e-4, rtol=1e-4)


def test_degree_2_and_whole_blocks_are_exact_polynomial_attention():
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    info = SeqInfo.of(2, LENGTH)
    by_sums = make(degree=2, block=0)(x, info=info)[0]
    by_pairs = make(degree=2, block=LENGTH)(x, info=info)[0]
    np.testing.assert_allclose(by_sums, by_pairs, atol=1e-4, rtol=1e-4)


def test_a_sketch_errs_less_the_larger_it_is():
    """The mean square error of (q . k)^2 falls as 1 / r, over seeds."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 40, 1, 6)), jnp.float32) for _ in range(2))
    exact = np.einsum('bthk,bshk->bhts', q, k) ** 2

    def error(r):
        errors = []
        for seed in range(10):
            mixer = make(sketch=r, seed=seed)
            rough = np.einsum('bthr,bshr->bhts', mixer.sketch(q), mixer.sketch(k))
            errors.append(np.mean((rough - exact) ** 2))
        return np.mean(errors)

    # 16 times as large: a sixteenth of the error, give or take what ten seeds leave.
    assert 8 < error(8) / error(128) < 32


KINDS = [
    {'sketch': 3}, {'degree': 2}, {'degree': 8, 'sketch': 3}, {'learned': True, 'sketch': 4},
]  # fmt: skip


def products(mixer, length):
    """FLOPs of the matrix products that a forward pass of two rows runs."""
    x, info = jnp.zeros((2, length, WIDTH)), SeqInfo.of(2, length)
    return walk(lambda x: mixer(x, info=info)[0], x).kind('matmul')


@pytest.mark.parametrize('kw', KINDS)
def test_cost_against_the_walk(kw):
    """All by sums: products of the layer are its cost's, beside those of the recurrence."""
    mixer, length = make(block=0, **kw), 40
    key = jnp.zeros((2, length, 2, mixer.feature_count))
    value = jnp.zeros((2, length, 2, mixer.head_dim + 1))
    by_sums = walk(lambda k, v: linear_recurrence(k, k, v), key, value).kind('matmul')
    assert products(mixer, length) - by_sums == mixer.cost(2, length).matmul


@pytest.mark.parametrize('kw', KINDS)
@pytest.mark.parametrize('length', [40, 37])
def test_what_blocks_run_against_the_walk(kw, length):
    """A row in stretches of a block: each meets itself and the one before, in both weights."""
    size, width, heads, dim = 8, WIDTH, 2, WIDTH // 2
    mixer, plain = make(block=size, **kw), make(block=0, **kw)
    projections = 2 * 2 * length * width * 4 * width
    sketch = (plain.cost(2, length).matmul - projections) / (2 * 2 * length * heads)
    rank = mixer.sketch(jnp.zeros((1, 1, heads, dim))).shape[-1]
    tokens = 2 * -(-length // size) * size * heads
    pairs = 2 * tokens * 2 * size * (dim + rank + dim + 1)
    # Sketches of queries and keys, once more for sums, and keys twice for two stretches.
    sums = 2 * 2 * tokens * mixer.feature_count * (dim + 1)
    assert products(mixer, length) == projections + 5 * tokens * sketch + pairs + sums
    # The model's cost counts pairs that a token may see, sketches once and the recurrence.
    seen = sum(t % size + 1 for t in range(length))
    assert mixer.cost(2, length).matmul == plain.cost(2, length).matmul + 4 * 2 * seen * width


def test_what_cannot_be_is_said():
    for kw, message in (
        ({'heads': 5}, 'polysketch: heads 5 do not divide width 12'),
        ({'degree': 3}, r'polysketch: degree is one of \(2, 4, 8\)'),
        ({'block': -1}, 'block at least 0'),
        ({'causal': False}, 'polysketch is causal'),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**kw)
