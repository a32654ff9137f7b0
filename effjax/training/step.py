"""The compiled steps: one that trains and one that evaluates. Pure functions of their arguments."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

State = dict[str, Any]
Batch = Mapping[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]
# What the model is given of a state's parameters: `view(params, frozen, progress) -> params`, pure
# and differentiable in the first, where that is not the parameters themselves.
View = Callable[[Any, Any, jax.Array], Any]


def make_train_step(
    graphdef: nnx.GraphDef,
    task: Any,
    optimizer: Any,
    *,
    loss_scale: Any = None,
    clip_norm: float = 0.0,
    accumulate: int = 1,
    ema: Callable[[Any, Any], Any] | None = None,
    view: View | None = None,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """Returns `step(state, batch, lr, seed, progress) -> (state, metrics)`.

    The gradient is that of the weighted mean over the whole batch, whatever the number of
    microbatches and however unequal their weights. A step whose loss or gradient is not finite
    leaves parameters, moments and average as they were and reports `skipped = 1`.

    Args:
      graphdef: the model without its arrays.
      task: an objective (`effjax.tasks`).
      optimizer: see `effjax.training.optimizers`; the learning rate is an argument of the step.
      loss_scale: dynamic loss scaling for float16, or None.
      clip_norm: clips the gradient's global norm; 0 leaves it alone.
      accumulate: microbatches a step; rows must divide by it.
      ema: `f(average, params) -> average`, or None.
      view: what the model is given of the parameters (`View`), or None for them all.

    Returns:
      The step. `lr` is a float32 scalar and `seed` a uint32 scalar, from which, with stage, step,
      microbatch and layer, all randomness is folded: an argument, so that all seeds share one
      executable. `progress` is float32 [2], the shares of the run and of the stage that are done.
      Metrics are float32 scalars.
    """

    def gradients(state: State, batch: Batch, seed: jax.Array, progress: jax.Array):
        elements = batch['weights'].size  # a constant that keeps the sum's gradient near 1
        scale = state['loss_scale']['scale'] if loss_scale else 1.0
        key = jax.random.fold_in(jax.random.key(seed), state['stage'])
        key = jax.random.fold_in(key, state['step'])

        objective = task
        if hasattr(task, 'given'):
            objective = task.given(state['frozen'], progress)

        def loss_fn(params, rows: Batch, index: jax.Array):
            seen = view(params, state['frozen'], progress) if view else params
            model = nnx.merge(graphdef, seen, state['buffers'])
            info = objective.info(rows, jax.random.fold_in(key, index), True)
            loss, weight, aux = objective.loss(model, rows, info)
            return loss * (scale / elements), (loss, weight, aux)

        grad = jax.grad(loss_fn, has_aux=True)
        if accumulate == 1:
            grads, sums = grad(state['params'], batch, jnp.int32(0))
        else:
            grads, sums = _accumulate(grad, state['params'], batch, accumulate)
        return grads, sums, elements / scale

    def step(
        state: State, batch: Batch, lr: jax.Array, seed: jax.Array, progress: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        chex.assert_shape((lr, seed, progress), [(), (), (2,)])
        grads, (loss, weight, aux), factor = gradients(state, batch, seed, progress)
        factor = factor / jnp.maximum(weight, 1e-20)
        norm = optax.tree.norm(grads).astype(jnp.float32) * factor
        if clip_norm:
            factor = factor * jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-20))
        grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        mean = loss / jnp.maximum(weight, 1e-20)
        finite = jnp.isfinite(norm) & jnp.isfinite(mean)
        metrics = {'loss': mean, 'grad_norm': norm, 'weight': weight}
        metrics['skipped'] = 1.0 - finite.astype(jnp.float32)
        metrics |= {name: s / jnp.maximum(w, 1e-20) for name, (s, w) in aux.items()}
        new = _updated(state, grads, lr, finite)
        if loss_scale:
            metrics['loss_scale'] = state['loss_scale']['scale']
        return new, {k: v.astype(jnp.float32) for k, v in metrics.items()}

    def _updated(state: State, grads: Any, lr: jax.Array, finite: jax.Array) -> State:
        with jax.named_scope('optimizer'):
            updates, moments = optimizer.update(grads, state['optimizer'], state['params'], lr)
            params = optax.apply_updates(state['params'], updates)
        new = {**state, 'params': params, 'optimizer': moments, 'step': state['step'] + 1}
        if ema is not None:
            new['ema'] = ema(state['ema'], params)
        for part in ('params', 'optimizer', 'ema'):
            new[part] = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new[part], state[part])
        if loss_scale:
            new['loss_scale'] = loss_scale.update(state['loss_scale'], finite)
        return new

    return step


def make_eval_step(
    graphdef: nnx.GraphDef, task: Any
) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
    """Returns `step(params, buffers, batch) -> {name: float32 [2]}`: a sum and a weight each."""

    def step(params: Any, buffers: Any, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, params, buffers)
        sums: Sums = task.evaluate(model, batch, task.info(batch, None, False))
        return {k: jnp.stack([s, w]).astype(jnp.float32) for k, (s, w) in sums.items()}

    return step


def _accumulate(grad: Callable[..., Any], params: Any, batch: Batch, count: int):
    """Sums gradients and sums over `count` microbatches, in float32."""

    def split(x: jax.Array) -> jax.Array:
        # Every count-th row, so that a microbatch keeps rows of every device.
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def body(total, inputs):
        rows, index = inputs
        out = grad(params, rows, index)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, out), None

    micro = {k: split(v) for k, v in batch.items()}
    one = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in micro.items()}
    shapes = jax.eval_shape(grad, params, one, jnp.int32(0))
    zero = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )
    total, _ = jax.lax.scan(body, zero, (micro, jnp.arange(count, dtype=jnp.int32)))
    return total
