"""Optimizers: same meaning for stacked and separate layers, decay and scales by metadata."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core.axes import Meta
from effjax.core.errors import ConfigError
from effjax.core.trees import flatten
from effjax.training import OPTIMIZERS, optimizers
from effjax.training.optimizers import leaf_tree

LAYERS, EMBED, HEADS, HEAD, MLP, VOCAB = 3, 8, 2, 6, 16, 20

BODY = {
    'query': (('embed', 'heads', 'head_dim'), (EMBED, HEADS, HEAD)),
    'out': (('heads', 'head_dim', 'embed'), (HEADS, HEAD, EMBED)),
    'up': (('embed', 'mlp'), (EMBED, MLP)),
    'scale': (('embed',), (EMBED,)),
}


def _meta(stacked: bool) -> dict:
    """Metadata of an embedding and LAYERS layers, stacked or as separate subtrees."""

    def layer(prefix):
        return {k: Meta((*prefix, *axes), no_decay=k == 'scale') for k, (axes, _) in BODY.items()}

    body = layer(('layers',)) if stacked else {f'l{i}': layer(()) for i in range(LAYERS)}
    return {'embedding': Meta(('vocab', 'embed')), 'body': body}


def _values(seed: int) -> dict:
    """Random values, stacked."""
    rng = np.random.default_rng(seed)
    body = {k: rng.normal(size=(LAYERS, *shape)) for k, (_, shape) in BODY.items()}
    # Layers of unequal size, so that mixing them would show.
    body = {k: v * np.array([0.1, 1, 10]).reshape(-1, *[1] * (v.ndim - 1)) for k, v in body.items()}
    tree = {'embedding': rng.normal(size=(VOCAB, EMBED)), 'body': body}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _separate(tree: dict) -> dict:
    body = {f'l{i}': {k: v[i] for k, v in tree['body'].items()} for i in range(LAYERS)}
    return {'embedding': tree['embedding'], 'body': body}


def _run(optimizer, params, grads_of, steps=3, lr=0.01):
    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params, jnp.float32(lr))
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(steps):
        params, state = step(grads_of(i), state, params)
    return params, state


@pytest.mark.ci
@pytest.mark.parametrize('kind', sorted(OPTIMIZERS))
def test_stacked_layers_equal_separate_layers(kind):
    block = {'kind': kind}
    if kind == 'adafactor':
        block |= {'min_factored': 4, 'momentum': 0.9}  # factor these small matrices too
    params = _values(0)
    stacked, _ = _run(optimizers.build(block, meta=_meta(True)), params, lambda i: _values(i + 1))
    separate, _ = _run(
        optimizers.build(block, meta=_meta(False)),
        _separate(params),
        lambda i: _separate(_values(i + 1)),
    )
    # The same arithmetic, batched: products and reductions may round differently in float32.
    # After 3 steps of Muon's 5 iterations each, that is some 1e-5 of a step of 0.01.
    chex.assert_trees_all_close(_separate(stacked), separate, rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).min()), stacked, params)
    assert max(flatten(moved).values()) > 0


@pytest.mark.ci
@pytest.mark.parametrize(
    ('kind', 'reference'),
    [
        ('adafactor', optax.adafactor(0.01, min_dim_size_to_factor=4)),
        ('lamb', optax.lamb(0.01, weight_decay=0.01)),
        ('muon', optax.contrib.muon(0.01, consistent_rms=0.2)),
    ],
)
def test_plain_optax_on_stacked_layers_means_something_else(kind, reference):
    """The reason for `layerwise` and axis names: unmapped, the updates differ by half and more."""
    block = {'kind': kind} | ({'min_factored': 4} if kind == 'adafactor' else {})
    params, grads = _values(0), _values(1)
    ours, _ = _run(optimizers.build(block, meta=_meta(True)), params, lambda i: grads, steps=1)
    updates, _ = reference.update(grads, reference.init(params), params)
    step = ours['body']['up'] - params['body']['up']
    difference = jnp.linalg.norm(updates['body']['up'] - step) / jnp.linalg.norm(step)
    assert difference > 0.3


def test_adamw_is_optax_adamw():
    """Equal to optax.adamw with a mask from metadata."""
    meta, params = _meta(True), _values(0)
    mask = jax.tree.map(lambda m: not m.no_decay, meta)
    reference = optax.adamw(0.01, b2=0.95, weight_decay=0.1, mask=mask)
    expected, state = params, reference.init(params)
    for i in range(3):
        updates, state = reference.update(_values(i + 1), state, expected)
        expected = optax.apply_updates(expected, updates)
    ours, _ = _run(optimizers.build({'kind': 'adamw'}, meta=meta), params, lambda i: _values(i + 1))
    # Fused by jit against eager optax: last-bit rounding of a step of 0.01.
    chex.assert_trees_all_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('kind', sorted(OPTIMIZERS))
def test_reaches_the_minimum_of_a_quadratic(kind):
    """Every optimizer descends: a quadratic falls to a tenth and below in 150 steps."""
    target = _values(0)
    start = jax.tree.map(lambda x: x + jnp.sin(jnp.arange(x.size)).reshape(x.shape), target)
    rate = {'sgd': 0.05, 'adafactor': 0.1, 'lamb': 0.05, 'muon': 0.3}.get(kind, 0.1)
    optimizer = optimizers.build({'kind': kind, 'weight_decay': 0.0}, meta=_meta(True))

    def loss(p):
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), p, target)
        return sum(jax.tree.leaves(squares))

    @jax.jit
    def run(params):
        def body(carry, lr):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params, lr)
            return (optax.apply_updates(params, updates), state), None

        rates = rate * jnp.linspace(1, 0.02, 150)
        (params, state), _ = jax.lax.scan(body, (params, optimizer.init(params)), rates)
        return optimizer.eval_params(state, params)

    assert loss(run(start)) < 0.1 * loss(start)


def test_decay_by_metadata_and_scale_never_by_dimensions():
    """With zero gradients only decay moves a parameter, by lr * decay * scale."""
    meta, params = _meta(True), _values(0)
    optimizer = optimizers.build(
        {'kind': 'adamw', 'weight_decay': 0.5},
        meta=meta,
        decay_scales=[('up$', 0.5), ('body', 2.0)],
        lr_scales=(('embedding', 0.25),),
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, _ = _run(optimizer, params, lambda i: zeros, steps=1, lr=0.1)
    # Ratios of float32 sums: good to some 1e-6.
    ratio = jax.tree.map(lambda a, b: float(jnp.sum(a * b) / jnp.sum(b * b)), after, params)
    assert ratio['body']['scale'] == 1  # stacked, so two dimensions, and still no decay
    assert ratio['body']['up'] == pytest.approx(
        1 - 0.1 * 0.5 * 0.5, rel=1e-5
    )  # the first match counts
    assert ratio['body']['query'] == pytest.approx(1 - 0.1 * 0.5 * 2, rel=1e-5)
    assert ratio['embedding'] == pytest.approx(1 - 0.1 * 0.25 * 0.5, rel=1e-5)


def test_learning_rate_scales_multiply_the_parameters_own():
    meta = {'a': Meta(('embed',), lr_scale=0.5), 'b': Meta(('embed',))}
    leaves = leaf_tree(meta, lr_scales=[('a', 3.0)])
    assert (leaves['a'].lr, leaves['b'].lr) == (1.5, 1.0)


def test_what_counts_as_a_matrix():
    """Muon's choice reads names: stacked scales and embeddings are no matrices, heads join."""
    metas = {
        'query': Meta(('layers', 'embed', 'heads', 'head_dim')),
        'out': Meta(('heads', 'head_dim', 'embed')),
        'experts': Meta(('layers', 'expert', 'embed', 'mlp')),
        'embedding': Meta(('vocab', 'embed')),
        'head': Meta(('embed', 'classes')),
        'router': Meta(('layers', 'embed', 'expert')),
        'scale': Meta(('layers', 'embed')),
        'bias': Meta(('layers', 'heads', 'head_dim')),
        'decay': Meta(('mlp', 'state'), no_decay=True),
        'taps': Meta(('conv', 'mlp')),
    }
    leaves = leaf_tree(metas)
    assert {k for k, v in leaves.items() if v.matrix} == {'query', 'out', 'experts'}
    assert leaves['experts'].stack == 2
    assert leaves['router'].stack == 1
    assert leaves['query'].view((3, 8, 2, 6)) == (3, 8, 12)


