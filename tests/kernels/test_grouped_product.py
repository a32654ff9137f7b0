"""The grouped product: against numpy, group by group, values and gradients, of any sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import grouped_product, last_choice, target
from effjax.kernels.grouped_product import cost
from effjax.kernels.grouped_product.xla import places

K, N = 5, 3
SIZES = {  # of groups, and rows
    'some': ([7, 0, 20, 1, 5], 33),
    'rows behind': ([3, 17, 0], 40),
    'one group': ([19], 19),
    'all in one': ([0, 0, 50, 0], 50),
    'none': ([0, 0], 9),
    'whole blocks': ([16, 32, 16], 64),
}
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def inputs(sizes, rows, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, K)).astype(np.float32)
    w = rng.normal(size=(len(sizes), K, N)).astype(np.float32)
    return x, w, np.asarray(sizes), rng.normal(size=(rows, N)).astype(np.float32)


def truth(x, w, sizes, dy):
    """(y, dx, dw) in float64, group by group."""
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    ends = np.cumsum(sizes)
    for e, (begin, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        here = slice(begin, end)
        y[here], dx[here], dw[e] = x[here] @ w[e], dy[here] @ w[e].T, x[here].T @ dy[here]
    return y, dx, dw


def run(x, w, sizes, dy, implementation):
    def f(x, w, sizes, dy):
        product = functools.partial(grouped_product, implementation=implementation)
        y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        return y, *pull(dy)

    return jit(f)(x, w, sizes, dy)


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize('name', SIZES)
def test_equals_numpy(name, implementation):
    arrays = inputs(*SIZES[name])
    # float32 sums of up to 50 products of order 1
    for got, wide in zip(run(*arrays, implementation), truth(*arrays), strict=True):
        np.testing.assert_allclose(got, wide, atol=2e-5, rtol=1e-5)


def test_drawn_sizes_fill_blocks_of_several_lengths():
    rng = np.random.default_rng(3)
    for rows, groups in ((1100, 3), (300, 2), (130, 9), (1, 4)):
        parts = rng.multinomial(rng.integers(0, rows + 1), rng.dirichlet(np.full(groups, 0.4)))
        arrays = inputs(parts, rows, seed=rows)
        for got, wide in zip(run(*arrays, 'xla'), truth(*arrays), strict=True):
            np.testing.assert_allclose(got, wide, atol=1e-4, rtol=1e-5)
    assert cost.blocks(1100, 3) == (32, 38) and cost.blocks(300, 2) == (16, 21)


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_rows_behind_the_groups_are_never_read(implementation):
    x, w, sizes, dy = inputs(*SIZES['rows behind'])
    clean = run(x, w, sizes, dy, implementation)
    x, dy = x.copy(), dy.copy()
    x[sizes.sum() :], dy[sizes.sum() :] = np.nan, np.inf
    for a, b in zip(clean, run(x, w, sizes, dy, implementation), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(clean[0])[sizes.sum() :])


def test_16_bits_and_lanes():
    x, w, sizes, dy = inputs(*SIZES['some'])
    half = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, dy)]
    y, dx, dw = run(half[0], half[1], sizes, half[2], 'xla')
    assert {a.dtype.name for a in (y, dx, dw)} == {'bfloat16'}
    wide = truth(*(np.asarray(a, np.float32) for a in half[:2]), sizes, np.float32(half[2]))
    for got, expected in zip((y, dx, dw), wide, strict=True):  # one rounding, at the end
        np.testing.assert_allclose(np.float32(got), expected, atol=1e-3, rtol=2**-8)
    several = np.stack([sizes, sizes[::-1]])  # each lane its own sizes
    lanes = jax.vmap(lambda s: grouped_product(x, w, s))(several)
    for lane, own in zip(lanes, several, strict=True):
        np.testing.assert_allclose(lane, truth(x, w, own, dy)[0], atol=2e-5, rtol=1e-5)


def test_second_derivatives_of_the_rows_exist():
    x, w, sizes, _ = inputs(*SIZES['some'])
    f = lambda x: jnp.sum(jnp.sin(grouped_product(x, w, sizes)))  # noqa: E731
    got = jax.jvp(jax.grad(f), (x,), (jnp.ones_like(x),))[1]
    eager = lambda x: jnp.sum(jnp.sin(grouped_product(x, w, sizes, implementation='reference')))  # noqa: E731
    np.testing.assert_allclose(
        got, jax.jvp(jax.grad(eager), (x,), (jnp.ones_like(x),))[1], atol=1e-4
    )


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_costs_equal_the_walk(implementation):
    x, w, sizes, _ = inputs(*SIZES['some'])
    f = functools.partial(grouped_product, implementation=implementation)
    assert walk(f, x, w, sizes, strict=True).total == cost.executed_flops(
        implementation, len(x), K, N, len(w)
    )
    assert cost.executed_flops('xla', len(x), K, N, 5, form='ragged') == 2 * len(x) * K * N
    # With many rows little is filled up.
    rows, groups = 65536, 64
    share = cost.executed_flops('xla', rows, K, N, groups) / cost.model_flops(rows, K, N)
    assert 1 < share <= 1.13


def test_it_is_a_ragged_dot_on_tpus():
    x, w, sizes, _ = inputs(*SIZES['some'])
    with target('tpu'):
        text = str(jax.make_jaxpr(lambda *a: grouped_product(*a))(x, w, sizes))
        y = grouped_product(x, w, sizes)  # which the CPU expands
    assert 'ragged_dot' in text and last_choice('grouped_product')['form'] == 'ragged'
    np.testing.assert_allclose(y, truth(x, w, sizes, np.zeros((33, N)))[0], atol=2e-5, rtol=1e-5)


# Sizes of groups, rows, K, N. Rows are fewer than whole blocks, and blocks begin before an end.
WIDE = {
    'some': ([100, 0, 37, 60], 230, 128, 128),
    'several blocks': ([200, 130], 330, 128, 128),
    'wide': ([1, 129], 140, 256, 256),
    'wider': ([64, 63, 1], 128, 128, 256),
    'none': ([0, 0], 128, 128, 128),
}


@pytest.mark.filterwarnings('ignore:invalid value')  # of rows behind, in tiles; never written
@pytest.mark.parametrize(
    'name',
    [
        'some',
        *(pytest.param(n, marks=pytest.mark.ci) for n in ('several blocks', 'wide', 'none')),
        pytest.param('wider', marks=pytest.mark.slow),
    ],
)
def test_hopper_in_the_interpreter(name, interpreted):
    """Rows behind the groups are not finite, which no output shows."""
    sizes, rows, k, n = WIDE[name]
    rng = np.random.default_rng(5)
    w = rng.normal(size=(len(sizes), k, n)) / k**0.5
    x, w, dy = (
        np.array(jnp.asarray(a, jnp.bfloat16))
        for a in (rng.normal(size=(rows, k)), w, rng.normal(size=(rows, n)))
    )
    expected = truth(*(np.float32(a) for a in (x, w)), sizes, np.float32(dy))
    x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.inf
    with interpreted('pallas_gpu'):
        product = functools.partial(grouped_product, implementation='pallas_gpu')

        def f(x, w, sizes, dy):
            y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
            return y, *pull(dy)

        got = jax.block_until_ready(jax.jit(f)(x, w, np.asarray(sizes), dy))
    assert last_choice('grouped_product')['implementation'] == 'pallas_gpu'
    for a, wide in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16 and a.shape == wide.shape
        # One rounding to bfloat16, at the end, of sums of up to 200 products of order 1.
        np.testing.assert_allclose(np.float32(a), wide, atol=2e-3, rtol=2**-8)


def big(rows, groups, k, n, dtype=jnp.bfloat16):
    shape = jax.ShapeDtypeStruct
    return shape((rows, k), dtype), shape((groups, k, n), dtype), shape((groups,), jnp.int32)


@pytest.mark.parametrize('shape', [(8192, 8, 1024, 4096), (4096, 64, 2048, 1408)])
@pytest.mark.parametrize('lanes', [False, True])
def test_hopper_lowers_for_cuda(shape, lanes):
    """This decides on layouts and sees whether shared memory is enough; also a lane a seed."""

    def f(x, w, sizes):
        y = grouped_product(x, w, sizes, implementation='pallas_gpu')
        return jnp.sum(y.astype(jnp.float32) ** 2)

    arrays, grad = big(*shape), jax.grad(f, (0, 1))
    if lanes:
        arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), arrays)
        grad = jax.vmap(grad)
    with target('gpu'):
        lowered = jax.jit(grad).trace(*arrays).lower(lowering_platforms=('cuda',))
    assert lowered.as_text().count('custom_call @mosaic_gpu') == 3


def test_hopper_costs_equal_the_walk():
    arrays = big(8192, 8, 256, 512)
    f = functools.partial(grouped_product, implementation='pallas_gpu')
    with target('gpu'):
        walked = walk(f, *arrays, strict=True)
        back = walk(jax.grad(lambda *a: jnp.sum(f(*a).astype(jnp.float32)), (0, 1)), *arrays)
    assert walked.total == cost.executed_flops('pallas_gpu', 8192, 256, 512, 8)
    # dx and dw; the outputs are not needed for the gradients of their sum.
    assert back.kind('kernel') == walked.total + 2 * (8192 + 8 * cost.STEP) * 256 * 512


def test_places_take_each_row_once_from_whole_units_on():
    rng = np.random.default_rng(0)
    for groups in (1, 3, 9):
        sizes = rng.multinomial(700, rng.dirichlet(np.full(groups, 0.5)))
        for align, count in ((1, 6 + groups), (8, cost.hopper_blocks(700, groups - 1))):
            group, first, own = (
                np.asarray(a) for a in places(jnp.asarray(sizes), 128, count, align)
            )
            rows = np.concatenate([np.arange(a, a + n) for a, n in zip(first, own, strict=True)])
            np.testing.assert_array_equal(rows, np.arange(700))
            np.testing.assert_array_equal(np.repeat(group, own), np.repeat(range(groups), sizes))
            assert np.all(first % align + own <= 128)


def test_what_hopper_refuses_is_said():
    def refusal(*shape, dtype=jnp.bfloat16):
        with target('gpu'):
            jax.eval_shape(grouped_product, *big(*shape, dtype=dtype))
        chosen = last_choice('grouped_product')
        assert chosen['implementation'] == 'xla'  # until it has been measured
        return chosen['refused'].get('pallas_gpu')

    assert refusal(512, 4, 128, 256) is None
    assert refusal(512, 4, 128, 256, dtype=jnp.float32) == 'it takes bfloat16, not float32'
    assert refusal(512, 4, 96, 256) == 'it takes sides of multiples of 128, not 96 and 256'
    assert refusal(100, 4, 128, 256) == '100 rows are fewer than the 128 of one block'
    arrays = (jnp.zeros(a.shape, a.dtype) for a in big(128, 2, 128, 128))
    with pytest.raises(ValueError, match='it needs a Hopper GPU, not cpu'):
        grouped_product(*arrays, implementation='pallas_gpu')


def test_says_what_it_cannot_do():
    x, w, sizes, _ = inputs(*SIZES['some'])
    for args, message in (
        ((x[0], w, sizes), r'takes rows \[M, K\] and matrices \[E, K, N\] of the same K, E >= 1'),
        ((x[:, :2], w, sizes), r'not \[33, 2\] and \[5, 5, 3\]'),
        ((x, w[:0], sizes), 'E >= 1'),
        ((x, w, sizes[:2]), r'one for each of 5 groups, not int64 \[2\]'),
        ((x, w, sizes.astype(np.float32)), 'sizes are integers'),
        ((x, w.astype(jnp.bfloat16), sizes), 'rows are float32, matrices bfloat16; cast one'),
    ):
        with pytest.raises(ValueError, match=f'grouped_product.*{message}'):
            grouped_product(*args)
    with pytest.raises(ValueError, match='grouped_product'):
        grouped_product(x, w, sizes, implementation='cudnn')
