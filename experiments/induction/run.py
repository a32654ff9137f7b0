"""Induction heads: trained on rows of 256 tokens, tested on rows of 64 to 16,384 by passing state.

    python -m experiments.induction.run --mixers mamba attention --out runs/induction --publish

Mamba's section 4.1.2 (arXiv 2312.00752): a trigger stands somewhere in a row of random tokens and
again at its end, and what followed it must be said. Two layers of width 64. Longer rows are read in
pieces, the decoding state going from one to the next, so that the test also holds the states to the
parallel form. A mixer whose run is in --out already is not trained again. --publish keeps what was
found in results/results.json, and for the methods' cards.
"""

import argparse
import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.config import as_dict, defaults, finish
from effjax.data.sources.induction import Induction
from effjax.models import merge
from effjax.study import facts
from effjax.training.files import write_json_atomic
from effjax.training.loop import Trainer

LENGTH, WIDTH, VOCABULARY = 256, 64, 16
TESTED = tuple(2**k for k in range(6, 15))
RESULTS = pathlib.Path(__file__).parent / 'results'
# name -> (model keys, learning rate): the better one of the paper's 2e-4 and 1e-3 (appendix E.1, by
# which attention and Hyena do not learn at 1e-3), and that of Mamba for those it does not train.
MIXERS: dict[str, tuple[dict[str, Any], float]] = {
    'mamba': ({'mixer': {'kind': 'mamba'}, 'positions': {'kind': 'none'}}, 1e-3),
    'attention': ({'mixer': {'kind': 'attention', 'heads': 8}}, 2e-4),
    'attention_learned': (
        {'mixer': {'kind': 'attention', 'heads': 8}, 'positions': {'kind': 'learned'}}, 2e-4
    ),
    'h3': ({'mixer': {'kind': 'h3'}, 'positions': {'kind': 'none'}}, 2e-4),
    'hyena': ({'mixer': {'kind': 'hyena'}, 'positions': {'kind': 'none'}}, 2e-4),
    'mamba2': ({'mixer': {'kind': 'mamba2'}, 'positions': {'kind': 'none'}}, 1e-3),
    'gated_deltanet': (
        {'mixer': {'kind': 'gated_deltanet', 'heads': 2}, 'positions': {'kind': 'none'}}, 1e-3
    ),
}  # fmt: skip

# mixer -> method of the catalogue whose card says what was found
METHODS = {
    'mamba': 'mamba', 'attention': 'self-attention', 'h3': 'h3', 'hyena': 'hyena',
    'mamba2': 'mamba2', 'gated_deltanet': 'gated-deltanet',
}  # fmt: skip


def config_of(name: str, steps: int, batch: int, longest: int, **data: Any) -> Any:
    """Returns the run of a mixer.

    Args:
      name: a key of `MIXERS`.
      steps: training steps.
      batch: rows of a step.
      longest: the longest row that will be tested; the model is built for it.
      **data: other arguments of the data source, for tests.
    """
    model, rate = MIXERS[name]
    config = defaults()
    config.name = f'induction-{name}'
    config.steps, config.batch_size, config.seq_len = steps, batch, LENGTH
    config.data = {
        'kind': 'induction', 'seq_len': LENGTH, 'vocab_size': VOCABULARY,
        'train': steps * batch, 'valid': 1024, **data,
    }  # fmt: skip
    config.seq_len = config.data['seq_len']
    config.task = {'kind': 'recall'}
    config.model = {
        'kind': 'decoder', 'width': WIDTH, 'layers': 2, 'ffn': None, 'max_len': longest, **model
    }  # fmt: skip
    config.precision = {'kind': 'fp32'}
    config.optimizer = {'kind': 'adamw', 'weight_decay': 0.0}
    config.schedule = {'kind': 'constant', 'peak': rate}
    config.evals.valid = {'every_share': 0.05}
    config.log.progress = config.log.tensorboard = False
    return finish(config)


