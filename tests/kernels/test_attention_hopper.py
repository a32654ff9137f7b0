"""Attention's kernels for Hopper GPUs: in the interpreter against float32, lowered, counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.costs import walk
from effjax.kernels import MaskSpec, attention, last_choice, save_attention, target
from effjax.kernels.attention import cost, hopper, hopper_plan, op

SPECS = {
    'window and globals': MaskSpec(True, 100, global_tokens=3),
    'both sides': MaskSpec(False, 90),
    'segments': MaskSpec(True, segment=128),
    'strides': MaskSpec(True, 50, stride=3),
    'every fourth': MaskSpec(True, stride=4, offset=1),  # the others see nothing
    'all kinds': MaskSpec(False, 2, block=16, global_tokens=4, last_tokens=4, random=2),
}
DOCUMENTS = np.repeat(np.array([[1, 2, 0, 3, 0]], np.int32), [70, 100, 20, 130, 30], axis=1)


def inputs(length=350, keys=None, heads=1, kv_heads=1, dim=64, dtype=jnp.bfloat16, batch=1):
    rng = np.random.default_rng(0)
    keys = length if keys is None else keys
    shapes = ((length, heads), (keys, kv_heads), (keys, kv_heads), (length, heads))
    return [jnp.asarray(rng.normal(size=(batch, n, h, dim)), dtype) for n, h in shapes]


def run(arrays, implementation, **call):
    """(output, gradients of q, k and v)."""

    def f(q, k, v, do):
        o = attention(q, k, v, implementation=implementation, **call)
        return jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32)), o

    both = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))
    (_, o), grads = both(*arrays)
    assert last_choice('attention')['implementation'] == (implementation or 'pallas_gpu')
    return o, *grads


def errors(arrays, monkeypatch, **call):
    """Relative errors of output and gradients in the interpreter, where races raise."""
    monkeypatch.setattr(hopper, 'STAGED', True)
    params = plgpu.InterpretGPUParams(detect_races=True)
    with target('gpu'), plgpu.force_gpu_interpret_mode(params):
        got = jax.block_until_ready(run(arrays, 'pallas_gpu', **call))
    assert all(x.dtype == jnp.bfloat16 for x in got)
    expected = run([x.astype(jnp.float32) for x in arrays], 'reference', **call)
    if call.get('segment_ids') is not None:
        assert all(not np.any(np.asarray(x)[call['segment_ids'] == 0]) for x in (*got, *expected))
    return [
        np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b))
        for a, b in zip(got, expected, strict=True)
    ]


CASES = {
    'causal': (inputs, {}),
    'full': (functools.partial(inputs, 200, 300, heads=2), {'mask': 'full'}),
    'window': (functools.partial(inputs, dim=128), {'window': 150}),
    'soft cap': (inputs, {'soft_cap': 2.0, 'scale': 0.2}),
    'documents': (inputs, {'mask': 'full', 'segment_ids': DOCUMENTS}),
    'shared keys': (functools.partial(inputs, 256, heads=4, kv_heads=2, batch=2), {}),
    **{name: (inputs, {'mask': spec}) for name, spec in SPECS.items()},
    'window of documents': (
        functools.partial(inputs, 230),
        {'mask': SPECS['both sides'], 'segment_ids': DOCUMENTS[:, :230], 'soft_cap': 2.0},
    ),
}
# The kernels see lists of blocks and their patterns; `test_lists_say_the_mask` has all of these.
BY_HAND = ('both sides', 'segments', 'strides')


@pytest.mark.ci
@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=pytest.mark.slow if n in BY_HAND else ()) for n in CASES]
)
def test_values_and_gradients_in_the_interpreter(name, monkeypatch):
    make, call = CASES[name]
    # Weights, their gradients and results are rounded to 8 bits; sums are float32.
    assert max(errors(make(), monkeypatch, **call)) < 2**-7


@pytest.mark.ci
@pytest.mark.parametrize('size', [(2, 64), (2, 128), (3, 64)])
def test_other_sizes_of_rings(size, monkeypatch):
    for kernel in ('forward', 'queries', 'keys'):
        monkeypatch.setitem(hopper.SIZES, (kernel, 64), size)
    call = {'mask': SPECS['window and globals']}
    assert max(errors(inputs(heads=2), monkeypatch, **call)) < 2**-7


@pytest.mark.ci
def test_great_scores_stay_finite_and_right(monkeypatch):
    """Scores of hundreds: a softmax of nearly one key."""
    q, *rest = inputs(200)
    assert max(errors([q * 50, *rest], monkeypatch)[:1]) < 2**-7


@pytest.mark.parametrize('length', [200, 512])
@pytest.mark.parametrize('by_keys', [False, True], ids=['queries', 'keys'])
@pytest.mark.parametrize(
    ('kind', 'window', 'spec'),
    [
        ('causal', None, None),
        ('causal', 150, None),
        ('full', None, None),
        *[('sparse', None, spec) for spec in SPECS.values()],
    ],
    ids=['causal', 'window', 'full', *SPECS],
)
def test_lists_say_the_mask(kind, window, spec, by_keys, length):
    mask = hopper_plan.mask_of(kind, window, spec, length, length)
    made, size = hopper_plan.lists(mask, by_keys), 128
    count = -(-length // size)
    i, j = np.ogrid[: count * size, : count * size]
    truth = (spec or MaskSpec(kind == 'causal', window)).allowed(i, j, np.full((1, 1), length))
    inside = truth & (i < length) & (j < length)
    truth = truth & (j < length)
    found, seen = np.zeros_like(truth), 0
    limits = (i - j >= (-(2**30) if mask.low is None else mask.low)) & (j < length)
    limits &= i - j <= (2**30 if mask.high is None else mask.high)
    assert sorted(made.heads[:, 0]) == list(range(count))
    assert list(made.heads[:, 3]) == sorted(made.heads[:, 3], reverse=True)
    for block, begin, whole, steps in made.heads:
        for n, (other, pattern) in enumerate(made.items[begin : begin + steps]):
            row, column = (other, block) if by_keys else (block, other)
            at = np.s_[row * size : row * size + size, column * size : column * size + size]
            assert inside[at].any() and not found[at].any()
            if n < whole:
                found[at] = True
            elif spec is None or mask.spec is None:
                found[at] = limits[at]
            else:
                tile = made.patterns[pattern].astype(bool)
                found[at] = tile.T if by_keys else tile
            seen += 1
    np.testing.assert_array_equal(found[:length], (found & truth)[:length])
    np.testing.assert_array_equal(found & inside, inside)
    assert seen == hopper_plan.visited(mask)


def test_no_block_above_the_diagonal_is_visited():
    """Under a causal mask the kernels are FlashAttention-2: 36 of 64 blocks, in both passes."""
    mask = hopper_plan.mask_of('causal', None, None, 1024, 1024)
    for by_keys in (False, True):
        made = hopper_plan.lists(mask, by_keys)
        assert made.heads[:, 3].sum() == 36 == 8 * 9 // 2 and len(made.items) == 36
    for number, begin, whole, count in hopper_plan.lists(mask).heads:
        assert set(made_by(mask, begin, count)) == set(range(number + 1)) and whole == number
    assert cost.executed_pairs('pallas_gpu', 1024) == 36 * 128**2
    assert cost.executed_pairs('pallas_gpu', 8192, window=1024) == (9 * 64 - 36) * 128**2
    assert cost.executed_pairs('pallas_gpu', 130, 10, mask='full') == 2 * 128**2


def made_by(mask, begin, count):
    return hopper_plan.lists(mask).items[begin : begin + count, 0].tolist()


def shapes(batch, length, heads, kv_heads, dim, dtype=jnp.bfloat16):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    keys = array((batch, length, kv_heads, dim))
    return array((batch, length, heads, dim)), keys, keys


LARGE = [
    ((1, 1024, 8, 2, 128), {'mask': SPECS['window and globals']}),
    ((4, 2048, 16, 16, 64), {'soft_cap': 30.0}),
    ((2, 1000, 4, 1, 128), {'mask': SPECS['both sides'], 'documents': True, 'soft_cap': 20.0}),
]


@pytest.mark.parametrize(
    ('shape', 'call'), [LARGE[0], *[pytest.param(*x, marks=pytest.mark.ci) for x in LARGE[1:]]]
)
def test_lowers(shape, call):
    """This decides on layouts and sees whether shared memory is enough."""
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32) if 'documents' in call else None
    call = {name: x for name, x in call.items() if name != 'documents'}

    def f(q, k, v, ids):
        o = attention(q, k, v, segment_ids=ids, implementation='pallas_gpu', **call)
        return jnp.sum(o.astype(jnp.float32))

    with target('gpu'):
        traced = jax.jit(jax.grad(f, (0, 1, 2))).trace(*shapes(*shape), ids)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert last_choice('attention')['implementation'] == 'pallas_gpu'
    assert text.count('custom_call @mosaic_gpu') == 3


@pytest.mark.ci
def test_under_vmap_scan_and_remat():
    """As models call it; with output and log-sum-exp saved the forward kernel runs once."""

    def kernels(policy):
        def layer(x, _):
            return x + attention(x, x, x, implementation='pallas_gpu'), None

        def model(x):
            x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), x, length=2)
            return jnp.sum(x.astype(jnp.float32))

        x = jax.ShapeDtypeStruct((2, 1, 256, 2, 64), jnp.bfloat16)
        with target('gpu'):
            traced = jax.jit(jax.vmap(jax.grad(model))).trace(x)
            text = traced.lower(lowering_platforms=('cuda',)).as_text()
        return text.count('custom_call @mosaic_gpu')

    assert (kernels(save_attention), kernels(None)) == (3, 4)


def test_costs_against_the_walk():
    shape, spec = (2, 300, 4, 2, 64), SPECS['window and globals']
    for call in ({'mask': spec}, {'window': 100}):
        f = functools.partial(attention, implementation='pallas_gpu', **call)
        with target('gpu'):
            walked = walk(f, *shapes(*shape), strict=True)
            both = walk(jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1, 2)), *shapes(*shape))  # noqa: B023
        facts = {'mask': 'sparse', 'spec': spec} if 'mask' in call else call
        expected = cost.executed_flops('pallas_gpu', 2, 300, 4, 64, **facts)
        assert walked.by_kind == {'kernel': expected}
        assert both.kind('kernel') == 4.5 * expected  # 2 products, and 3 and 4


@pytest.mark.parametrize(
    ('shape', 'call', 'why'),
    [
        ((1, 128, 1, 1, 64), {'dtype': jnp.float32}, 'it takes bfloat16, not float32'),
        ((1, 128, 1, 1, 32), {}, 'it takes a head_dim of 64 or 128, not 32'),
        ((1, 128, 1, 1, 64), {'scale': -1.0}, 'it needs a scale above 0, not -1.0'),
        ((1, 128, 1, 1, 64), {'mask': np.ones((128, 128), bool)}, 'its masks are static'),
        (
            (1, 128, 1, 1, 64),
            {'mask': SPECS['segments'], 'segment_ids': jnp.ones((1, 128), jnp.int32)},
            'a MaskSpec of places in the row',
        ),
        (
            (1, 128, 1, 1, 64),
            {'mask': MaskSpec(branches=(MaskSpec(segment=4), MaskSpec(stride=4)))},
            'a mask of branches mixes several',
        ),
        ((1, 128, 1, 1, 64), {'dropout': 0.1, 'rng': 0}, 'it has no dropout'),
        ((0, 128, 1, 1, 64), {}, 'it takes no empty arrays'),
    ],
)
def test_what_it_refuses(shape, call, why):
    call = dict(call)
    dtype = call.pop('dtype', jnp.bfloat16)
    if 'rng' in call:
        call['rng'] = jax.random.key(0)
    with target('gpu'):
        arrays = shapes(*shape, dtype=dtype)
        jax.eval_shape(lambda *a: attention(*a, implementation='xla', **call), *arrays)
    assert why in last_choice('attention')['refused']['pallas_gpu']


def test_the_order_of_implementations():
    """By its name only until it has been measured."""
    assert list(op._IMPLEMENTATIONS)[2:4] == ['xla', 'pallas_gpu']
    with target('gpu'):
        for call, refused in (({}, False), ({'soft_cap': 2.0}, True)):
            f = functools.partial(attention, implementation='pallas_gpu', **call)
            jax.eval_shape(f, *shapes(1, 128, 1, 1, 64))
            chosen = last_choice('attention')
            assert chosen['implementation'] == 'pallas_gpu'
            assert ('cudnn' in chosen['refused']) == refused
    q, k, v, _ = inputs(8)
    with pytest.raises(ValueError, match='cannot run as .pallas_gpu.: it needs a Hopper GPU, not'):
        attention(q, k, v, implementation='pallas_gpu')
