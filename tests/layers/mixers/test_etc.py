"""ETC's four pieces of attention against a dense masked one in numpy; what labels and groups do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.core.trees import flatten
from effjax.costs import walk
from effjax.kernels.labelled_attention import cost as kernel_cost
from effjax.layers.mixers.etc import ETC

WIDTH, HEADS, DIM, GLOBALS, RADIUS, CLIP = 6, 2, 3, 5, 3, 2
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
# Two rows of 21 tokens: documents of odd lengths with padding, groups in them, tokens without one.
SEGMENTS = np.array([[1] * 7 + [2] * 1 + [0] * 2 + [3] * 11, [1] * 13 + [2] * 5 + [0] * 3])
GROUPS = np.array(
    [
        [0, 0, 0, 1, 1, 1, 1, 2, -1, -1, 3, 3, 3, 3, -1, 4, 4, 4, 4, 4, 4],
        [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1, 2, 2, 3, 3, 3, -1, -1, -1],
    ]
)
OWNERS = np.array([[1, 1, 2, 3, 3], [1, 1, 2, 2, 0]])  # documents of the global tokens
KINDS = {
    'plain': {},
    'shared': {'shared': True},
    'hard': {'g2l': 'group', 'shared': True, 'bias': True},
    'groups apart': {'l2l': 'group', 'clip': 0},
    'all said': {'g2l': 'group', 'l2l': 'group', 'bias': True},
}


def make(few=GLOBALS, compute='float32', param='float32', **config):
    context = Context(
        WIDTH, Policy(param=param, compute=compute), causal=False, init='lecun', globals=few
    )
    facts = {'heads': HEADS, 'head_dim': DIM, 'radius': RADIUS, 'clip': CLIP, **config}
    mixer = ETC(context, **facts, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    noise = lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape, p.dtype)  # noqa: E731
    return mixer, graphdef, jax.tree.map(noise, nnx.to_pure_dict(params))


@functools.partial(jit, static_argnums=0)
def forward(graphdef, params, x, info):
    return nnx.merge(graphdef, params)(x, info=info)[0]


def row_info(groups=GROUPS, segments=SEGMENTS, owners=OWNERS, **kw):
    """Global tokens in front of long ones, as the model makes it."""
    number = np.broadcast_to(np.arange(owners.shape[1]), owners.shape)
    both = [np.concatenate(pair, 1) for pair in ((owners, segments), (number, groups))]
    ids, groups = (jnp.asarray(a, jnp.int32) for a in both)
    return SeqInfo(jnp.zeros_like(ids), ids, groups=groups, **kw)


def inputs(length=SEGMENTS.shape[1], dtype=np.float32):
    x = np.random.default_rng(0).normal(size=(2, GLOBALS + length, WIDTH))
    return x.astype(dtype)


def oracle(params, x, groups, segments, owners, *, radius=RADIUS, g2l='all', l2l='all', **_):
    """Every pair of tokens: whether it is seen, and which vector joins its key; then softmax."""
    p = {'/'.join(map(str, k)): np.asarray(v, np.float64) for k, v in leaves(params)}
    few, total = owners.shape[1], x.shape[1]

    def project(name, b, i):
        o = np.einsum('d,dhk->hk', x[b, i], p[f'{name}/kernel'])
        return o + p.get(f'{name}/bias', 0)

    def named(what, i, j=None):
        """The projection of token i for itself, or as what token j reads of it."""
        if 'global_out/kernel' not in p:
            return what
        if j is None:
            return ('global_' if i < few else '') + what
        kind = 'lg'[int(j < few)] + '2' + 'lg'[int(i < few)]
        return what if kind == 'l2l' else f'{kind}_{what}'

    def clipped(table, distance):
        clip = (len(table) - 1) // 2
        return table[min(max(distance, -clip), clip) + clip]

    def pair(b, i, j):
        """The vector of query i's pair with key j, or None where it is not seen."""
        if i < few and j < few:
            return clipped(p['g2g_label'], j - i) if owners[b, i] == owners[b, j] else None
        if i >= few and j >= few:
            a, c = i - few, j - few
            seen = abs(a - c) <= radius and segments[b, a] == segments[b, c]
            if l2l == 'group':
                seen = seen and groups[b, a] == groups[b, c]
            return clipped(p['l2l_label'], j - i) if seen else None
        g, t = (i, j - few) if i < few else (j, i - few)
        if owners[b, g] != segments[b, t]:
            return None
        belongs = int(groups[b, t] == g)
        if i < few and g2l == 'group' and not belongs:
            return None
        return p['g2l_label' if i < few else 'l2g_label'][belongs]

    out = np.zeros(x.shape)
    for b in range(len(x)):
        ids = np.concatenate([owners[b], segments[b]])
        read = {
            (name, j): project(name, b, j)
            for j in range(total)
            for i in (0, total - 1)
            for name in (named('key', j, i), named('value', j, i))
        }
        for i in np.flatnonzero(ids):
            labelled = [(j, pair(b, i, j)) for j in range(total) if ids[j]]
            seen = [(j, a) for j, a in labelled if a is not None]
            q = project(named('query', i), b, i)
            k = np.array([read[named('key', j, i), j] + a for j, a in seen])
            v = np.array([read[named('value', j, i), j] for j, _ in seen])
            s = np.einsum('hk,jhk->jh', q, k) / np.sqrt(DIM)
            w = np.exp(s - s.max(0))
            o, name = np.einsum('jh,jhk->hk', w / w.sum(0), v), named('out', i)
            out[b, i] = np.einsum('hk,hkd->d', o, p[f'{name}/kernel']) + p.get(f'{name}/bias', 0)
    return out


