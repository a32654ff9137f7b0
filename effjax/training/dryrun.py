"""`--dry_run`: parameters, FLOPs, memory and shardings of a config, with nothing trained.

Everything is built abstractly, so a model of any size can be looked at on a laptop.
"""

from collections.abc import Mapping
from typing import Any

import jax

from effjax import models, parallel, precision
from effjax.core import trees
from effjax.core.config import as_dict
from effjax.core.cost import total
from effjax.training import optimizers, setup
from effjax.training import state as state_lib
from effjax.training.progress import human
from effjax.training.stages import plan


def dry_run(config: Mapping[str, Any]) -> str:
    """Returns the report of a config.

    Raises:
      ConfigError, DataError, DeviceError: what would stop the run before its first step.
    """
    setup.check(config)
    plain = as_dict(config)
    mesh = parallel.make_mesh(plain['mesh'])
    rules = parallel.make_rules(plain['sharding'])
    setup.check_mesh(plain, mesh, rules)
    plain = _with_data(plain)
    longest = max(stage.config['seq_len'] for stage in plan(plain))
    built = models.build({**plain, 'seq_len': longest}, mesh=mesh)
    stage = plan(plain)[0]
    lines = [f'{plain["name"] or "config"}: {plain["model"]["kind"]}']
    lines += _parameters(built)
    lines += _flops(built, stage.config)
    lines += _memory(plain, built, mesh, rules, stage.config)
    lines += ['', 'execution:', *_execution(built)]
    lines += _shardings(built, mesh)
    return '\n'.join(lines)


def _with_data(config: dict[str, Any]) -> dict[str, Any]:
    """Resolves against the data only what the config leaves open: it may be large or absent."""
    model = config['model']
    known = model.get('vocab_size') or (model.get('classes') and model.get('image_size'))
    if known:
        return config
    from effjax import data

    return setup.resolve(config, data.build(config['data'], seq_len=config['seq_len']).info)


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


def _flops(built: Any, config: Mapping[str, Any]) -> list[str]:
    batch, length = config['batch_size'], config['seq_len']
    parts = built.model.cost(batch, length)
    forward = total(parts.values()).model_flops
    examples, tokens = setup.build_task(config).units(batch, length)
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
    # One example's multiply-adds and decoding state: the figures that papers print.
    one = built.model.cost(1, length)
    out.append(f'  one example forward: {total(one.values()).model_flops / 2e9:.4g} GMACs')
    dtype = precision.build(config['precision']).policy.compute_dtype
    for rows, costs in ((1, one), (batch, parts)):
        held = total(costs.values()).state_bytes / 2**20
        if held:
            out.append(
                f'  decoding state of {rows} x {length} tokens: {held:.4g} MiB in {dtype.name}, '
                f'{held * 4 / dtype.itemsize:.4g} MiB in float32'
            )
    return out


def _memory(
    config: Mapping[str, Any], built: Any, mesh: Any, rules: Any, stage: Mapping[str, Any]
) -> list[str]:
    optimizer = optimizers.build(
        config['optimizer'],
        meta=built.meta['params'],
        lr_scales=config['lr_scales'],
        decay_scales=config['decay_scales'],
    )
    scale = precision.build(config['precision']).loss_scale
    state = state_lib.abstract(built, optimizer, scale, bool(config['ema']))
    shardings = state_lib.shardings(built, optimizer, state, mesh)
    held = _per_device(state, shardings)
    gradients = _per_device(state['params'], shardings['params'])
    micro = stage['batch_size'] // stage['accumulate']
    rows = parallel.batch_sharding(mesh, rules=rules).shard_shape((micro,))[0]
    costs = built.model.cost(1, stage['seq_len']).values()
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
    out = ['', f'shardings (mesh: {shape}):']
    meta = trees.flatten(built.meta['params'])
    specs = trees.flatten(built.shardings['params'])
    for name, leaf in trees.flatten(built.abstract_state['params']).items():
        axes = ', '.join(
            f'{axis or "-"} {size}' for axis, size in zip(meta[name].axes, leaf.shape, strict=True)
        )
        out.append(f'  {name:<52} [{axes}] {specs[name].spec}')
    return out
