"""`python -m effjax.crossover --config=FILE[:VARIANT] --mixers=M1,M2 --lengths=512:8192`.

Measures on this device from which length on one mixer's layer beats another's: time of a forward
and backward pass, memory, training FLOPs and decoding state, at the config's width and in its
dtypes, equally many tokens at every length. The same command goes on where it stopped.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effjax.core.command import parse_with_overrides, quiet_platform, run_command
from effjax.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from effjax.study.crossover import Point

VERSION = 1


def main(argv: Sequence[str]) -> int:
    """The command."""
    args, overrides = _parse(argv)
    quiet_platform()
    from effjax.core.config import as_dict, load
    from effjax.study import crossover

    config = as_dict(load(args.config, overrides))
    own = config['model'].get('mixer')
    if not own:
        raise ConfigError(
            f'{args.config} has no config.model.mixer, from which width and heads are taken; give '
            'a config of a model with one.'
        )
    mixers = crossover.parse_mixers(args.mixers, own)
    lengths = crossover.parse_lengths(args.lengths)
    against = args.against or ('attention' if 'attention' in mixers else next(iter(mixers)))
    if against not in mixers:
        raise ConfigError(f'--against {against!r} is none of --mixers ({", ".join(mixers)}).')
    tokens = args.tokens or lengths[-1]
    if tokens < 1 or args.steps < 3:
        raise ConfigError('--tokens must be at least 1 and --steps at least 3.')
    for label, block in mixers.items():  # refused before anything is measured
        for length in lengths:
            crossover.Layer(label, block, config, length, max(1, tokens // length))
    out = pathlib.Path(args.out)
    wanted = conditions(config, mixers, tokens, args.steps)
    points = resume(out, wanted)
    missing = [n for n in lengths if n not in {p.length for p in points}]
    if missing:
        print(f'compiling {len(missing)} lengths of {len(mixers)} mixers', file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        ready = [crossover.prepare(config, mixers, n, tokens, pool) for n in missing]
    for length, layers in zip(missing, ready, strict=True):
        print(f'{length:,} tokens x {max(1, tokens // length)} rows', file=sys.stderr, flush=True)
        points += crossover.measure(layers, steps=args.steps)
        save(out, wanted, points)
    shown = [p for p in points if p.length in lengths]
    print(report(out, wanted, shown, against))
    return 0


def conditions(
    config: Mapping[str, Any], mixers: Mapping[str, Any], tokens: int, steps: int
) -> dict[str, Any]:
    """Returns what points must share to be compared."""
    import jax

    from effjax.study import crossover
    from effjax.study.plan import code_version

    model = config['model']
    return {
        'version': VERSION,
        'device': jax.devices()[0].device_kind,
        'backend': jax.default_backend(),
        'jax': jax.__version__,
        'code': code_version(),
        'width': model['width'],
        'dtype': crossover.dtype_name(config),
        'causal': model['kind'] == 'decoder',
        'positions': model.get('positions'),
        'tokens': tokens,
        'steps': steps,
        'mixers': {label: dict(block) for label, block in mixers.items()},
    }


def resume(out: pathlib.Path, wanted: Mapping[str, Any]) -> 'list[Point]':
    """Returns the points of an earlier, unfinished call.

    Raises:
      DataError: the folder holds points of another device, code or set of mixers.
    """
    from effjax.study.crossover import Point

    file = out / 'crossover.json'
    if not file.exists():
        return []
    try:
        saved = json.loads(file.read_text())
        found, points = saved['conditions'], [Point(**p) for p in saved['points']]
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f'{file} is damaged; delete it, or give another --out.') from e
    same = json.loads(json.dumps(wanted))
    other = [
        f'{key} ({found.get(key)}, now {now})' if isinstance(now, str | int) else key
        for key, now in same.items()
        if found.get(key) != now
    ]
    if other:
        raise DataError(
            f'{file} holds points with another {", ".join(other)}; give another --out, or delete '
            'it to measure afresh.'
        )
    return points


def save(out: pathlib.Path, wanted: Mapping[str, Any], points: 'Sequence[Point]') -> None:
    """Writes what has been measured, whole or not at all."""
    import dataclasses

    from effjax.training.files import write_json_atomic

    out.mkdir(parents=True, exist_ok=True)
    found = {'conditions': dict(wanted), 'points': [dataclasses.asdict(p) for p in points]}
    write_json_atomic(out / 'crossover.json', found)


def report(
    out: pathlib.Path, wanted: Mapping[str, Any], points: 'Sequence[Point]', against: str
) -> str:
    """Writes crossover.md and the plots, and returns the page's text.

    Args:
      out: the folder.
      wanted: see `conditions`.
      points: what was measured.
      against: label of the mixer that others are compared with.
    """
    from effjax.study import crossover_page

    page = crossover_page.render(wanted, points, against)
    (out / 'crossover.md').write_text(page)
    for name, svg in crossover_page.plots(points, against).items():
        (out / f'{name}.svg').write_text(svg)
    return f'{page}\npage and plots: {out}'


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog='python -m effjax.crossover', description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('--config', required=True, help='FILE or FILE:VARIANT')
    parser.add_argument(
        '--mixers', required=True, help="names, with arguments: 'retnet,mamba2(heads=8),attention'"
    )
    parser.add_argument(
        '--lengths', default='512:8192', help='LOW:HIGH, doubling, or a list (default 512:8192)'
    )
    parser.add_argument(
        '--against', default='', help="compare with this one (default 'attention', else the first)"
    )
    parser.add_argument(
        '--tokens', type=int, default=0, help='tokens a step (default: the longest length)'
    )
    parser.add_argument('--steps', type=int, default=20, help='timed steps of each (default 20)')
    parser.add_argument('--out', default='runs/crossover', help='folder (default runs/crossover)')
    return parse_with_overrides(parser, argv)


if __name__ == '__main__':
    sys.exit(run_command(main, sys.argv[1:]))