def leaves(params):
    return [(name.split('/'), leaf) for name, leaf in flatten(params).items()]


def real_of(info):
    return np.asarray(info.segment_ids != 0)[..., None]


# The kernel's plain implementation has tests of its own; here in one config, the others by hand.
FORMS = [
    pytest.param(kind, name, marks=() if ci else pytest.mark.slow)
    for kind in KINDS
    for name in ('xla', 'reference')
    for ci in [name == 'xla' or kind == 'all said']
]


@pytest.mark.ci
@pytest.mark.parametrize(('kind', 'implementation'), FORMS)
def test_a_dense_masked_attention_in_numpy(kind, implementation):
    """Values of every piece, with documents, padding and tokens that belong to no group."""
    _, graphdef, params = make(**KINDS[kind], implementation=implementation)
    x, info = inputs(), row_info()
    y = forward(graphdef, params, x, info)
    expected = oracle(params, x, GROUPS, SEGMENTS, OWNERS, **KINDS[kind])
    np.testing.assert_allclose(np.where(real_of(info), y, 0), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize(
    'kind',
    [
        pytest.param(k, marks=pytest.mark.slow if k in ('shared', 'groups apart') else ())
        for k in KINDS
    ],
)
def test_gradients_are_the_slopes_of_the_numpy_attention(kind):
    """In float64: of the inputs and of every parameter, along a random direction each."""
    with jax.enable_x64(True):
        _, graphdef, params = make(**KINDS[kind], compute='float64', param='float64')
        x, info = inputs(dtype=np.float64), row_info()
        weight = np.where(real_of(info), np.sin(np.arange(x.size)).reshape(x.shape), 0)

        def loss(params, x):
            return jnp.sum(nnx.merge(graphdef, params)(x, info=info)[0] * weight)

        grads = jit(jax.grad(loss, argnums=(0, 1)))(params, x)
        grads, params = jax.tree.map(np.asarray, (grads, params))
    rng, step = np.random.default_rng(1), 1e-5
    for name in ['x', *flatten(params)]:
        size = x.shape if name == 'x' else flatten(params)[name].shape
        direction = rng.normal(size=size)

        def moved(sign, name=name, direction=direction):
            change = lambda key, leaf: leaf + sign * step * direction if key == name else leaf  # noqa: E731
            tree = {key: change(key, leaf) for key, leaf in flatten(params).items()}
            at = x + sign * step * direction if name == 'x' else x
            return np.sum(oracle(tree, at, GROUPS, SEGMENTS, OWNERS, **KINDS[kind]) * weight)

        slope = (moved(1) - moved(-1)) / (2 * step)
        grad = grads[1] if name == 'x' else flatten(grads[0])[name]
        assert np.all(np.isfinite(grad))
        np.testing.assert_allclose(np.sum(grad * direction), slope, atol=1e-7, rtol=1e-6)
    assert not np.any(np.where(real_of(info), 0, grads[1])), 'padding was read'
    own = flatten(grads[0])
    assert all(np.any(own[name]) for name in ('l2l_label', 'l2g_label', 'g2l_label', 'g2g_label'))


@pytest.mark.parametrize('kind', ['plain', 'shared'])
def test_long_rows_by_blocks_in_numpy(kind):
    """Where long tokens are read by blocks, not as T x T: 131 tokens within a radius of 3."""
    length = 131
    segments = 1 + (np.arange(length) >= [[40], [97]]).astype(int)
    segments[1, -5:] = 0
    groups = np.minimum(np.arange(length) // 20, 4) + 0 * segments
    groups[0, 40:] = np.maximum(groups[0, 40:], 2)
    groups[1, 97:] = 4
    groups[1, 80:97] = 3
    owners = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 2]])
    _, graphdef, params = make(**KINDS[kind])
    assert kernel_cost.strategy(length, RADIUS) == 'band'
    x, info = inputs(length), row_info(groups, segments, owners)
    y = forward(graphdef, params, x, info)
    expected = oracle(params, x, groups, segments, owners, **KINDS[kind])
    np.testing.assert_allclose(np.where(real_of(info), y, 0), expected, atol=2e-5, rtol=1e-4)


