"""FLOPs of linear recurrences, by the recurrence and as 'xla' executes it; its chunk sizes.

Plain Python: `effjax.costs` imports it without jax.
"""

from typing import Any

from effjax.kernels import halving
from effjax.kernels.linear_recurrence import hopper_plan, tpu_plan

CHUNK = 64  # tokens of a chunk unless the caller says otherwise
LEAF = 16  # longest block whose pairs are formed one by one where each key dimension decays alone


def model_flops(
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    decay: bool,
    bonus: bool = False,
) -> float:
    """FLOPs of the recurrence: two multiply-adds an element of the state, and its decay.

    The state is written with a key and a value and read with a query; a bonus costs the product
    of query and key, and one multiply-add a value.
    """
    tokens = float(batch * length * heads)
    flops = tokens * key_dim * value_dim * (5 if decay else 4)
    return flops + (tokens * (3 * key_dim + 2 * value_dim) if bonus else 0)


def chunk_size(length: int, chunk: int, *, vector: bool) -> int:
    """Tokens of a chunk that 'xla' really uses; with vector decays, a leaf doubled some times."""
    return halving.whole_size(length, chunk, LEAF) if vector else max(1, min(chunk, length))


def leaf_size(size: int) -> int:
    """Tokens of the blocks that halving a chunk of `chunk_size` ends in."""
    return halving.leaf_size(size, LEAF)


def executed_flops(
    implementation: str,
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    decay: str = 'none',
    bonus: bool = False,
    groups: int | None = None,
    chunk: int = CHUNK,
    stretches: int = 1,
) -> float:
    """FLOPs of the forward pass that an implementation really executes, as the walk counts them.

    Elementwise work (decays, masks, pairs inside the leaves of vector decays) is not counted, but
    for the recurrence of the states and running sums of decays.

    Args:
      implementation: 'pallas_tpu', 'pallas_gpu', 'xla' or 'reference'.
      batch: rows B.
      length: tokens T.
      heads: value heads H.
      key_dim: K.
      value_dim: V.
      decay: 'none', 'scalar' ([B, T, H]) or 'vector' ([B, T, H, K]).
      bonus: whether there is one.
      groups: query and key heads; None means H. Vector decays and bonuses repeat them.
      chunk: tokens of a chunk of 'xla'; kernels have their own, here those for bfloat16.
      stretches: that 'pallas_gpu' cuts a row into.
    """
    if implementation in ('pallas_tpu', 'pallas_gpu'):
        dims = (heads, groups or heads, key_dim, value_dim)
        plan: tpu_plan.Plan | hopper_plan.Plan | None
        if implementation == 'pallas_tpu':
            plan = tpu_plan.plan_for(length, *dims, decay=decay, strict=bonus, itemsize=2)
        else:
            plan = hopper_plan.plan_for(*dims, decay=decay, strict=bonus, stretches=stretches)
        if plan is None:
            raise ValueError(
                f'linear_recurrence: {implementation} has no plan for {(length, *dims)}.'
            )
        chunks = batch * stretches * -(-length // (stretches * plan.size))
        sums = {'none': 0.0, 'vector': 2.0 * key_dim}.get(decay, 2.0)  # by XLA, before the kernel
        if implementation == 'pallas_gpu':
            # As a product with a triangle, or where each dimension decays by itself in the kernels.
            sums *= 0 if decay == 'vector' else 2 * plan.size
        flops = chunks * (plan.forward_flops + sums * plan.size * heads)
        if stretches > 1:  # the recurrence of the states between them, by XLA
            flops += 2.0 * batch * stretches * heads * plan.key_dim * plan.value_dim
        return flops
    state = key_dim * value_dim
    if implementation == 'reference':
        return 4.0 * batch * length * heads * state
    vector = decay == 'vector'
    size = chunk_size(length, chunk, vector=vector)
    count = batch * -(-length // size)
    groups = heads if groups is None or vector or bonus else groups
    flops = 4.0 * size * heads * state  # write and read
    flops += 2.0 * heads * state  # keep the state from chunk to chunk
    if vector:
        leaf, half = leaf_size(size), size // 2
        while half >= leaf:  # pairs of halves, then the leaves' values
            flops += 2.0 * heads * (size // (2 * half)) * half * half * (key_dim + value_dim)
            half //= 2
        flops += 2.0 * heads * size * leaf * value_dim
    else:
        flops += 2.0 * size * size * (groups * key_dim + heads * value_dim)
    if decay != 'none':
        # Two running sums, for what is written and for what is read.
        flops += 4.0 * size * heads * (key_dim if vector else 1)
    return count * flops


def kernel_flops(call: Any) -> float:
    """FLOPs of one run of a Hopper kernel, a `costs.products.KernelCall`."""
    if call.name.endswith(('_weights', '_gradients')):
        shapes = [x.shape for x in call.inputs]
        batch, length, heads, key_dim = shapes[2]  # of log-decays
        value_dim = shapes[4][3] if call.name.endswith('_gradients') else 0
        facts = {'decays': True, 'vector': True, 'strict': '_strict' in call.name}
        plan = hopper_plan.Plan(key_dim, value_dim, heads, heads, **facts)
        each = plan.gradients_flops if value_dim else plan.weights_flops
    else:
        batch, length, _, key_dim = call.inputs[0].shape
        states = call.name.endswith('_states')
        _, heads, _, value_dim = call.outputs[0 if states else 1].shape  # the last state
        across = call.name.endswith('_across')
        given = across or call.name.endswith('_given')
        walk = hopper_plan.Walk(key_dim, given=given, across=across, readers=0 if states else 2)
        each = walk.flops(value_dim)
    return float(batch * (length // hopper_plan.CHUNK) * heads * each)
