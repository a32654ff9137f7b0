"""Sparse masks: the plan holds exactly the dense mask, and the gathered form computes with it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.costs import walk
from effjax.kernels import MaskSpec, attention, last_choice
from effjax.kernels.attention import cost
from effjax.kernels.attention.mask import pairs, plan

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
SPECS = {
    'both sides': MaskSpec(False, 5),
    'longformer': MaskSpec(False, 5, global_tokens=3),
    'causal longformer': MaskSpec(True, 5, global_tokens=3),
    'dilated': MaskSpec(False, 12, stride=3, global_tokens=2),
    'dilated causal': MaskSpec(True, 9, stride=3),
    'bigbird': MaskSpec(False, 2, block=4, global_tokens=4, last_tokens=4, random=2),
    'causal bigbird': MaskSpec(True, 2, block=4, global_tokens=4, random=2, seed=3),
    'table': MaskSpec(False, 2, block=8, random=1, table=tuple((n * 3 % 7,) for n in range(40))),
    'rows': MaskSpec(False, segment=7, global_tokens=1),
    'columns': MaskSpec(False, stride=7, global_tokens=1),
    'segments': MaskSpec(True, segment=12, stride=2),
    'longnet': MaskSpec(
        False,
        branches=(MaskSpec(False, segment=6), MaskSpec(False, segment=24, stride=3, offset=1)),
    ),
    'causal longnet': MaskSpec(
        branches=(MaskSpec(segment=4), MaskSpec(segment=32, stride=4, offset=3))
    ),
}
ONE = {name: spec for name, spec in SPECS.items() if not spec.branches}
EACH = pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
# Programs of their own for each mask: one of each kind, and the others in the tier `slow`. What
# each mask allows, and that its plan holds just that, is tested of all without compiling.
QUICK = ('longformer', 'dilated causal', 'causal bigbird', 'table', 'columns', 'causal longnet')
COMPILED = pytest.mark.parametrize(
    'spec',
    [
        pytest.param(spec, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, spec in SPECS.items()
    ],
)


def inputs(length, heads=4, kv_heads=2, size=3):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, length, heads, size), *[(2, length, kv_heads, size)] * 2)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize('length', [1, 13, 40, 65])
@pytest.mark.parametrize('spec', [*ONE.values(), SPECS['longnet'].branches[1]])
def test_a_plan_holds_each_allowed_pair_once(spec, length):
    made, dense = plan(spec, length), spec.dense(length)
    assert made.order.size == made.table.shape[0] * spec.size(length)
    tokens = made.order.reshape(len(made.table), -1)
    seen = np.zeros((length, length), int)
    for mine, blocks in zip(tokens, made.table, strict=True):
        i = np.setdiff1d(mine[mine >= 0], made.rows)
        j = tokens[blocks[blocks >= 0]].ravel()
        seen[np.ix_(i, np.setdiff1d(j[j >= 0], made.shared))] += 1
        seen[np.ix_(i, made.shared)] += 1
    seen[made.rows] += 1
    assert seen.max() <= 1 and np.all(seen[dense])
    assert pairs(spec, length) == dense.sum()


@pytest.mark.parametrize('length', [65, 300])
@pytest.mark.parametrize('spec', [*ONE.values(), SPECS['longnet'].branches[1]])
def test_only_blocks_that_hold_a_pair_are_scored(spec, length):
    """A plan names no block of the ordered mask that is empty, and each that is not, once."""
    made, dense = plan(spec, length), spec.dense(length)
    tokens = made.order.reshape(len(made.table), -1)

    def full(dense):
        return {
            (n, m)
            for n, mine in enumerate(tokens)
            for m, theirs in enumerate(tokens)
            if dense[np.ix_(mine[mine >= 0], theirs[theirs >= 0])].any()
        }

    named = [(n, int(m)) for n, blocks in enumerate(made.table) for m in blocks if m >= 0]
    assert len(set(named)) == len(named) and set(named) <= full(dense)
    # What all see, and who sees all, is scored beside the blocks.
    rest = dense.copy()
    rest[:, made.shared], rest[made.rows] = False, False
    assert full(rest) <= set(named)


def test_masks_mean_what_they_say():
    rows = MaskSpec(False, segment=3).dense(6)
    np.testing.assert_array_equal(rows, np.kron(np.eye(2), np.ones((3, 3))))
    columns = MaskSpec(False, stride=3).dense(6)
    np.testing.assert_array_equal(columns, np.kron(np.ones((2, 2)), np.eye(3)))
    wide = MaskSpec(False, 2, global_tokens=1).dense(4)
    np.testing.assert_array_equal(wide, [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]])
    bird = MaskSpec(True, 1, block=2, random=1).dense(64)
    by_block = bird[1::2, ::2].sum(1)  # blocks that a block's last token sees
    assert by_block[0] == 1 and np.all(by_block[1:] == 2) and not np.triu(bird, 1).any()
    assert np.any(bird != MaskSpec(True, 1, block=2, random=1, seed=1).dense(64))


@pytest.mark.ci
@COMPILED
def test_gathered_equals_dense_with_gradients(spec):
    length = 300
    q, k, v = inputs(length)
    weight = jnp.sin(jnp.arange(q.size).reshape(q.shape))

    def run(implementation, mask):
        f = lambda *a: attention(*a, mask=mask, implementation=implementation)  # noqa: E731
        loss = lambda *a: (jnp.sum(f(*a) * weight), f(*a))  # noqa: E731
        return jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, o), grads = run('xla', spec)
    choice = last_choice('attention')
    assert choice['form'] == 'gather' and json.loads(json.dumps(choice))['spec'] == spec.words()
    # The reference knows no plans; a mask of branches counts its pairs, which it does too.
    dense = spec if spec.branches else jnp.asarray(spec.dense(length))
    (_, expected), expected_grads = run('reference', dense)
    # float32 sums of up to 300 terms in another order
    np.testing.assert_allclose(o, expected, atol=2e-6)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


@EACH
def test_no_array_of_all_pairs(spec):
    length = 2048
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)] * 3
    loss = lambda q, k, v: attention(q, k, v, mask=spec, implementation='xla').sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*shapes)

    def largest(jaxpr):
        out = 0
        for equation in jaxpr.eqns:
            out = max([out, *(v.aval.size for v in equation.outvars if hasattr(v.aval, 'size'))])
            for inner in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(inner, 'jaxpr', inner)
                out = max(out, largest(inner) if hasattr(inner, 'eqns') else 0)
        return out

    # A column of 7 is 2048 / 7 tokens long; the others see far less.
    limit = length**2 // (2 if spec == SPECS['columns'] else 4)
    assert 0 < largest(program.jaxpr) < limit


@EACH
def test_costs_equal_the_walk(spec):
    length = 400
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length))
    walked = walk(lambda *a: attention(*a, mask=spec, implementation='xla'), q, k, v)
    assert walked.total == cost.executed_flops('xla', 2, length, 4, 3, mask='sparse', spec=spec)


@pytest.mark.ci
@pytest.mark.parametrize(
    ('form', 'spec'),
    [
        pytest.param(form, spec, id=f'{form}-{name}', marks=() if ci else pytest.mark.slow)
        for name, spec in SPECS.items()
        for form in ('dense', 'blocks')
        for ci in [form == 'blocks' or name in QUICK]  # both allow pairs by the same function
    ],
)
def test_documents_are_masked_by_their_own_places(spec, form, monkeypatch):
    if spec.table is not None:
        with pytest.raises(ValueError, match='a table of blocks takes no documents'):
            attention(*inputs(8), mask=spec, segment_ids=jnp.ones((2, 8), int))
        return
    lengths = [23, 1, 14]
    ids = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(4, int)])
    q, k, v = inputs(len(ids))
    if form == 'blocks':
        monkeypatch.setattr(cost, 'DENSE_MAX', 8)
        monkeypatch.setattr(cost, 'BLOCK', 16)
    documents = functools.partial(attention, mask=spec, implementation='xla')
    got = np.asarray(jit(documents)(q, k, v, segment_ids=np.stack([ids] * 2)))
    start = 0
    for n in lengths:
        part = [np.asarray(x)[:, start : start + n] for x in (q, k, v)]
        mask = spec if spec.branches else jnp.asarray(spec.dense(n))
        alone = jit(functools.partial(attention, mask=mask, implementation='reference'))(*part)
        np.testing.assert_allclose(got[:, start : start + n], alone, atol=2e-6)
        start += n
    assert not np.any(got[:, start:])


PACKED = {
    **{name: spec for name, spec in SPECS.items() if spec.packed() is not None},
    'rows alone': MaskSpec(False, segment=7),
    'columns alone': MaskSpec(False, stride=7),
    'causal table': MaskSpec(segment=9, global_tokens=2),
    'near blocks': MaskSpec(False, 2, block=4),
}


FEW = ('causal longformer', 'causal longnet', 'columns alone', 'rows alone', 'near blocks')


@pytest.mark.ci
@pytest.mark.parametrize(
    'spec',
    [
        pytest.param(spec, id=name, marks=() if name in FEW else pytest.mark.slow)
        for name, spec in PACKED.items()
    ],
)
def test_packed_rows_are_gathered(spec):
    """Values, gradients and FLOPs; the plan is the row's, what is allowed each document's."""
    lengths = [101, 3, 150, 40]
    row = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(26, int)])
    ids = jnp.asarray([row, np.where(np.arange(320) < 199, 1, 2)])
    q, k, v = inputs(320)
    weight = jnp.sin(jnp.arange(q.size).reshape(q.shape))

    def run(implementation):
        f = lambda *a: attention(*a, mask=spec, segment_ids=ids, implementation=implementation)  # noqa: E731
        loss = lambda *a: (jnp.sum(f(*a) * weight), f(*a))  # noqa: E731
        return jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, o), grads = run('xla')
    assert last_choice('attention')['form'] == 'gather'
    (_, expected), expected_grads = run('reference')
    np.testing.assert_allclose(o, expected, atol=2e-6)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    program = lambda *a: attention(*a, mask=spec, segment_ids=ids, implementation='xla')  # noqa: E731
    executed = cost.executed_flops('xla', 2, 320, 4, 3, mask='sparse', spec=spec, packed=True)
    assert walk(program, q, k, v).total == executed
    # Longer rows: a small part of the pairs, but for columns, which are T / 7 long.
    share = cost.executed_pairs('xla', 4096, mask='sparse', spec=spec, packed=True) / 4096**2
    assert share < (0.3 if spec.stride == 7 else 0.03)


def test_what_depends_on_a_documents_place_alone_is_not_gathered():
    """Random blocks, last tokens, tokens that see all, and many global tokens."""
    for spec in (
        SPECS['bigbird'], SPECS['causal bigbird'], SPECS['longformer'], SPECS['rows'],
        MaskSpec(True, 5, global_tokens=64), MaskSpec(False, 2, block=4, last_tokens=4), MaskSpec(),
    ):  # fmt: skip
        assert spec.packed() is None
    mask = SPECS['longformer']
    executed = cost.executed_pairs('xla', 2048, mask='sparse', spec=mask, packed=True)
    assert executed == 2048**2 > 10 * cost.executed_pairs('xla', 2048, mask='sparse', spec=mask)
    causal = cost.executed_pairs(
        'xla', 2048, mask='sparse', spec=SPECS['causal bigbird'], packed=True
    )
    assert causal == 10 * cost.BLOCK**2  # what lies ahead in the row is never scored


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_branches_are_mixed_by_their_denominators(implementation):
    """LongNet's equation: outputs of dilated attentions, weighed by their softmax's sums."""
    q, k, v = (np.asarray(x, np.float64) for x in inputs(96, heads=1, kv_heads=1))
    spec = SPECS['longnet']
    total, outputs = 0.0, 0.0
    for branch in spec.branches:
        weights = np.exp(np.einsum('bihd,bjhd->bij', q, k) / 3**0.5) * branch.dense(96)
        total = total + weights.sum(-1)
        outputs = outputs + np.einsum('bij,bjhd->bihd', weights, v)
    got = attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask=spec, implementation=implementation
    )
    np.testing.assert_allclose(got, outputs / total[..., None, None], atol=2e-6)


@pytest.mark.parametrize('spec', [*ONE.values(), *SPECS['causal longnet'].branches])
def test_reach_bounds_what_is_near(spec):
    """Beside globals nobody sees further, and somebody sees as far as blocks and strides let."""
    if spec.reach is None:
        assert spec.random or (spec.stride and not spec.window and not spec.segment)
        return
    dense = spec.dense(60)
    first, last = spec.global_tokens, 60 - spec.last_tokens
    i, j = np.nonzero(dense[first:last, first:last])
    furthest = np.max(np.abs(i - j))
    assert furthest < spec.reach <= furthest + max(1, spec.stride or 1)


@pytest.mark.ci
def test_masks_by_head():
    """Row and column heads (MATE), two of each, with grouped keys and values."""
    masks = [SPECS['rows'], SPECS['columns'], SPECS['rows'], SPECS['columns']]
    q, k, v = inputs(70)
    got = attention(q, k, v, mask=masks)
    for h, spec in enumerate(masks):
        key, value = (x[:, :, h // 2 : h // 2 + 1] for x in (k, v))
        mask = jnp.asarray(spec.dense(70))
        alone = attention(q[:, :, h : h + 1], key, value, mask=mask, implementation='reference')
        np.testing.assert_allclose(got[:, :, h], alone[:, :, 0], atol=2e-6)
    # A row head's output does not move with another row's token that is not global.
    moved = attention(q, k.at[:, 30].add(1.0), v, mask=masks)
    assert not np.any((moved - got)[:, 7:28, 0]) and np.any((moved - got)[:, 28:35, 0])
    # The gradient of row 1 of a row head: zero in other rows but for the global token's.
    for of in (1, 2):
        row = lambda *kv: attention(q, *kv, mask=masks)[:, 7:14, 0].sum()  # noqa: E731
        slope = np.asarray(jax.grad(row, argnums=of - 1)(k, v))
        assert not slope[:, 1:7].any() and not slope[:, 14:].any()
        assert slope[:, 7:14].any() and slope[:, 0].any()


def test_what_it_refuses():
    q, k, v = inputs(8)
    for arguments, message in (
        ({'window': 0}, 'window of a mask is at least 1, not 0'),
        ({'random': 1}, 'random blocks need block'),
        ({'last_tokens': 1}, 'which causal forbids; use global_tokens'),
        ({'block': 2, 'stride': 2}, 'either block or stride'),
        ({'stride': 2, 'offset': 2}, 'offset is from 0 to stride - 1, not 2'),
        ({'window': 2, 'branches': (MaskSpec(),)}, 'nothing beside them but causal'),
        ({'branches': (MaskSpec(False),)}, 'as causal as their mask'),
        ({'global_tokens': -1}, 'no fewer than 0 global tokens'),
    ):
        with pytest.raises(ValueError, match=message):
            MaskSpec(**arguments)
    with pytest.raises(ValueError, match='2 masks for 4 heads; give one for each'):
        attention(q, k, v, mask=[MaskSpec()] * 2)
    with pytest.raises(ValueError, match='over 1 queries and 8 keys needs positions'):
        attention(q[:, :1], k, v, mask=SPECS['longformer'])
    places = jnp.zeros((2, 8), int)
    with pytest.raises(ValueError, match='need whole documents, without positions'):
        attention(q, k, v, mask=SPECS['bigbird'], q_positions=places, kv_positions=places)