def test_a_radius_over_the_row_is_attention_with_relative_keys():
    """Without global tokens and with all in reach, it is Shaw et al.'s attention (1803.02155)."""
    _, graphdef, params = make(few=0, radius=99)
    x = inputs()[:, GLOBALS:]
    y = forward(graphdef, params, x, SeqInfo.of(*x.shape[:2]))
    none = np.zeros((2, 0), int)
    whole = np.ones_like(SEGMENTS)
    expected = oracle(params, x, whole, whole, none, radius=99)
    np.testing.assert_allclose(y, expected, atol=2e-5, rtol=1e-4)


def test_unordered_groups_may_be_moved():
    """With l2l in groups and one distance, moving whole groups moves the outputs, no more."""
    _, graphdef, params = make(l2l='group', clip=0, radius=20)
    sizes, order = [4, 7, 3, 5, 2], [3, 0, 4, 2, 1]
    starts = np.cumsum([0, *sizes])
    long = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in order])
    move = np.concatenate([order, GLOBALS + long])
    groups = np.repeat(np.arange(5), sizes)[None].repeat(2, 0)
    ones, owners = np.ones_like(groups), np.ones((2, GLOBALS), int)
    moved_groups = np.repeat(np.arange(5), [sizes[g] for g in order])[None].repeat(2, 0)
    run = functools.partial(forward, graphdef, params)
    x = inputs()
    y = run(x, row_info(groups, ones, owners))
    moved = run(x[:, move], row_info(moved_groups, ones, owners))
    np.testing.assert_allclose(moved, y[:, move], atol=1e-5, rtol=1e-4)
    # The labels are read: another owner of one token changes it and both global tokens.
    other = groups.copy()
    other[:, 4] = 0
    change = np.abs(run(x, row_info(other, ones, owners)) - y).max((0, 2))
    assert change[0] > 1e-3 and change[1] > 1e-3 and change[GLOBALS + 4] > 1e-3


