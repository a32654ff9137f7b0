"""The train step: accumulation, skipped steps, clipping, loss scaling, one compilation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effjax.core.axes import Buffer, param
from effjax.core.info import SeqInfo
from effjax.precision import DynamicLossScale
from effjax.training import ema, step


class Linear(nnx.Module):
    """Predicts a number from a vector."""

    def __init__(self, rngs: nnx.Rngs):
        self.w = param(jax.random.normal(rngs.params(), (5,)), ('embed',))

    def __call__(self, x):
        return x @ self.w[...]


class Regression:
    """Squared error with weights; metrics as a task gives them."""

    def info(self, batch, rng, train):
        return SeqInfo.of(len(batch['x']), 1, rng=rng, train=train)

    def loss(self, model, batch, info):
        error = jnp.square(model(batch['x']) - batch['y']) * batch['weights']
        weight = jnp.sum(batch['weights'])
        return jnp.sum(error), weight, {'error': (jnp.sum(error), weight)}

    def evaluate(self, model, batch, info):
        loss, weight, _ = self.loss(model, batch, info)
        return {'loss': (loss, weight)}


class Faint(Regression):
    """A float16 product with gradients near 2^-26, below float16's smallest number, 2^-24."""

    def loss(self, model, batch, info):
        product = model.w[...].astype(jnp.float16) * jnp.float16(1.0)
        weight = jnp.sum(batch['weights'])
        return jnp.sum(product.astype(jnp.float32)) * weight * 2.0**-26, weight, {}


class Sgd:
    """The smallest optimizer that obeys the contract."""

    def init(self, params):
        return optax.EmptyState()

    def update(self, grads, state, params, lr):
        return jax.tree.map(lambda g: -lr * g, grads), state


def make(**options):
    model = Linear(nnx.Rngs(0))
    graphdef, params, buffers = nnx.split(model, nnx.Param, Buffer)
    params = nnx.to_pure_dict(params)
    scale = options.get('loss_scale')
    state = {
        'params': params,
        'buffers': nnx.to_pure_dict(buffers),
        'frozen': {},
        'optimizer': Sgd().init(params),
        'ema': ema.init(params) if options.get('ema') else {},
        'loss_scale': scale.init() if scale else {},
        'step': jnp.int32(0),
        'stage': jnp.int32(0),
    }
    seed, task = jnp.uint32(options.pop('seed', 0)), options.pop('task', Regression())
    raw = step.make_train_step(graphdef, task, Sgd(), **options)
    return (lambda state, batch, lr: raw(state, batch, lr, seed, jnp.ones(2))), state


def data(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'x': jnp.asarray(rng.normal(size=(rows, 5)), jnp.float32),
        'y': jnp.asarray(rng.normal(size=rows), jnp.float32),
        'weights': jnp.asarray(rng.integers(0, 4, rows) + (np.arange(rows) % 4 == 0), jnp.float32),
    }


class TestAccumulation(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_unequal_microbatches_equal_one_batch(self):
        one, state = make()
        batch = data()
        expected, metrics = self.variant(one)(state, batch, jnp.float32(0.1))
        for count in (2, 4, 8):
            several, state = make(accumulate=count)
            found, others = self.variant(several)(state, batch, jnp.float32(0.1))
            # Sums in another order: float32 rounding of a handful of terms.
            chex.assert_trees_all_close(found['params'], expected['params'], rtol=1e-5)
            chex.assert_trees_all_close(others, metrics, rtol=1e-5)


def test_the_loss_is_the_weighted_mean():
    train, state = make()
    batch = data()
    _, metrics = jax.jit(train)(state, batch, jnp.float32(0.1))
    error = np.square(np.asarray(batch['x']) @ np.asarray(state['params']['w']) - batch['y'])
    weights = np.asarray(batch['weights'])
    np.testing.assert_allclose(metrics['loss'], (error * weights).sum() / weights.sum(), rtol=1e-5)
    assert metrics['weight'] == weights.sum()


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    train, state = make(clip_norm=0.01)
    new, metrics = jax.jit(train)(state, data(), jnp.float32(1.0))
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, new['params'], state['params']))
    np.testing.assert_allclose(moved, 0.01, rtol=1e-4)
    assert metrics['grad_norm'] > 0.01


