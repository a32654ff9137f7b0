"""Compiling a step once, ahead of time, and learning what it costs."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.costs import StepCost, compiled_memory, walk_jaxpr

# Compiler options of a platform, unless the config says otherwise. On an H200 cuBLASLt's products
# instead of XLA's own Triton ones made the step of a 374M decoder 4 % faster and that of a 1.36B
# decoder neither faster nor slower (experiments/benchmarks/train_step).
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    'gpu': {'xla_gpu_enable_cublaslt': True, 'xla_gpu_enable_triton_gemm': False},
}


def with_lanes(shapes: Any, lanes: int) -> Any:
    """Returns a tree of shapes with a leading axis of `lanes` runs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype), shapes)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """An executable train step.

    Attributes:
      call: `(state, batch, lr, seed, progress) -> (state, float32 [metrics])`; the state is
        donated.
      names: the metrics behind the vector, in order.
      cost: what one call costs.
      memory: bytes a device needs while it runs, as the compiler plans it, by kind.
      options: the compiler options it was made with.
    """

    call: Callable[..., Any]
    names: tuple[str, ...]
    cost: StepCost
    memory: dict[str, int] | None
    options: dict[str, Any]

    def __call__(
        self, state: Any, batch: Any, lr: Any, seed: Any, progress: Any = (1.0, 1.0)
    ) -> Any:
        lr, seed, progress = np.float32(lr), np.uint32(seed), np.float32(progress)
        return self.call(state, batch, lr, seed, np.broadcast_to(progress, (*lr.shape, 2)))


def compile_train(
    raw: Callable[..., Any],
    *,
    state: Any,
    shardings: Any,
    batch: Mapping[str, jax.Array],
    mesh: Mesh,
    parts: Mapping[str, Cost],
    units: tuple[int, int],
    optimizer_flops: float,
    options: Mapping[str, Any] | None = None,
    reference_seconds: float | None = None,
    lanes: int = 0,
    forward: Mapping[str, Cost] = MappingProxyType({}),
) -> CompiledStep:
    """Traces a step once, walks its jaxpr for hardware FLOPs, and compiles it.

    Args:
      raw: `step(state, batch, lr, seed, progress) -> (state, metrics)`.
      state: the state's shapes and dtypes.
      shardings: a sharding for each leaf of the state.
      batch: a placed batch; its shapes and shardings are the step's.
      mesh: the mesh of the run.
      parts: part of the model -> cost of the forward pass over one batch.
      units: (examples, tokens) of one batch.
      optimizer_flops: FLOPs of one update.
      options: compiler options over the platform's `COMPILER_OPTIONS`.
      reference_seconds: what a calibration table charges for one step, None without a table.
      lanes: runs to train at once on a mesh of one device, 0 for one run. State, batch, lr, seed,
        progress and metrics then have a leading axis of that size, which `batch` brings and `state`
        does not; the cost is that of one lane.
      forward: part -> cost of forward passes without a backward one, of a teacher for example.
    """
    names: list[str] = []

    def step(state: Any, batch: Any, lr: jax.Array, seed: jax.Array, progress: jax.Array):
        state, metrics = raw(state, batch, lr, seed, progress)
        names[:] = sorted(metrics)
        return state, jnp.stack([metrics[name] for name in names])

    replicated = NamedSharding(mesh, PartitionSpec())
    if lanes:
        shardings = jax.tree.map(lambda _: replicated, shardings)
    jitted = jax.jit(
        jax.vmap(step) if lanes else step,
        in_shardings=(shardings, {k: v.sharding for k, v in batch.items()}, *[replicated] * 3),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    shapes = {
        k: jax.ShapeDtypeStruct(v.shape[1:] if lanes else v.shape, v.dtype)
        for k, v in batch.items()
    }
    small = (((), jnp.float32), ((), jnp.uint32), ((2,), jnp.float32))
    one = (state, shapes, *(jax.ShapeDtypeStruct(*form) for form in small))
    traced = jitted.trace(*(with_lanes(one, lanes) if lanes else one))
    # A lane is charged what a run by itself is, whatever a batched product would count.
    walked = jax.jit(step).trace(*one) if lanes else traced
    merged = {**COMPILER_OPTIONS.get(jax.default_backend(), {}), **(options or {})}
    lowered = traced.lower()
    try:
        compiled = lowered.compile(compiler_options=merged)
    except jax.errors.JaxRuntimeError as e:
        if 'compile option' not in str(e):
            raise
        raise ConfigError(f'config.execution.compiler_options: {str(e).splitlines()[0]}') from e
    examples, tokens = units
    charged = {part: cost.train_flops for part, cost in parts.items()}
    cost = StepCost(
        charged | {part: cost.model_flops for part, cost in forward.items()},
        hardware_flops=walk_jaxpr(walked.jaxpr).total,
        optimizer_flops=optimizer_flops,
        examples=examples,
        tokens=tokens,
        tokens_computed=tokens,
        reference_seconds=reference_seconds,
    )
    return CompiledStep(compiled, tuple(names), cost, compiled_memory(compiled), merged)
