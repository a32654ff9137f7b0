"""Parallelism: meshes, rules from logical axes to mesh axes, sharded arrays, processes.

A mesh always has the six named axes `data, fsdp, tensor, sequence, expert, pipe` (any may be 1)
of Auto type: XLA's partitioner places what the shardings of inputs, outputs and constraints leave
open. Parameters carry logical names (`core.axes`); `resolve` turns names into a `PartitionSpec` by
rules that a config can override, and says in a sentence where it had to fall back. Layers name the
axes of activations with `constrain` and know no mesh.
"""

from effjax.parallel.arrays import (
    batch_sharding,
    check_batch,
    init_sharded,
    process_rows,
    put_batch,
    replicated,
)
from effjax.parallel.distributed import broadcast, initialize, is_primary
from effjax.parallel.mesh import make_mesh
from effjax.parallel.over import auto_axes, over
from effjax.parallel.rules import (
    DEFAULT_RULES,
    constrain,
    current_rules,
    make_rules,
    mesh_context,
    resolve,
    shardings,
)

__all__ = [
    'DEFAULT_RULES',
    'auto_axes',
    'batch_sharding',
    'broadcast',
    'check_batch',
    'constrain',
    'current_rules',
    'init_sharded',
    'initialize',
    'is_primary',
    'make_mesh',
    'make_rules',
    'mesh_context',
    'over',
    'process_rows',
    'put_batch',
    'replicated',
    'resolve',
    'shardings',
]
