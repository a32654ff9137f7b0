"""Zoology's figure 2 (Arora et al., arXiv 2312.04927): its models, its data, its published cells.

A cell is a mixer, a row length N and a width d: accuracy on held-out MQAR rows, the best over four
learning rates.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from effjax.core.config import defaults, finish

LENGTHS = {64: 4, 128: 8, 256: 16}  # row length -> key-value pairs
WIDTHS = (64, 128, 256)
RATES = tuple(float(r) for r in np.logspace(-4, -2, 4))
EPOCHS, ROWS, HELD_OUT = 64, 100_000, 3_000
ENOUGH = 0.99  # accuracy at which a cell needs no more epochs

# Accuracies read off the published figure; those whose marker another one hides are less sure.
PUBLISHED: dict[str, dict[int, tuple[float, float, float]]] = {
    'attention': {64: (1.0, 1.0, 1.0), 128: (1.0, 1.0, 1.0), 256: (1.0, 1.0, 1.0)},
    'h3': {64: (0.93, 1.0, 0.99), 128: (0.25, 0.73, 0.92), 256: (0.09, 0.64, 0.61)},
    'base_conv': {64: (0.70, 0.94, 0.97), 128: (0.37, 0.61, 0.84), 256: (0.14, 0.34, 0.81)},
    'rwkv4': {64: (0.77, 0.94, 0.97), 128: (0.17, 0.50, 0.76), 256: (0.04, 0.06, 0.67)},
    'hyena': {64: (0.52, 0.75, 0.84), 128: (0.20, 0.66, 0.75), 256: (0.05, 0.13, 0.53)},
}
HIDDEN = {
    ('h3', 64, 256), ('rwkv4', 64, 128), ('rwkv4', 64, 256), ('hyena', 128, 64),
    ('hyena', 128, 256), ('h3', 256, 64), ('hyena', 256, 64),
}  # fmt: skip

Layers = list[dict[str, Any]]
# name -> (row length -> the two layers' mixers). Those of the paper first, then others.
MIXERS: dict[str, Callable[[int], Layers]] = {
    'attention': lambda n: 2 * [
        {'kind': 'attention', 'heads': 1, 'bias': True, 'attention_dropout': 0.1}
    ],
    'h3': lambda n: 2 * [{'kind': 'h3', 'state': n, 'head_dim': 2}],
    'base_conv': lambda n: [{'kind': 'base_conv', 'conv': 3}, {'kind': 'base_conv', 'conv': 0}],
    'rwkv4': lambda n: 2 * [{'kind': 'rwkv4'}],
    'hyena': lambda n: 2 * [{'kind': 'hyena', 'bias': True}],
    'retnet': lambda n: 2 * [{'kind': 'retnet', 'heads': 2, 'conv': 4}],
    'mamba': lambda n: 2 * [{'kind': 'mamba'}],
    'mamba2': lambda n: 2 * [{'kind': 'mamba2'}],
    'gla': lambda n: 2 * [{'kind': 'gla', 'heads': 2, 'conv': 4}],
    'gated_deltanet': lambda n: 2 * [{'kind': 'gated_deltanet', 'heads': 2}],
    'rwkv7': lambda n: 2 * [{'kind': 'rwkv7', 'heads': 2}],
    'based': lambda n: [
        {'kind': 'base_conv', 'conv': 3}, {'kind': 'based', 'heads': 1, 'key_dim': 8}
    ],
    'window': lambda n: 2 * [{'kind': 'attention', 'heads': 1, 'bias': True, 'window': n // 4}],
}  # fmt: skip
# Not part of the table; by their names only. `small`: long filters begin near 0, as all linear
# layers of the published code do: theirs is normal with a deviation of 0.02 and without biases.
# `deep`: so too, and four layers, as earlier versions of that code have for all but attention.
# Linear attention sums up its values by keys of 64 dimensions, `narrow` of 4.
VARIANTS: dict[str, Callable[[int], Layers]] = {
    'hyena_small': lambda n: 2 * [{'kind': 'hyena', 'bias': True, 'filter_std': 0.02}],
    'base_conv_small': lambda n: [
        {'kind': 'base_conv', 'conv': 3}, {'kind': 'base_conv', 'conv': 0, 'filter_std': 0.02}
    ],
    'linear_attention': lambda n: 2 * [{'kind': 'linear_attention', 'heads': 1, 'conv': 4}],
    'linear_attention_narrow': lambda n: 2 * [
        {'kind': 'linear_attention', 'heads': 1, 'key_dim': 4, 'conv': 4}
    ],
    'hyena_deep': lambda n: 4 * [{'kind': 'hyena', 'bias': True, 'filter_std': 0.02}],
    'base_conv_deep': lambda n: 2 * [
        {'kind': 'base_conv', 'conv': 3}, {'kind': 'base_conv', 'conv': 0, 'filter_std': 0.02}
    ],
}  # fmt: skip
POSITIONED = ('attention', 'window')  # learned positions; the others have none


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the sweep.

    Attributes:
      mixer: a key of `MIXERS` or `VARIANTS`.
      length: tokens N in a row, a key of `LENGTHS`.
      width: model width d.
    """

    mixer: str
    length: int
    width: int

    @property
    def published(self) -> float | None:
        """The published accuracy, None beyond the paper."""
        row = PUBLISHED.get(self.mixer, {}).get(self.length)
        return row[WIDTHS.index(self.width)] if row else None

    @property
    def sure(self) -> bool:
        """Whether its marker in the figure can be seen whole."""
        return (self.mixer, self.length, self.width) not in HIDDEN