def extrapolate(
    model: Any, length: int, *, rows: int, piece: int, vocab_size: int = VOCABULARY
) -> float:
    """Returns the share of rows of a length whose answer is found, reading them in pieces.

    Args:
      model: a trained decoder.
      length: tokens in a row.
      rows: rows to test.
      piece: tokens read at once; the state goes from one piece to the next.
      vocab_size: of the task.
    """
    task = Induction(seq_len=length, vocab_size=vocab_size, train=1, valid=rows, seed=1)
    batch = task.examples('valid')[:]

    @jax.jit
    def read(tokens, state):
        hidden, state = model.prefill(tokens, state)
        return model.logits(hidden[:, -1]), state

    state = model.init_state(rows, length)
    for start in range(0, length, piece):
        logits, state = read(jnp.asarray(batch['tokens'][:, start : start + piece]), state)
    return float(np.mean(np.argmax(logits, -1) == batch['labels'][:, 0]))


def run_mixer(name: str, folder: pathlib.Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains and tests a mixer; returns its result, None where a signal came."""
    config = as_dict(config_of(name, args.steps, args.batch, max(args.lengths), **args.data))
    trainer = Trainer(config, folder)
    if trainer.run():
        return None
    model = merge(trainer.runtime.built.graphdef, trainer.judged())
    size = trainer.runtime.config['model']['vocab_size']
    tested = {
        str(n): extrapolate(
            model, n, rows=max(8, min(args.rows, 2**20 // n)), piece=args.piece, vocab_size=size
        )
        for n in args.lengths
    }
    return {
        'mixer': name,
        'rate': MIXERS[name][1],
        'params': trainer.runtime.params,
        'rows_seen': trainer.ledger.examples,
        'valid': trainer.results['valid']['accuracy'],
        'tested': tested,
        'device': jax.devices()[0].device_kind,
        'jax': jax.__version__,
        'date': datetime.date.today().isoformat(),
    }


def publish(results: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> None:
    """Keeps results, the newest of each mixer and rate, and what their cards say.

    Args:
      results: rows of `run_mixer`.
      folder: `experiments/induction/results`.
    """
    file = folder / 'results.json'
    kept = json.loads(file.read_text()) if file.exists() else []
    rows = {(r['mixer'], r['rate']): r for r in (*kept, *results)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, list(rows.values()))
    chosen = [r for (name, rate), r in rows.items() if rate == MIXERS[name][1] and name in METHODS]
    lines = {}
    for r in chosen:
        found = ', '.join(f'{v:.2f} at {n}' for n, v in r['tested'].items() if int(n) >= LENGTH)
        lines[METHODS[r['mixer']]] = f'accuracy by length of the row: {found}'
    if lines:
        what = f'Induction heads, trained on {LENGTH} tokens'
        date = max(r['date'] for r in chosen)
        facts.write(folder, what, chosen[-1]['device'], date, lines)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns accuracy by mixer and length as Markdown."""
    lengths = list(dict.fromkeys(n for r in results for n in r['tested']))
    out = [f'| mixer | rows seen | {" | ".join(lengths)} |']
    out += [f'| --- | ---: |{" ---: |" * len(lengths)}']
    for r in results:
        cells = [f'{r["tested"][n]:.3f}' if n in r['tested'] else '-' for n in lengths]
        out.append(f'| {r["mixer"]} | {r["rows_seen"]:,} | {" | ".join(cells)} |')
    return '\n'.join(out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--mixers', nargs='+', choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument('--steps', type=int, default=25_000)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--lengths', type=int, nargs='+', default=list(TESTED))
    parser.add_argument('--rows', type=int, default=512, help='rows tested at each length, at most')
    parser.add_argument('--piece', type=int, default=1024, help='tokens read at once')
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/induction'))
    parser.add_argument('--publish', action='store_true', help='into experiments/induction/results')
    parser.add_argument('--data', type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    results = []
    for name in args.mixers:
        file = args.out / name / 'result.json'
        if file.exists():
            results.append(json.loads(file.read_text()))
            continue
        result = run_mixer(name, args.out / name, args)
        if result is None:
            print('stopped by a signal; the same command goes on')
            return
        file.write_text(json.dumps(result, indent=1) + '\n')
        results.append(result)
        print(f'{name}: {json.dumps(result["tested"])}', flush=True)
    print(table(results))
    if args.publish:
        publish(results, RESULTS)


if __name__ == '__main__':
    main()