def test_a_document_sees_its_own_global_tokens_alone():
    """Exactly: what other documents and padding hold moves nothing, values and gradients."""
    _, graphdef, params = make()
    x, info = inputs(), row_info()

    @jit
    def run(x):
        y, back = jax.vjp(lambda x: nnx.merge(graphdef, params)(x, info=info)[0], x)
        inside = (np.asarray(info.segment_ids) == 1)[..., None]
        return y, back(jnp.where(inside, 1.0, 0.0) * jnp.ones_like(y))[0]

    inside = np.asarray(info.segment_ids) == 1
    y, dx = run(x)
    again, _ = run(np.where(inside[..., None], x, 1e4))
    np.testing.assert_array_equal(again[inside], y[inside])
    assert not np.any(dx[~inside]) and np.any(dx[inside])


def test_bfloat16_stays_finite_at_extremes():
    _, graphdef, params = make(compute='bfloat16')
    info = row_info()

    def loss(params, x):
        y = nnx.merge(graphdef, params)(x, info=info)[0]
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    for scale in (0.0, 1e4):
        x = jnp.asarray(inputs() * scale, jnp.bfloat16)
        grads, y = jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        assert y.dtype == jnp.bfloat16
        assert all(np.all(np.isfinite(np.float32(a))) for a in jax.tree.leaves((y, grads)))


@pytest.mark.parametrize('kind', ['plain', 'shared'])
@pytest.mark.parametrize('length', [21, 300])
def test_costs_equal_the_walk(kind, length):
    mixer, graphdef, params = make(**KINDS[kind])
    rows = GLOBALS + length
    info = row_info(np.zeros((2, length)), np.ones((2, length)), np.ones((2, GLOBALS)))
    x = jax.ShapeDtypeStruct((2, rows, WIDTH), jnp.float32)
    walked = walk(lambda p, x: nnx.merge(graphdef, p)(x, info=info)[0], params, x).total
    facts = dict(radius=RADIUS, clip=CLIP, others=GLOBALS, labels=2)
    long = (2, length, HEADS, DIM)
    executed = kernel_cost.executed_flops('xla', *long, **facts)
    # Global tokens score all; long ones, by blocks, more than the radius allows.
    more = executed - kernel_cost.model_flops(*long, **facts)
    cost = mixer.cost(2, rows)
    assert walked == cost.model_flops + more and more >= 0
    assert cost.params == sum(p.size for p in jax.tree.leaves(params))
    assert cost.matmul == cost.model_flops and mixer.state_bytes(2, rows, jnp.float32) == 0


def test_dropout_of_weights_acts_in_training_alone():
    _, graphdef, params = make(attention_dropout=0.5)
    x, key = inputs(), jax.random.key(0)
    run = lambda **kw: forward(graphdef, params, x, row_info(rng=key, **kw))  # noqa: E731
    np.testing.assert_array_equal(run(), forward(make()[1], params, x, row_info()))
    assert np.abs(run(train=True) - run())[real_of(row_info())[..., 0]].max() > 0.01


def test_refuses_what_cannot_be():
    ctx = Context(WIDTH, Policy(compute='float32'), causal=False)
    for message, change, config in (
        ('etc looks in both directions.*encoder', {'causal': True}, {}),
        ('etc: radius must not be negative, got -1', {}, {'radius': -1}),
        ('etc: clip must not be negative, got -2', {}, {'clip': -2}),
    ):
        with pytest.raises(ConfigError, match=message):
            ETC(dataclasses.replace(ctx, **change), heads=HEADS, **config, rngs=nnx.Rngs(0))
    x = inputs()
    for mixer in (make()[0], make(few=0, l2l='group')[0]):
        with pytest.raises(ConfigError, match='etc: no groups say which tokens belong together'):
            mixer(x, info=SeqInfo.of(*x.shape[:2]))