def order(mixers: Iterable[str] = MIXERS) -> list[Cell]:
    """Returns all cells: the published ones first, short and narrow ones first among them."""
    cells = [Cell(m, n, d) for n in LENGTHS for d in WIDTHS for m in mixers]
    return sorted(cells, key=lambda c: c.published is None)


def batch_size(length: int) -> int:
    """Returns the batch of the published runs."""
    return 512 if length <= 128 else 256


def configs(
    cell: Cell, *, rows: int = ROWS, held_out: int = HELD_OUT, epochs: int = EPOCHS, **data: Any
) -> list[Any]:
    """Returns a cell's runs, one a learning rate.

    Args:
      cell: mixer, length and width.
      rows: training rows.
      held_out: rows to judge on.
      epochs: times that the training rows are seen.
      **data: other arguments of the data source, for tests.
    """
    made, layers = [], (MIXERS | VARIANTS)[cell.mixer](cell.length)
    for rate in RATES:
        config = defaults()
        config.name = f'{cell.mixer}-{cell.length}-{cell.width}-{rate:.1e}'
        config.seq_len, config.batch_size = cell.length, batch_size(cell.length)
        config.steps = max(1, round(epochs * rows / config.batch_size))
        pairs = LENGTHS.get(cell.length, max(1, cell.length // 16))
        config.data = {
            'kind': 'mqar', 'seq_len': cell.length, 'pairs': pairs, 'train': rows,
            'valid': held_out, **data,
        }  # fmt: skip
        config.task = {'kind': 'recall'}
        config.model = {
            'kind': 'decoder',
            'width': cell.width,
            'segments': [{'pattern': [{'mixer': mixer}], 'repeat': 1} for mixer in layers],
            'mixer': {'kind': 'attention', 'heads': 1},  # what segments do not say: nothing
            'ffn': {'kind': 'identity'},
            'norm': {'kind': 'layernorm'},
            'positions': {'kind': 'learned' if cell.mixer in POSITIONED else 'none'},
            'bias': True,
            'embed_dropout': 0.1,
        }
        config.precision = {'kind': 'fp32'}
        config.optimizer = {'kind': 'adamw', 'weight_decay': 0.1}
        config.schedule = {'kind': 'cosine', 'peak': rate, 'stairs': epochs}
        config.clip_norm = 0.0
        config.evals.valid = {'every_share': 1 / epochs}
        config.log.progress, config.log.tensorboard = False, False
        config.log.every_steps = max(1, config.steps // epochs)
        made.append(finish(config))
    return made