def test_muon_orthogonalises_each_layer_as_a_flattened_matrix():
    meta, params, grads = _meta(True), _values(0), _values(1)
    block = {'kind': 'muon', 'weight_decay': 0.0, 'rms': 0.2}
    after, state = _run(optimizers.build(block, meta=meta), params, lambda i: grads, steps=1, lr=1)
    step = (after['body']['query'] - params['body']['query']).reshape(LAYERS, EMBED, HEADS * HEAD)
    singular = np.linalg.svd(np.asarray(step), compute_uv=False) / (0.2 * np.sqrt(HEADS * HEAD))
    # Five Newton-Schulz iterations bring singular values near 1: 0.7 to 1.2 by their design;
    # float32 rounding of parameters ten times the step adds 1e-5.
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    assert set(flatten(state['adam'].mu)) == {'embedding', 'body/scale'}
    assert set(flatten(state['muon'].mu)) == {'body/query', 'body/out', 'body/up'}


def test_adam_rate_of_muon_is_its_own():
    meta, params, grads = _meta(True), _values(0), _values(1)
    steps = []
    for scale in (1.0, 0.1):
        block = {'kind': 'muon', 'weight_decay': 0.0, 'adam_lr_scale': scale}
        after, _ = _run(optimizers.build(block, meta=meta), params, lambda i: grads, steps=1)
        steps.append(jax.tree.map(lambda a, b: float(jnp.abs(a - b).mean()), after, params))
    assert steps[1]['embedding'] == pytest.approx(0.1 * steps[0]['embedding'], rel=1e-3)
    assert steps[1]['body']['up'] == steps[0]['body']['up']


