"""`--dry_run`: parameters, FLOPs, memory and shardings of a config, with nothing trained.

The config is checked as a run checks it, data included, which are tokenised into the cache if
need be; the model is built abstractly, so that one of any size can be looked at on a laptop. With
`--config.data.kind=none` no data is looked at.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax import parallel
from effjax.core import trees
from effjax.core.cost import total
from effjax.costs import page
from effjax.training import setup
from effjax.training.progress import human
from effjax.training.runtime import Runtime


def dry_run(config: Mapping[str, Any]) -> str:
    """Returns the report of a config.

    Raises:
      ConfigError, DataError, DeviceError: what would stop the run before its first step.
    """
    setup.check(config)
    with_data = config['data']['kind'] != 'none'
    runtime = Runtime(config, with_data=with_data)
    built, plain = runtime.built, runtime.config
    lines = [f'{plain["name"] or "config"}: {plain["model"]["kind"]}']
    lines += [] if with_data else ['data: none, so nothing is checked against any']
    lines += _parameters(built)
    lines += _flops(runtime)
    lines += _stages(runtime)
    lines += _memory(runtime)
    lines += ['', 'execution:', *_execution(built)]
    lines += _shardings(built, runtime.mesh)
    return '\n'.join(lines)


def _parameters(built: Any) -> list[str]:
    flat = trees.flatten(built.abstract_state['params'])
    groups: dict[str, int] = {}
    for name, leaf in flat.items():
        group = name.split('/')[0]
        groups[group] = groups.get(group, 0) + trees.count(leaf)
    count = sum(groups.values())
    out = ['', f'parameters: {count:,} ({human(count)})']
    out += [f'  {name:<24} {n:>16,}  {100 * n / count:5.1f} %' for name, n in groups.items()]
    return out


def _flops(runtime: Runtime) -> list[str]:
    first = runtime.stages[0].config
    batch, length = first['batch_size'], first['seq_len']
    parts = runtime.task.cost(runtime.built.model, batch, length)
    forward = total(parts.values()).model_flops
    examples, tokens = runtime.task.units(batch, length)
    out = [
        '',
        f'model FLOPs (forward and backward, batch {batch} x {length}):',
        f'  a step {human(3 * forward, "FLOP")}, a token {human(3 * forward / tokens, "FLOP")}, '
        f'an example {human(3 * forward / examples, "FLOP")}',
    ]
    out += [
        f'  {name:<24} {human(3 * cost.model_flops, "FLOP"):>16}  '
        f'{100 * cost.model_flops / forward:5.1f} %'
        for name, cost in parts.items()
        if cost.model_flops
    ]
    out += [
        f'  and of the {name}, forward alone, {human(cost.model_flops, "FLOP")} a step'
        for name, cost in runtime.frozen_costs(runtime.stages[0]).items()
    ]
    # One example's multiply-adds and decoding state: the figures that papers print.
    one = runtime.task.cost(runtime.built.model, 1, length)
    out.append(f'  one example forward: {page.si(total(one.values()).model_flops / 2, "MACs")}')
    dtype = runtime.precision.policy.compute_dtype
    for rows, costs in ((1, one), (batch, parts)):
        if total(costs.values()).state_bytes:
            sizes = [_state(runtime, rows, length, d) for d in (dtype, jnp.dtype('float32'))]
            out.append(
                f'  decoding state of {rows} x {length} tokens: {_mebibytes(sizes[0])} with '
                f'activations in {dtype.name}, {_mebibytes(sizes[1])} in float32'
            )
    return out


def _stages(runtime: Runtime) -> list[str]:
    """How long each stage lasts, its parameters, its steps' cost, and what leads to it."""
    begins = _source(runtime)
    if len(runtime.stages) == 1:
        return begins
    out = [*begins, '', 'stages:']
    for stage in runtime.stages:
        model = runtime.models[stage.index]
        flops = 3 * total(runtime.costs(stage).values()).model_flops
        share = f'{100 * (stage.end - stage.start) / stage.total:5.1f} % of the run'
        lasts = f'{stage.limit:>5} steps' if stage.limit else share
        size = f'{stage.config["batch_size"]} x {stage.config["seq_len"]}'
        out.append(
            f'  {stage.name:<24} {lasts}, {human(model.params)} '
            f'parameters, {human(flops, "FLOP")} a step of {size}'
        )
        if stage.until is not None:
            out.append(
                f'    ends early once its loss falls by a slope above {stage.until["slope"]:g}'
            )
        if stage.grow is not None:
            out.append(f'    grown by {runtime.transitions[stage.index].words}')
    return out


