"""The jaxpr walk against counts by hand, and against XLA where there are no loops."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from effjax import kernels
from effjax.core.errors import ConfigError
from effjax.costs import flops, products, walk, walk_jaxpr
from effjax.kernels.attention.cost import executed_flops

N = 8
UNIT = 2 * N**3  # one product of two N x N matrices
X = jax.ShapeDtypeStruct((N, N), jnp.float32)
WS = jax.ShapeDtypeStruct((8, N, N), jnp.float32)


def unrolled(x, ws):
    for i in range(8):
        x = x @ ws[i]
    return x.sum()


def scanned(body, policy=None, remat=False):
    """A scan of `body` over the eight weights, its body rematerialised or not."""
    layer = jax.checkpoint(body, policy=policy) if remat else body
    return lambda x, ws: lax.scan(lambda c, w: (layer(c, w), None), x, ws)[0].sum()


def one(x, w):
    return x @ w


def two(x, w):
    return jnp.tanh(x @ w) @ w


def two_live(x, w):
    return jnp.tanh(two(x, w))


DOTS = jax.checkpoint_policies.dots_saveable


@pytest.mark.parametrize(
    ('fn', 'forward', 'train'),
    [
        (unrolled, 8, 24),
        (scanned(one), 8, 24),
        (jax.jit(scanned(one)), 8, 24),
        (scanned(one, remat=True), 8, 24),  # nothing in the body's gradient needs its product
        (scanned(two), 16, 48),
        (scanned(two, remat=True), 16, 56),  # the last recomputed product is dead code, so not 64
        (scanned(two_live, remat=True), 16, 64),  # here tanh needs it
        (scanned(two, DOTS, remat=True), 16, 48),
    ],
    ids=['unrolled', 'scan', 'jit', 'remat1', 'scan2', 'remat2', 'remat2_live', 'remat2_dots'],
)
def test_units(fn, forward, train):
    assert walk(fn, X, WS).total == forward * UNIT
    result = walk(jax.value_and_grad(fn, argnums=(0, 1)), X, WS)
    assert result.total == train * UNIT
    assert result.by_kind == {'matmul': train * UNIT}
    assert result.by_phase['forward'] == forward * UNIT
    assert result.by_phase['backward'] == 2 * forward * UNIT
    assert result.by_phase.get('recompute', 0) == (train - 3 * forward) * UNIT


def test_scopes_survive_jit_scan_remat_and_gradients():
    def layer(x, w):
        with jax.named_scope('ffn'):
            x = x @ w
        with jax.named_scope('mixer'):
            return jnp.tanh(x @ w) @ w

    def model(x, ws):
        with jax.named_scope('body'):
            x = jax.jit(scanned(layer, remat=True))(x, ws)
        return x

    result = walk(jax.value_and_grad(model, argnums=(0, 1)), X, WS)
    # ffn: forward, recomputed, two backward; mixer: the same for each product but the last
    # recomputed one.
    assert result.by_scope == {'body/ffn': 32 * UNIT, 'body/mixer': 56 * UNIT}


@pytest.mark.parametrize(
    ('fn', 'shapes'),
    [
        (lambda x, w: x @ w, [(4, 16), (16, 32)]),
        (lambda q, k: jnp.einsum('bthd,bshd->bhts', q, k), [(2, 5, 3, 8), (2, 7, 3, 8)]),
        (lambda x: jax.vmap(lambda a: a @ a.T)(x), [(3, 6, 4)]),
        (
            lambda x, w: lax.conv_general_dilated(
                x, w, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
            ),
            [(2, 16, 16, 3), (4, 4, 3, 8)],
        ),
        (
            lambda x, w: lax.conv_general_dilated(
                x, w, (1,), 'VALID', feature_group_count=6, dimension_numbers=('NWC', 'WIO', 'NWC')
            ),
            [(2, 9, 6), (4, 1, 6)],
        ),
    ],
    ids=['matmul', 'einsum', 'vmap', 'patches', 'depthwise'],
)
def test_agrees_with_xla_without_loops(fn, shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    # XLA books a group of a depthwise convolution and a transpose exactly as we do.
    assert walk(fn, *args).total == analysis['flops']


def test_gradient_of_a_strided_convolution_is_twice_its_forward():
    def patches(x, w):
        return lax.conv_general_dilated(
            x, w, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        ).sum()

    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    w = jax.ShapeDtypeStruct((4, 4, 3, 8), jnp.float32)
    forward = walk(patches, x, w)
    assert forward.by_kind == {'conv': 2.0 * 2 * 16 * 48 * 8}
    both = walk(jax.value_and_grad(patches, argnums=(0, 1)), x, w)
    assert both.total == 3 * forward.total


def test_fft_counts_5_n_log_n():
    x = jax.ShapeDtypeStruct((3, 1024), jnp.complex64)
    assert walk(jnp.fft.fft, x).by_kind == {'fft': 3 * 5 * 1024 * 10}
    real = jax.ShapeDtypeStruct((3, 1024), jnp.float32)
    assert walk(jnp.fft.rfft, real).total == 3 * 2.5 * 1024 * 10
    back = jax.ShapeDtypeStruct((3, 513), jnp.complex64)
    assert walk(jnp.fft.irfft, back).total == 3 * 2.5 * 1024 * 10


def test_grouped_product_counts_each_row_once():
    rows = jax.ShapeDtypeStruct((32, 4), jnp.float32)
    weights = jax.ShapeDtypeStruct((5, 4, 6), jnp.float32)
    sizes = jnp.asarray([8, 8, 8, 4, 4])

    def product(x, w):
        return lax.ragged_dot(x, w, sizes).sum()

    unit = 2 * 32 * 4 * 6
    assert walk(product, rows, weights).total == unit
    assert walk(jax.value_and_grad(product, argnums=(0, 1)), rows, weights).total == 3 * unit


def test_triangular_solve_and_cholesky():
    a, b = (
        jax.ShapeDtypeStruct((2, 6, 6), jnp.float32),
        jax.ShapeDtypeStruct((2, 6, 3), jnp.float32),
    )
    solve = lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True)  # noqa: E731
    assert walk(solve, a, b).total == 2 * 6 * 6 * 3
    assert walk(lax.linalg.cholesky, a).total == pytest.approx(2 * 6**3 / 3)


def test_cond_takes_the_dearest_branch():
    def fn(x):
        return lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert walk(fn, X).total == 2 * UNIT
    switch = lambda i, x: lax.switch(i, [lambda x: x, lambda x: x @ x, lambda x: x + 1], x)  # noqa: E731
    assert walk(switch, 1, X).total == UNIT


def test_while_needs_a_number_of_trips():
    def fn(x):
        with jax.named_scope('solver'):
            return lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ c, x)

    result = walk(fn, X)
    assert result.total is None
    assert result.counted == 0
    assert result.unknown == (
        "a while loop in scope 'solver' whose number of trips depends on data",
    )
    with pytest.raises(
        ConfigError, match=r"cannot count the FLOPs of a while loop in scope 'solver'"
    ):
        walk(fn, X, strict=True)
    assert walk(fn, X, while_trips={'solver': 7}).total == 7 * UNIT
    assert walk(fn, X, while_trips={'other': 7}).total is None


def test_loops_without_products_need_no_trips():
    def fn(key, n):
        return lax.while_loop(lambda i: i < n, lambda i: i + 1, 0), jax.random.normal(key, (4,))

    assert walk(fn, jax.random.key(0), 5).total == 0
    assert walk(lambda x: lax.fori_loop(0, 5, lambda i, c: c @ c, x), X).total == 5 * UNIT


def test_shard_map_counts_all_devices_of_the_manual_mesh():
    mesh = jax.make_mesh((1, 1), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
    fn = jax.shard_map(
        lambda x: x @ x, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )
    assert walk(jax.jit(fn), X).total == UNIT


@pytest.mark.mesh
def test_shard_map_multiplies_by_the_manual_axes():
    mesh = jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec('data')
    x = jax.ShapeDtypeStruct((4 * N, N), jnp.float32)
    whole = jax.shard_map(lambda x: x @ x.T @ x, mesh=mesh, in_specs=spec, out_specs=spec)
    assert walk(jax.jit(whole), x).total == 8 * 2 * UNIT  # tensor's two do the same work
    manual = jax.shard_map(
        lambda x: x @ x.T @ x, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={'data'}
    )
    assert walk(jax.jit(manual), x).total == 4 * 2 * UNIT


def test_custom_derivatives_are_walked_once():
    @jax.custom_vjp
    def f(x):
        return x @ x

    f.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g + x @ x,))

    @jax.custom_jvp
    def h(x):
        return x @ x

    h.defjvp(lambda primals, tangents: (h(*primals), tangents[0] @ primals[0]))
    assert walk(lambda x: f(x) + h(x), X).total == 2 * UNIT
    assert walk(jax.value_and_grad(lambda x: f(x).sum()), X).total == 4 * UNIT
    assert walk(jax.value_and_grad(lambda x: h(x).sum()), X).total == 2 * UNIT


def linear_recurrence(a, x):
    """h_t = a_t h_{t-1} + x_t by a token loop, [T, D]."""
    return lax.scan(lambda h, ax: ((new := h * ax[0] + ax[1]), new), jnp.zeros(x.shape[1]), (a, x))[
        1
    ]


def test_elementwise_recurrence_of_a_scan_counts():
    a = x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    assert walk(linear_recurrence, a, x).by_kind == {'scan': 2 * 64 * 16}
    # backward: the cotangent's recurrence (2) and the gate's gradient (1)
    grads = jax.value_and_grad(lambda a, x: linear_recurrence(a, x).sum(), argnums=(0, 1))
    assert walk(grads, a, x).by_kind == {'scan': 5 * 64 * 16}


def test_state_recurrence_counts_its_read_out_and_outer_product():
    def fn(q, k, v, g):  # S = g S + k v^T, o = q S
        def step(s, t):
            q, k, v, g = t
            s = s * g[:, None] + jnp.outer(k, v)
            return s, q @ s

        return lax.scan(step, jnp.zeros((4, 6)), (q, k, v, g))[1]

    q, v = jax.ShapeDtypeStruct((10, 4), jnp.float32), jax.ShapeDtypeStruct((10, 6), jnp.float32)
    result = walk(fn, q, q, v, q)
    assert result.kind('scan') == 10 * 2 * 4 * 6
    assert result.kind('matmul') == 10 * 2 * 4 * 6


def test_stacks_and_accumulators_are_no_recurrence():
    def norm(x):
        return x * lax.rsqrt((x * x).mean() + 1e-6)

    assert walk(scanned(lambda x, w: norm(x) @ w), X, WS).by_kind == {'matmul': 8 * UNIT}

    def accumulate(x, ws):
        return lax.scan(lambda c, w: (c + 2.0 * w, None), x, ws)[0]

    assert walk(accumulate, X, WS).total == 0

    def blockwise_softmax(q, ks):  # online softmax: its rescaling is not a recurrence of its own
        def step(carry, k):
            m, acc = carry
            s = q @ k
            new = jnp.maximum(m, s.max(-1))
            return (new, acc * jnp.exp(m - new)[:, None] + jnp.exp(s - new[:, None]) @ k), None

        return lax.scan(step, (jnp.zeros(N), jnp.zeros((N, N))), ks)[0][1]

    assert walk(blockwise_softmax, X, WS).by_kind == {'matmul': 16 * UNIT}


def test_associative_scan_counts_the_combining_function():
    def combine(p, q):
        return p[0] * q[0], p[1] * q[0] + q[1]

    def fn(a, x):
        return lax.associative_scan(combine, (a, x))[1]

    a = jax.ShapeDtypeStruct((1024,), jnp.float32)
    result = walk(jax.jit(fn), a, a)
    assert set(result.by_kind) == {'scan'}
    # Fewer than 2 N combinations; the last at each level of the tree do not need both outputs.
    assert 3 * 1.5 * 1024 < result.total <= 3 * 2 * 1024
    assert walk(jax.grad(lambda a, x: fn(a, x).sum()), a, a).kind('scan') > 2 * result.total


def test_cumulative_sums_count_floats_only():
    x = jax.ShapeDtypeStruct((4, 32), jnp.bfloat16)
    assert walk(lambda x: jnp.cumsum(x, 1), x).by_kind == {'scan': 128}
    ids = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    assert walk(lambda x: jnp.cumsum(x, 1), ids).total == 0


def double(x, cost=None, name='double'):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    estimate = cost and pl.CostEstimate(flops=cost, transcendentals=0, bytes_accessed=0)
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True, name=name,
        cost_estimate=estimate,
    )(x)  # fmt: skip


def test_pallas_kernels_by_their_own_cost():
    result = walk(lambda x: double(x, cost=64), X)
    assert result.by_kind == {'kernel': 64}
    assert result.by_primitive == {'double': 64}
    xs = jax.ShapeDtypeStruct((3, N, N), jnp.float32)
    assert walk(jax.vmap(lambda x: double(x, cost=64)), xs).total == 3 * 64


def test_pallas_kernels_by_a_registered_cost(monkeypatch):
    with pytest.raises(ConfigError, match=r"pallas_call 'double'; .*cost_estimate"):
        walk(double, X, strict=True)
    assert walk(double, X).total is None
    monkeypatch.setitem(flops.KERNELS, 'double', lambda call: 10.0 * call.inputs[0].shape[0])
    assert walk(double, X).total == 80
    module = types.ModuleType('kernel_costs_of_a_test')
    module.double = lambda call: 5.0 if call.params else None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(flops.KERNELS, 'doubl', 'nowhere:shorter_keys_come_later')
    monkeypatch.setitem(flops.KERNELS, 'double', f'{module.__name__}:double')
    assert walk(double, X).total == 5


def test_foreign_calls_and_decompositions_are_unknown():
    call = lambda x: jax.ffi.ffi_call('their_kernel', X)(x)  # noqa: E731
    assert walk(call, X).unknown == ("ffi_call 'their_kernel'",)
    assert walk(jnp.linalg.svd, X).total is None


def cudnn(mask, window=None, kv_heads=4):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention

    def fn(q, k, v):
        return cudnn_attention.dot_product_attention(
            q, k, v, mask_type=mask, sliding_window_length=window
        ).astype(jnp.float32).sum()  # fmt: skip

    q = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 128, kv_heads, 64), jnp.bfloat16)
    return fn, (q, k, k)


@pytest.mark.parametrize('window', [None, 32])
def test_cudnn_attention_by_formula(monkeypatch, window):
    from jax._src.cudnn import fused_attention_stablehlo as module

    monkeypatch.setattr(module, 'check_cudnn_version', lambda: 91000)  # tracing needs no cuDNN
    fn, args = cudnn(module.MaskType.CAUSAL, window, kv_heads=2)
    pairs = 128 * 129 // 2 if window is None else 32 * 33 // 2 + 96 * 32
    forward = 4 * 2 * 4 * 64 * pairs
    assert walk(fn, *args).by_kind == {'attention': forward}
    both = walk(jax.value_and_grad(fn, argnums=(0, 1, 2)), *args)
    assert both.by_phase == {'forward': forward, 'backward': 2.5 * forward}
    if window is None:
        fn, args = cudnn(module.MaskType.NO_MASK)
        assert walk(fn, *args).total == 4 * 2 * 4 * 64 * 128 * 128


@pytest.mark.parametrize(('mask', 'window'), [('causal', None), ('causal', 128), ('full', None)])
def test_splash_attention_by_the_pairs_its_caller_tells(mask, window):
    shape = (2, 512, 4, 128)
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 512, 2, 128), jnp.bfloat16)

    def fn(q, k, v):
        out = kernels.attention(q, k, v, mask=mask, window=window, implementation='splash')
        return out.astype(jnp.float32).sum()

    with kernels.target('tpu'):
        result = walk(jax.value_and_grad(fn, argnums=(0, 1, 2)), q, k, k, strict=True)
    forward = executed_flops('splash', *shape, mask=mask, window=window)
    assert result.by_phase['forward'] == forward
    # The products of the output with its cotangent, row by row, stand outside of the kernel.
    assert result.by_kind == {'kernel': 3.5 * forward, 'matmul': 2 * 2 * 512 * 4 * 128}
    assert not any('pairs' in scope for scope in result.by_scope)


def test_unfused_splash_kernels():
    q, lse = jax.ShapeDtypeStruct((4, 512, 64), jnp.bfloat16), jnp.zeros(())
    ints = jax.ShapeDtypeStruct((1, 1, 1), jnp.int8)

    def cost(name, outputs, pairs=1000):
        call = products.KernelCall(name, (ints, q, q, q, lse), (q,) * outputs, {}, pairs)
        return products.splash_attention(call)

    unit = 2 * 4 * 64 * 1000  # one product
    assert cost('splash_mha_dq_no_residuals', 1) == 3 * unit
    assert cost('splash_mha_dkv_no_residuals', 2) == 4 * unit
    assert cost('splash_mha_fwd_residuals', 2, pairs=None) is None


def test_walk_of_a_traced_step_equals_walk_of_the_function():
    step = jax.jit(jax.value_and_grad(scanned(two, remat=True), argnums=1))
    traced = step.trace(X, WS)
    assert walk_jaxpr(traced.jaxpr).total == walk(step, X, WS).total > 0
    out = jnp.asarray(np.eye(N, dtype=np.float32))
    assert walk(step, out, jnp.stack([out] * 8)).total == walk(step, X, WS).total
