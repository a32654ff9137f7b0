"""What stands at the end of a run: the summary, the gzip yardstick and a sample of text."""

from collections.abc import Mapping
from typing import Any

import jax

from effjax.core.errors import ConfigError
from effjax.costs import meters, mfu
from effjax.data.dataset import build_source
from effjax.data.gzip_baseline import gzip_baseline
from effjax.kernels import choices
from effjax.models.decode import Sampling, complete
from effjax.training import setup


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
        'memory': {**meters.memory(jax.local_devices()), **trainer.memory},
        'mfu': _mfu(trainer),
        'data': runtime.dataset.info.description,
        'execution': {
            'body': runtime.built.model.body.describe(),
            'kernels': choices(),
            'compiler_options': trainer.compiler_options,
        },
        'environment': setup.environment(),
        'warnings': trainer.warnings,
    }
    if trainer.stopped_by:
        return out
    if trainer.config['finish']['gzip']:
        out['gzip_bits_per_byte'] = gzip_bits(trainer.config['data'])
    if trainer.config['finish']['sample_tokens']:
        out['sample'] = sample(runtime, trainer.state)
    return out


def gzip_bits(block: Mapping[str, Any]) -> float:
    """Bits per byte of gzip -9 on a data block's held-out documents, each compressed by itself.

    Raises:
      ConfigError: data whose documents are not at hand (prepared shards, mixtures, images).
    """
    source = build_source(block, 'config.data')
    if not hasattr(source, 'documents'):
        raise ConfigError(
            f'config.finish.gzip needs the text of its documents, which data source '
            f'{block["kind"]!r} does not have; set it to false.'
        )
    return gzip_baseline(source.documents('valid'))['bits_per_byte']


def sample(runtime: Any, state: Mapping[str, Any]) -> str:
    """Returns `config.finish.sample_prompt` and its continuation, at temperature 0.8.

    An empty prompt begins a document.
    """
    options = runtime.config['finish']
    new = complete(
        runtime.built.graphdef,
        {'params': runtime.eval_params(state), 'buffers': state['buffers']},
        runtime.dataset.info.tokenizer,
        options['sample_prompt'],
        max_len=runtime.built.model.max_len,
        tokens=options['sample_tokens'],
        sampling=Sampling(temperature=0.8, top_p=0.95),
        seed=runtime.config['seed'],
    )
    return options['sample_prompt'] + new


def lines(out: Mapping[str, Any]) -> list[str]:
    """Returns the summary as a few lines for a person."""
    text = []
    for name, values in out['eval'].items():
        shown = ', '.join(f'{k} {v:.4g}' for k, v in values.items())
        text.append(f'{name}: {shown}')
    if 'gzip_bits_per_byte' in out:
        text.append(
            f'gzip -9 on the same held-out files: {out["gzip_bits_per_byte"]:.3f} bits/byte'
        )
    if out.get('sample'):
        text += ['', 'sample:', *(f'    {line}' for line in out['sample'].splitlines()), '']
    return text


def _mfu(trainer: Any) -> dict[str, Any] | None:
    clock, ledger = trainer.clock, trainer.ledger
    return mfu(
        ledger.model_flops,
        clock.seconds('train') + clock.seconds('data'),
        jax.devices()[0],
        trainer.runtime.precision.policy.compute,
        trainer.runtime.mesh.size,
        hardware_flops=ledger.hardware_flops,
    )