def _source(runtime: Runtime) -> list[str]:
    """The run that this one begins from."""
    source, model = runtime.source, runtime.source_model
    if source is None or model is None:
        return []
    cost = f'{human(source.totals["model_flops"], "FLOP")} that are '
    cost += 'charged' if source.charge else 'free'
    size = f'{human(model.params)} parameters'
    out = ['', f'begins from step {source.step} of {source.folder}: {size}, {cost}']
    if len(runtime.stages) == 1 and 0 in runtime.transitions:
        out.append(f'    grown by {runtime.transitions[0].words}')
    return out


def _state(runtime: Runtime, rows: int, length: int, dtype: jnp.dtype) -> int:
    """Bytes of a decoding state; what recurrent mixers carry is float32 in any dtype."""
    model = runtime.built.model
    return trees.nbytes(jax.eval_shape(lambda: model.init_state(rows, length, dtype)))


def _mebibytes(size: float) -> str:
    """Bytes as the papers print a cache's: in MiB, and in GiB from ten of those on."""
    mebi = size / 2**20
    return f'{mebi:.4g} MiB' if mebi < 1e4 else f'{mebi / 1024:.4g} GiB'


def _memory(runtime: Runtime) -> list[str]:
    config, first, mesh = runtime.config, runtime.stages[0].config, runtime.mesh
    state, shardings = runtime.abstract, runtime.shardings
    held = _per_device(state, shardings)
    gradients = _per_device(state['params'], shardings['params'])
    micro = first['batch_size'] // first['accumulate']
    rows = parallel.batch_sharding(mesh, rules=runtime.rules).shard_shape((micro,))[0]
    costs = runtime.task.cost(runtime.built.model, 1, first['seq_len']).values()
    activations = total(costs).activation_bytes * rows
    out = [
        '',
        f'memory a device ({mesh.size} in the mesh), estimated:',
        f'  parameters, moments, average {human(held, "B"):>12}',
        f'  gradients                    {human(gradients, "B"):>12}',
    ]
    if config['execution']['remat'] == 'none':
        out.append(f'  activations                  {human(activations, "B"):>12}')
    else:
        out.append(
            f'  activations                  at most {human(activations, "B")} '
            f'(remat {config["execution"]["remat"]} saves fewer)'
        )
    return out


def _per_device(tree: Any, shardings: Any) -> int:
    sizes = jax.tree.map(
        lambda x, s: trees.nbytes(jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype)),
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def _execution(built: Any) -> list[str]:
    return [
        f'  {part["segment"]}: {part["repeat"]} x [{", ".join(part["period"])}], '
        f'{part["layers"]}, remat {part["remat"]}'
        + (f', {part["share"]} repeats share their parameters' if part['share'] > 1 else '')
        for part in built.model.body.describe()
    ]


def _shardings(built: Any, mesh: Any) -> list[str]:
    shape = ', '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or 'one device'
    out = ['', f'shardings (mesh: {shape}):', *(f'  fell back: {why}' for why in built.fallbacks)]
    meta = trees.flatten(built.meta['params'])
    specs = trees.flatten(built.shardings['params'])
    for name, leaf in trees.flatten(built.abstract_state['params']).items():
        axes = ', '.join(
            f'{axis or "-"} {size}' for axis, size in zip(meta[name].axes, leaf.shape, strict=True)
        )
        out.append(f'  {name:<52} [{axes}] {specs[name].spec}')
    return out