def test_adafactor_factors_joined_heads():
    """The state holds rows and columns of `[embed, heads * head_dim]`, a stack in front."""
    optimizer = optimizers.build({'kind': 'adafactor', 'min_factored': 4}, meta=_meta(True))
    state = optimizer.abstract_state(_values(0))[0]
    assert state.v_row['body']['query'].shape == (LAYERS, EMBED)
    assert state.v_col['body']['query'].shape == (LAYERS, HEADS * HEAD)
    assert state.v['body']['scale'].shape == (LAYERS, EMBED)
    assert state.count.shape == ()


@pytest.mark.parametrize('kind', sorted(OPTIMIZERS))
def test_moments_lie_under_the_path_of_their_parameter(kind):
    """What growth, checkpoints and sharding rely on: all but counts and constants have an owner."""
    params = _values(0)
    optimizer = optimizers.build({'kind': kind}, meta=_meta(True))
    state = optimizer.abstract_state(params)
    owners = {name: optimizers.parameter_of(name, flatten(params)) for name in flatten(state)}
    assert set(owners.values()) - {None} == set(flatten(params))
    for name, owner in owners.items():
        if owner is None:
            assert flatten(state)[name].ndim == 0 or name.endswith('ns_coeffs')


def test_adafactor_has_the_state_of_optax():
    """Mapping over layers changes shapes, not the structure of the state."""
    optimizer = optimizers.build({'kind': 'adafactor'}, meta=_meta(True))
    state = jax.eval_shape(optax.scale_by_factored_rms().init, _values(0))
    assert jax.tree.structure(optimizer.abstract_state(_values(0))[0]) == jax.tree.structure(state)


