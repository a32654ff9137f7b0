"""FLOPs of the delta rule, by its recurrence and as its implementations execute it.

Plain Python: `effjax.costs` imports it without jax.
"""

from typing import Any

from effjax.kernels.delta_rule import hopper_plan, tpu_plan

CHUNK = 64  # tokens of a chunk unless the caller says otherwise


def model_flops(
    batch: int, length: int, heads: int, key_dim: int, value_dim: int, *, decay: bool
) -> float:
    """FLOPs of the recurrence: three multiply-adds an element of the state, and its decay.

    The state is read with the key, written with the key, and read with the query.
    """
    return float(batch * length * heads * key_dim * value_dim * (7 if decay else 6))


def chunk_size(length: int, chunk: int) -> int:
    """Tokens of a chunk that 'xla' really uses."""
    return max(1, min(chunk, length))


def executed_flops(
    implementation: str,
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    decay: bool = False,
    chunk: int = CHUNK,
) -> float:
    """FLOPs of the forward pass that an implementation really executes.

    Of a chunk of C tokens 'xla' forms two C x C matrices over the keys' dimension, solves a
    triangular system for K + V columns, and multiplies one C x C matrix by C x V and three C x K
    matrices by K x V (or their transposes). 'pallas_tpu' inverts the system's matrix, which its
    plan counts, and not what is elementwise; its chunks here are those for bfloat16. So does
    'pallas_gpu', whose running sums of decays are a product too.
    """
    if implementation == 'pallas_gpu':
        found = hopper_plan.plan_for(heads, key_dim, value_dim)
        if found is None:
            raise ValueError(
                f'delta_rule: pallas_gpu has no plan for {(heads, key_dim, value_dim)}.'
            )
        sums = 4 * found.size**2 * heads if decay else 0
        return float(batch * -(-length // found.size) * (found.forward_flops + sums))
    if implementation == 'pallas_tpu':
        plan = tpu_plan.plan_for(length, heads, key_dim, value_dim, itemsize=2)
        if plan is None:
            raise ValueError(
                f'delta_rule: pallas_tpu has no plan for {(length, heads, key_dim, value_dim)}.'
            )
        sums = 2 * plan.size * heads if decay else 0  # of decays, by XLA, before the kernel
        return float(batch * -(-length // plan.size) * (plan.forward_flops + sums))
    if implementation == 'reference':
        return 6.0 * batch * length * heads * key_dim * value_dim
    size = chunk_size(length, chunk)
    chunks = -(-length // size) * batch * heads
    solve = size * size * (key_dim + value_dim) if size > 1 else 0
    # A single token's matrix of keys is all diagonal, which nothing reads.
    inside = size * size * ((4 if size > 1 else 2) * key_dim + 2 * value_dim) + solve
    across = 6 * size * key_dim * value_dim
    sums = 2 * size if decay else 0  # of decays, in two parts
    return float(chunks * (inside + across + sums))


def kernel_flops(call: Any) -> float:
    """FLOPs of one call of a Hopper kernel, a `costs.products.KernelCall`."""
    batch, length, heads, key_dim = call.inputs[0].shape
    values = {'delta_rule_system': 1, 'delta_rule_gradients': 2}.get(call.name, 3)
    plan = hopper_plan.Plan(key_dim, call.inputs[values].shape[3], heads)
    if call.name == 'delta_rule_system':
        flops = plan.system_flops
    elif call.name == 'delta_rule_gradients':
        flops = plan.gradient_flops
    else:
        flops = plan.walk().flops(plan.value_dim)
    return float(batch * (length // plan.size) * heads * flops)
