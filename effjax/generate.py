"""`python -m effjax.generate --run=DIR [--prompt=TEXT] [--tokens=N] [--temperature=T] ...`.

Continues a text with the newest valid checkpoint of a run of `effjax.train`, on one device.
From Python: `effjax.generate.load(run)` once, then `model.complete(prompt, ...)`.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core.command import quiet_platform, run_command
from effjax.core.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained language model with its tokenizer.

    Attributes:
      graphdef: the model without its arrays.
      arrays: dict(params=, buffers=).
      tokenizer: its run's.
      max_len: the longest sequence it takes.
      step: the checkpoint's step.
    """

    graphdef: Any
    arrays: Mapping[str, Any]
    tokenizer: Any
    max_len: int
    step: int

    def complete(
        self,
        prompt: str,
        *,
        tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Returns a continuation of the prompt; see `effjax.models.decode.complete`."""
        from effjax.models.decode import Sampling, complete

        return complete(
            self.graphdef,
            self.arrays,
            self.tokenizer,
            prompt,
            max_len=self.max_len,
            tokens=tokens,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
        )


def load(run: str | pathlib.Path, step: int | None = None) -> Loaded:
    """Loads a run's model from a checkpoint, the newest valid one if no step is given.

    Raises:
      CheckpointError: no run there, or no valid checkpoint.
      ConfigError: not a language model.
    """
    quiet_platform()
    folder = pathlib.Path(run)
    config = read_config(folder)
    if config['model']['kind'] != 'decoder':
        raise ConfigError(
            f'{folder} holds a {config["model"]["kind"]!r}, which generates no text; give the '
            'folder of a decoder.'
        )
    from effjax.training.checkpoints import Checkpointer
    from effjax.training.runtime import DONE, Runtime

    # One device, whatever the run had; scanned layers compile in the least time.
    config['mesh'] = dict.fromkeys(config['mesh'], 1)
    config['execution'] = {**config['execution'], 'layers': 'scan', 'remat': 'none'}
    runtime = Runtime(config, with_source=False)
    checkpointer = Checkpointer(folder / 'checkpoints')
    try:
        restored = checkpointer.restore(
            lambda found: runtime.abstract_sharded(runtime.stage_of(found)), step
        )
    finally:
        checkpointer.close()
    stage = runtime.stage_of(restored.manifest)
    progress = restored.extra.get('progress', DONE)
    params = runtime.eval_params(restored.state, stage, progress)
    arrays = {'params': params, 'buffers': restored.state['buffers']}
    tokenizer, built = runtime.dataset.info.tokenizer, runtime.models[stage].built
    model = built.model
    return Loaded(built.graphdef, arrays, tokenizer, model.max_len, restored.step)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the resolved config of a run.

    Raises:
      CheckpointError: no run there.
    """
    file = folder / 'config.json'
    if not file.is_file():
        raise CheckpointError(f'{folder} holds no run (no config.json); give the --workdir of one.')
    return json.loads(file.read_text())


def main(argv: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog='python -m effjax.generate',
        description='Continues a text with a trained model.',
        allow_abbrev=False,
    )
    parser.add_argument('--run', required=True, metavar='DIR', help='folder of the run')
    parser.add_argument('--prompt', default='', help='text to go on from; none begins a document')
    parser.add_argument('--tokens', type=int, default=128, help='most tokens to generate')
    parser.add_argument('--temperature', type=float, default=0.8, help='0 is greedy')
    parser.add_argument('--top_k', type=int, default=0, help='keep the k likeliest; 0 keeps all')
    parser.add_argument('--top_p', type=float, default=1.0, help='nucleus; 1 keeps all')
    parser.add_argument('--seed', type=int, default=0, help='of the draws')
    parser.add_argument('--step', type=int, help='checkpoint; the newest valid one by default')
    args = parser.parse_args(argv)
    model = load(args.run, args.step)
    text = model.complete(
        args.prompt,
        tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(args.prompt + text)
    return 0


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