def test_schedule_free_is_optax_with_the_rate_inside():
    """Against optax.contrib with a schedule of steps, and the average against its definition."""
    meta, params = _meta(True), _values(0)
    rates = [0.0, 0.005, 0.01, 0.01]  # warm-up from zero: the first step must not divide by it
    reference = optax.contrib.schedule_free(
        optax.chain(
            optax.scale_by_rms(decay=0.95, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
            optax.scale_by_schedule(lambda count: -jnp.asarray(rates)[count]),
        ),
        # Its own counter starts at 1.
        learning_rate=lambda count: jnp.asarray([0.0, *rates])[count],
        b1=0.9,
    )
    block = {'kind': 'schedule_free_adamw', 'weight_decay': 0.0}
    optimizer = optimizers.build(block, meta=meta)
    ours, expected = params, params
    state, other = optimizer.init(params), reference.init(params)
    for i, rate in enumerate(rates):
        updates, state = optimizer.update(_values(i + 1), state, ours, jnp.float32(rate))
        ours = optax.apply_updates(ours, updates)
        updates, other = reference.update(_values(i + 1), other, expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(ours, expected, rtol=1e-6, atol=1e-7)
    averaged = optimizer.eval_params(state, ours)
    # x = (y - 0.1 z) / 0.9 by definition; float32 rounding.
    again = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z, averaged, state.z)
    chex.assert_trees_all_close(again, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['adamw', 'lion', 'sgd', 'muon'])
def test_first_moment_dtype(kind):
    params = _values(0)
    optimizer = optimizers.build({'kind': kind, 'mu_dtype': 'bfloat16'}, meta=_meta(True))
    state = optimizer.init(params)
    _, after = optimizer.update(params, state, params, jnp.float32(0.1))
    fields = {name: set(name.split('/')) for name in flatten(after)}
    dtypes = {str(flatten(after)[k].dtype) for k, f in fields.items() if f & {'mu', 'trace'}}
    assert dtypes == {'bfloat16'}
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@pytest.mark.parametrize('kind', ['adamw', 'lion', 'sgd', 'schedule_free_adamw'])
def test_elementwise_optimizers_do_nothing_but_elementwise_work(kind):
    """No reshape, transpose, slice, cast or product of a weight: XLA makes it one pass on a GPU.

    (On the CPU it is several fusions, so the compiled program says nothing there.)
    """
    params = _values(0)
    optimizer = optimizers.build({'kind': kind}, meta=_meta(True))
    state = optimizer.abstract_state(params)
    jaxpr = jax.make_jaxpr(optimizer.update)(params, state, params, jnp.float32(0.1))
    small = min(x.size for x in jax.tree.leaves(params))
    used = {name for name, shape in _primitives(jaxpr.jaxpr) if np.prod(shape) >= small}
    allowed = {'add', 'sub', 'mul', 'div', 'neg', 'sign', 'sqrt', 'square', 'integer_pow'}
    assert used <= allowed


def _primitives(jaxpr):
    for eqn in jaxpr.eqns:
        inner = eqn.params.get('jaxpr')
        if inner is not None:
            yield from _primitives(getattr(inner, 'jaxpr', inner))
        else:
            yield eqn.primitive.name, eqn.outvars[0].aval.shape


def test_flops_of_an_update():
    """Elementwise optimizers cost a fixed count per weight; Muon adds its products."""
    n = 4 * 16 * 32
    meta, params = {'w': Meta(('layers', 'embed', 'mlp'))}, {'w': jnp.zeros((4, 16, 32))}

    def flops(**block):
        return optimizers.build(block, meta=meta).flops(params)

    # Momentum: multiply, add; step: multiply by -lr, add to the parameter.
    assert flops(kind='sgd', weight_decay=0.0) == 4 * n
    assert flops(kind='sgd', weight_decay=0.1) == 6 * n
    assert 14 * n <= flops(kind='adamw') <= 20 * n
    # A matrix of 16 x 32: X X^T and B X cost 2 * 16 * 16 * 32, A A 2 * 16^3, five times.
    products = 4 * 5 * (2 * 2 * 16 * 16 * 32 + 2 * 16**3)
    assert products < flops(kind='muon') < products + 40 * n + 4 * 5 * 10 * 16 * 16


@pytest.mark.parametrize(
    ('block', 'kw', 'message'),
    [
        ({'kind': 'adamv'}, {}, "unknown optimizer 'adamv' at config.optimizer.*'adamw'"),
        ({'kind': 'adamw', 'beta2': 0.9}, {}, "config.optimizer.beta2: .* takes no 'beta2'"),
        ({'kind': 'adamw', 'b2': 1.5}, {}, r'config.optimizer.b2 must be in \[0, 1\), got 1.5'),
        ({'kind': 'adamw', 'eps': 0.0}, {}, 'config.optimizer.eps must be above 0'),
        ({'kind': 'sgd', 'weight_decay': -1.0}, {}, 'weight_decay must be at least 0'),
        ({'kind': 'adamw', 'mu_dtype': 'int8'}, {}, "one of 'float32', 'bfloat16' or None"),
        ({'kind': 'adamw'}, {'lr_scales': [('embd', 2.0)]}, "lr_scales.0: 'embd' matches no"),
        ({'kind': 'adamw'}, {'decay_scales': [('(', 2.0)]}, 'decay_scales.0: .* no regular exp'),
        ({'kind': 'adamw'}, {'lr_scales': ['up']}, r'lr_scales.0: expected a pair'),
        ({'kind': 'adamw'}, {'lr_scales': [('up', -1)]}, r'factor >= 0'),
    ],
)
def test_bad_blocks(block, kw, message):
    with pytest.raises(ConfigError, match=message):
        optimizers.build(block, meta=_meta(True), **kw)


def test_muon_needs_a_matrix():
    with pytest.raises(ConfigError, match='muon finds no matrix'):
        optimizers.build({'kind': 'muon'}, meta={'scale': Meta(('embed',))})
