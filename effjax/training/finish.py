"""What stands at the end of a run: the summary, the gzip yardstick and a sample of text."""

from collections.abc import Mapping
from typing import Any

import jax

from effjax.costs import meters, mfu
from effjax.data.gzip_baseline import gzip_baseline
from effjax.kernels import choices
from effjax.models.decode import Sampling, complete
from effjax.training import setup, teacher
from effjax.training.progress import human


def summary(trainer: Any) -> dict[str, Any]:
    """Returns what `summary.json` holds of a trainer that has stopped."""
    runtime, ledger, clock = trainer.runtime, trainer.ledger, trainer.clock
    out = {
        'final_step': ledger.steps,
        'complete': trainer.stopped_by is None,
        'eval': trainer.results,
        'ledger': ledger.totals(),
        'clock': clock.to_dict(),
        'params': runtime.params,
        'joules': trainer.energy.joules(),
        'memory': meters.memory(jax.local_devices(), trainer.memory),
        'mfu': _mfu(trainer),
        'data': runtime.dataset.info.description,
        'execution': {
            'body': runtime.built.model.body.describe(),
            'kernels': {**trainer.kernels, **choices()},
            'compiler_options': trainer.compiler_options,
        },
        'sharding': {
            'mesh': dict(runtime.mesh.shape),
            'fell_back': list(runtime.built.fallbacks),
        },
        'environment': setup.environment(),
        'warnings': trainer.warnings,
    }
    taught = teacher.describe(trainer.config)
    if taught is not None:
        out['teacher'] = taught
    if trainer.stopped_by:
        return out
    if trainer.config['finish']['gzip']:
        held_out = runtime.dataset.documents('valid')
        out['gzip_bits_per_byte'] = gzip_baseline(held_out)['bits_per_byte']
    if trainer.config['finish']['sample_tokens']:
        out['sample'] = sample(runtime, trainer.judged(), trainer.config)
    return out


def sample(runtime: Any, arrays: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Returns `config.finish.sample_prompt` and its continuation, at temperature 0.8.

    An empty prompt begins a document.

    Args:
      runtime: of the run.
      arrays: the params and buffers of the model that speaks.
      config: of the run.
    """
    options = config['finish']
    new = complete(
        runtime.built.graphdef,
        arrays,
        runtime.dataset.info.tokenizer,
        options['sample_prompt'],
        max_len=runtime.built.model.max_len,
        tokens=options['sample_tokens'],
        sampling=Sampling(temperature=0.8, top_p=0.95),
        seed=config['seed'],
    )
    return options['sample_prompt'] + new


def lines(out: Mapping[str, Any]) -> list[str]:
    """Returns the summary as a few lines for a person."""
    text = ['']
    if out.get('sample'):
        text += ['sample:', *(f'    {line}' for line in out['sample'].splitlines()), '']
    text += _costs(out)
    for name, values in out['eval'].items():
        shown = ', '.join(f'{k} {v:.4g}' for k, v in values.items())
        text.append(f'{name}: {shown}')
    if 'gzip_bits_per_byte' in out:
        bits = [v['bits_per_byte'] for v in out['eval'].values() if 'bits_per_byte' in v]
        ours = f'{min(bits):.3f} bits/byte against ' if bits else ''
        text.append(f'held-out files: {ours}{out["gzip_bits_per_byte"]:.3f} of gzip -9')
    return text


def _costs(out: Mapping[str, Any]) -> list[str]:
    """What the run cost, in three lines."""
    ledger, clock = out['ledger'], out['clock']
    hardware = ledger['hardware_flops']
    executed = f', {human(hardware, "FLOP")} executed' if hardware is not None else ''
    kinds = ('train', 'data', 'eval', 'checkpoint', 'compile', 'other')
    seconds = ', '.join(f'{kind} {human(clock[kind], "s")}' for kind in kinds)
    found = [f'{human(out["params"])} parameters']
    compiled = (out['memory'].get('compiled') or {}).get('total')
    if compiled:
        found.append(f'{human(compiled, "B")} a device planned')
    if out['memory'].get('device_peak_bytes'):
        found.append(f'{human(out["memory"]["device_peak_bytes"], "B")} at the peak')
    found.append(f'MFU {out["mfu"]["mfu"]:.1%}' if out['mfu'] else 'no MFU: peak unknown')
    if out['joules'] is not None:
        found.append(f'{human(out["joules"], "J")}')
    return [
        f'cost: {ledger["steps"]} steps, {human(ledger["tokens"])} tokens, '
        f'{human(ledger["model_flops"], "FLOP")}{executed}',
        f'time: {seconds}',
        f'size: {", ".join(found)}',
    ]


def _mfu(trainer: Any) -> dict[str, Any] | None:
    clock = trainer.clock
    model_flops, hardware_flops = trainer.ledger.computed
    return mfu(
        model_flops,
        clock.seconds('train') + clock.seconds('data'),
        jax.devices()[0],
        trainer.runtime.precision.policy.compute,
        trainer.runtime.mesh.size,
        hardware_flops=hardware_flops,
    )