@pytest.mark.parametrize('weights', [1.0, 0.0])
def test_clipping_leaves_a_gradient_below_the_bound_exactly_alone(weights):
    batch = data() | {'weights': jnp.full(8, weights)}  # all 0: a gradient of zeros
    plain, state = make()
    clipped, _ = make(clip_norm=1e6)
    expected, _ = jax.jit(plain)(state, batch, jnp.float32(0.1))
    found, metrics = jax.jit(clipped)(state, batch, jnp.float32(0.1))
    chex.assert_trees_all_equal(found['params'], expected['params'])
    assert metrics['skipped'] == 0.0 and (metrics['grad_norm'] > 0) == bool(weights)


def test_a_step_that_is_not_finite_changes_nothing_but_its_count():
    train, state = make(ema=lambda e, p: ema.update(e, p, 0.5))
    batch = data()
    batch['y'] = batch['y'].at[0].set(jnp.nan)
    new, metrics = jax.jit(train)(state, batch, jnp.float32(0.1))
    assert metrics['skipped'] == 1.0 and new['step'] == 1
    for part in ('params', 'ema'):
        chex.assert_trees_all_equal(new[part], state[part])


def test_loss_scaling_halves_and_skips_on_overflow_and_changes_no_result():
    plain, state = make()
    expected, _ = jax.jit(plain)(state, data(), jnp.float32(0.1))
    train, state = make(loss_scale=DynamicLossScale(initial=1024.0))
    train = jax.jit(train)
    new, metrics = train(state, data(), jnp.float32(0.1))
    chex.assert_trees_all_close(new['params'], expected['params'], rtol=1e-6)
    assert metrics['loss_scale'] == 1024.0
    bad = data() | {'y': jnp.full(8, jnp.inf)}
    after, metrics = train(new, bad, jnp.float32(0.1))
    assert metrics['skipped'] == 1.0 and after['loss_scale']['scale'] == 512.0
    chex.assert_trees_all_equal(after['params'], new['params'])


def test_float16_gradients_underflow_without_scaling_and_not_with_it():
    batch = data() | {'weights': jnp.ones(8)}
    plain, state = make(task=Faint())
    assert jax.jit(plain)(state, batch, jnp.float32(1.0))[1]['grad_norm'] == 0.0
    scaled, state = make(task=Faint(), loss_scale=DynamicLossScale())
    norm = jax.jit(scaled)(state, batch, jnp.float32(1.0))[1]['grad_norm']
    np.testing.assert_allclose(norm, np.sqrt(5) * 2.0**-26)


def test_a_step_compiles_once_and_a_ladder_of_shapes_once_each():
    chex.clear_trace_counter()  # it counts by name, and every test here makes a `step`
    train, state = make()
    traced = chex.assert_max_traces(train, n=8)
    jitted = jax.jit(traced)
    for rows in (4, 8, 12, 16, 20, 24, 28, 32):
        for lr in (0.1, 0.2, 0.3):
            state, _ = jitted(state, data(rows), jnp.float32(lr))
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(make()[0], n=1))
    for lr in (0.1, 0.2, 0.3):
        state, _ = once(state, data(), jnp.float32(lr))
    assert state['step'] == 27


def test_the_eval_step_returns_sums_and_weights():
    model = Linear(nnx.Rngs(0))
    graphdef, params, buffers = nnx.split(model, nnx.Param, Buffer)
    batch = data()
    out = jax.jit(step.make_eval_step(graphdef, Regression()))(
        nnx.to_pure_dict(params), nnx.to_pure_dict(buffers), batch
    )
    assert out['loss'].shape == (2,) and out['loss'][1] == batch['weights'].sum()


@pytest.mark.parametrize('rows', [6, 9])
def test_microbatches_take_rows_of_every_device(rows):
    # Rows i, i + n, ...: a batch sharded over contiguous rows keeps its shards.
    seen = []

    def grad(params, batch, index):
        seen.append(batch['x'].shape)
        return {'g': jnp.sum(batch['x'])}, (jnp.float32(0),)

    total = step._accumulate(grad, {}, {'x': jnp.arange(float(rows))}, 3)
    assert seen and seen[0] == (rows // 3,)
    assert total[0]['g'] == rows * (rows - 1) / 2
