"""Reference time: what a step takes on a named device, from a calibration table.

A table is a JSON file that `python -m effjax.calibrate` measures (docs/calibration.md). It holds
seconds by shape, a shape being all of a config that decides how long a step takes (`shape_of`).
A table is taken whole or not at all: one wrong entry would make one arm of a study look cheap.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effjax.core.errors import ConfigError

VERSION = 1
TOLERANCE = 0.03  # what repeats may differ by, and what a larger step may seem faster by
# What all entries of a table share; entries measured otherwise belong into another table.
CONDITIONS = (
    'device', 'backend', 'mesh', 'sharding', 'jax', 'xla_flags', 'effjax', 'steps', 'rounds',
)  # fmt: skip
SHAPE_KEYS = (
    'model', 'task', 'precision', 'optimizer', 'accumulate', 'batch_size', 'seq_len', 'stream',
    'execution', 'clip', 'ema',
)  # fmt: skip

# Arguments that scale numbers and leave the operations as they are, by block.
_FREE = {
    'model': {'init', 'embed_scale', 'eps', 'base'},
    'task': set[str](),
    'precision': {'initial', 'growth', 'backoff', 'interval', 'minimum'},
    'optimizer': {
        'b1', 'b2', 'eps', 'weight_decay', 'decay_rate', 'clip', 'rms', 'adam_lr_scale', 'adam_b1',
        'adam_b2', 'adam_eps', 'weight_power',
    },
}  # fmt: skip
# Arguments of which only counts whether they are there: absent, None and 0 are the same.
_SWITCHES = {'dropout', 'attention_dropout', 'soft_cap', 'z_loss', 'label_smoothing'}
# A longer, wider or deeper step is never faster; these say which of two steps is the larger.
_SIZE = re.compile(
    r'batch_size|seq_len|model\.(layers|width|image_size|segments\.\d+\.repeat|(.*\.)?ffn\.hidden)'
)
_MAKE = 'python -m effjax.calibrate'


def reference_seconds(config: Mapping[str, Any]) -> float | None:
    """Returns the seconds that `config.reference` charges for one step, None without a table.

    Args:
      config: a stage's config as plain dicts, with what the data knows filled in.

    Raises:
      ConfigError: a table that is missing or refused, or that does not cover the step.
    """
    path = config['reference']
    return Table.load(path).seconds(config) if path else None


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of a config decides how long its step takes, in a form to compare.

    In it: the model with its vocabulary, the task, precision, optimizer, batch and its division,
    row length, whether rows are one document (`data.packing='stream'`), execution, and whether
    there is clipping and a moving average. Not in it: learning rates and other factors, seeds,
    the data, evaluations, the mesh (a table has one). Dropout counts as on or off. An argument
    that is not known here counts as it is written.

    Args:
      config: as for `reference_seconds`.
    """
    images = bool(config['model'].get('image_size'))
    blocks = {name: _timed(config[name], _FREE[name]) for name in _FREE}
    if config.get('grown_from'):  # LiGO's maps are trained, and make the model of a small one
        grown_from = _timed(config['grown_from'], _FREE['model'])
        blocks['model'] = {**blocks['model'], 'grown_from': grown_from}
    if blocks['optimizer'].get('momentum'):
        del blocks['optimizer']['momentum']  # any but 0, which keeps no buffer
    return {
        **blocks,
        'accumulate': config['accumulate'],
        'batch_size': config['batch_size'],
        'seq_len': 0 if images else config['seq_len'],  # images have no rows
        'stream': config['data'].get('packing') == 'stream',
        'execution': _timed(config['execution'], set()),
        'clip': config['clip_norm'] > 0,
        'ema': config['ema'] > 0,
    }


def key_of(shape: Mapping[str, Any]) -> str:
    """Returns a digest of a shape: equal shapes, equal digests, whatever the order of keys."""
    text = json.dumps(shape, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(shape: Mapping[str, Any]) -> str:
    """Returns a shape in a few words."""
    model = shape['model']
    layers = model.get('layers') or sum(
        s.get('repeat', 1) * len(s['pattern']) for s in model.get('segments', ())
    )
    rows = f' x {shape["seq_len"]}' if shape['seq_len'] else ''
    return (
        f'{model["kind"]} of {layers} layers, width {model.get("width")}, batch '
        f'{shape["batch_size"]}{rows}, {shape["precision"]["kind"]}, {shape["optimizer"]["kind"]}'
    )


def flatten(value: Any, path: str = '') -> dict[str, Any]:
    """Returns {'a.b.0': leaf} of nested dicts and lists."""
    if isinstance(value, Mapping):
        items: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list | tuple):
        items = iter(enumerate(value))
    else:
        return {path: value}
    out = {}
    for key, inner in items:
        out.update(flatten(inner, f'{path}.{key}' if path else str(key)))
    return out


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measured step.

    Attributes:
      shape: see `shape_of`.
      seconds: the median over all timed steps.
      repeats: the medians of independent rounds.
      spread: interquartile range of single steps, over the median.
    """

    shape: dict[str, Any]
    seconds: float
    repeats: tuple[float, ...]
    spread: float

    @property
    def disagreement(self) -> float:
        """How much longer the longest repeat is than the shortest, as a share."""
        return max(self.repeats) / min(self.repeats) - 1

    def to_json(self) -> dict[str, Any]:
        """Returns the entry as the file holds it."""
        return {
            **self.shape,
            'seconds': self.seconds,
            'repeats': list(self.repeats),
            'spread': self.spread,
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """Steps measured on one device.

    Attributes:
      conditions: `CONDITIONS` -> value.
      made: ISO date of the last measurement.
      entries: the steps.
      name: where it comes from, for messages.
    """

    conditions: Mapping[str, Any]
    made: str
    entries: tuple[Entry, ...]
    name: str = 'reference table'

    @classmethod
    def load(cls, path: str | pathlib.Path) -> 'Table':
        """Reads and checks a table; a file that has not changed is read once.

        Raises:
          ConfigError: missing, unreadable, cut off, of another version, or refused by `check`.
        """
        file = pathlib.Path(path).expanduser()
        try:
            found = file.stat()
        except OSError as e:
            raise ConfigError(_unreadable(file, e)) from e
        return _load(file, found.st_mtime_ns, found.st_size)

    @classmethod
    def read(cls, path: str | pathlib.Path) -> 'Table':
        """Reads a table without judging its numbers.

        Raises:
          ConfigError: missing, unreadable, cut off, or of another version.
        """
        file = pathlib.Path(path).expanduser()
        try:
            saved = json.loads(file.read_text(encoding='utf-8'))
        except OSError as e:
            raise ConfigError(_unreadable(file, e)) from e
        except ValueError as e:
            raise ConfigError(
                f'{file} is not a reference table, or was cut off ({e}); make it again with '
                f'{_MAKE}.'
            ) from e
        return _parse(saved, f'reference table {file}')

    def check(self) -> None:
        """Refuses the table if one of its numbers cannot be right.

        Raises:
          ConfigError: two entries of one shape, repeats that differ by more than `TOLERANCE`,
            or a step that takes less time than a smaller one.
        """
        keys = [key_of(e.shape) for e in self.entries]
        for i, entry in enumerate(self.entries):
            if keys[i] in keys[:i]:
                raise ConfigError(f'{self.name} has two entries for {describe(entry.shape)}.')
            _check_repeats(entry, self.name)
        worst = max(_falls(self.entries), key=lambda pair: _fall(*pair), default=None)
        if worst is not None:
            small, large = worst
            raise ConfigError(
                f'{self.name} is not monotone: {describe(large.shape)} takes {large.seconds:.4g} '
                f's, less than the {small.seconds:.4g} s of a smaller step '
                f'({_differences(small.shape, large.shape, sizes=True)}); measure both again.'
            )

    def seconds(self, config: Mapping[str, Any]) -> float:
        """Returns what one step of a config takes on the table's device.

        Args:
          config: as for `reference_seconds`.

        Raises:
          ConfigError: a shape that the table does not cover, with the nearest that it does.
        """
        wanted = shape_of(config)
        found = self._by_key.get(key_of(wanted))
        if found is not None:
            return found.seconds
        nearest = sorted(self.entries, key=lambda e: _distance(e.shape, wanted))[:2]
        there = '; '.join(f'{_differences(e.shape, wanted)} ({e.seconds:.4g} s)' for e in nearest)
        raise ConfigError(
            f'{self.name} ({self.conditions["device"]}) does not cover {describe(wanted)}; its '
            f'nearest entries have {there}; add the step with {_MAKE}.'
        )

    @functools.cached_property
    def _by_key(self) -> dict[str, Entry]:
        return {key_of(e.shape): e for e in self.entries}

    def merged(self, newer: 'Table') -> 'Table':
        """Returns this table with the entries of a newer one, which replace those of their shape.

        Raises:
          ConfigError: measured under other conditions.
        """
        for name in CONDITIONS:
            old, new = self.conditions[name], newer.conditions[name]
            if old != new:
                raise ConfigError(
                    f'{self.name} was measured with {name} {old!r}, this is {new!r}; its times '
                    'cannot stand beside each other: write to another file.'
                )
        entries = tuple({**self._by_key, **newer._by_key}.values())
        return Table(self.conditions, newer.made, entries, self.name)

    def to_json(self) -> dict[str, Any]:
        """Returns the table as the file holds it."""
        return {
            'version': VERSION,
            **self.conditions,
            'made': self.made,
            'entries': [e.to_json() for e in self.entries],
        }


# ---- reading -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _load(file: pathlib.Path, modified: int, size: int) -> Table:
    table = Table.read(file)
    table.check()
    return table


def _unreadable(file: pathlib.Path, error: OSError) -> str:
    return f'cannot read reference table {file}: {error.strerror}; make one with {_MAKE}.'


def _parse(saved: Any, name: str) -> Table:
    version = saved.get('version') if isinstance(saved, Mapping) else None
    if version != VERSION:
        raise ConfigError(
            f'{name} is of version {version!r}, this effjax reads version {VERSION}; make it again '
            f'with {_MAKE}.'
        )
    missing = [key for key in (*CONDITIONS, 'made', 'entries') if key not in saved]
    if missing:
        raise ConfigError(f'{name} has no {missing[0]!r}; make it again with {_MAKE}.')
    entries = saved['entries']
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f'{name} has no entries; make it again with {_MAKE}.')
    conditions = {key: saved[key] for key in CONDITIONS}
    parsed = tuple(_entry(e, f'entry {i} of {name}') for i, e in enumerate(entries))
    return Table(conditions, saved['made'], parsed, name)


def _entry(saved: Any, name: str) -> Entry:
    if not isinstance(saved, Mapping):
        raise ConfigError(f'{name} is not a block; make the table again with {_MAKE}.')
    for key in (*SHAPE_KEYS, 'seconds', 'repeats', 'spread'):
        if key not in saved:
            raise ConfigError(f'{name} has no {key!r}; make the table again with {_MAKE}.')
    blocks = ('model', 'task', 'precision', 'optimizer')
    if not all(isinstance(saved[b], Mapping) and 'kind' in saved[b] for b in blocks):
        raise ConfigError(f'{name}: each of {", ".join(blocks)} must be a block with a kind.')
    repeats = saved['repeats']
    numbers = [saved['seconds'], *(repeats if isinstance(repeats, list) else [None])]
    if len(numbers) < 3 or not all(_is_positive(x) for x in numbers):
        raise ConfigError(
            f'{name} needs a positive number of seconds and at least two repeats, got seconds '
            f'{saved["seconds"]!r} and repeats {repeats!r}.'
        )
    shape = {key: _timed(saved[key], set()) for key in SHAPE_KEYS}
    return Entry(shape, float(saved['seconds']), tuple(repeats), saved['spread'])


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


# ---- checks ------------------------------------------------------------------------------------


def _check_repeats(entry: Entry, name: str) -> None:
    figures = ', '.join(f'{r:.4g}' for r in entry.repeats)
    if entry.disagreement > TOLERANCE:
        raise ConfigError(
            f'{name} does not repeat within {TOLERANCE:.0%}: {describe(entry.shape)} took '
            f'{figures} s; measure it again on an idle device.'
        )
    low, high = min(entry.repeats) * (1 - TOLERANCE), max(entry.repeats) * (1 + TOLERANCE)
    if not low <= entry.seconds <= high:
        raise ConfigError(
            f'{name} contradicts itself: {describe(entry.shape)} is given as {entry.seconds:.4g} '
            f's, but its repeats took {figures} s; measure it again.'
        )


def _falls(entries: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Yields (smaller step, larger step that takes less time).

    Two steps are compared when they differ in sizes alone and none of them is smaller in the
    second. Families of models keep the width of a head and change the number of heads with the
    width, so both forms of saying the same are looked at.
    """
    for view in (flatten, _by_head_width):
        split = [_sizes(view(e.shape)) for e in entries]
        for small, (rest, sizes) in zip(entries, split, strict=True):
            for large, (other, larger) in zip(entries, split, strict=True):
                grows = rest == other and all(larger[k] >= sizes[k] for k in sizes)
                if grows and larger != sizes and _fall(small, large) > TOLERANCE:
                    yield small, large


def _fall(small: Entry, large: Entry) -> float:
    return 1 - large.seconds / small.seconds


def _sizes(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    sizes = {k: v for k, v in flat.items() if _SIZE.fullmatch(k) and isinstance(v, int | float)}
    return {k: v for k, v in flat.items() if k not in sizes}, sizes


def _by_head_width(shape: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(shape)
    width = flat.get('model.width')
    if not _is_positive(width):
        return flat
    for path in [k for k in flat if k.endswith('.heads') and _is_positive(flat[k])]:
        mixer, heads = path.removesuffix('heads'), flat.pop(path)
        flat.setdefault(f'{mixer}head_dim', width / heads)
        if flat.get(f'{mixer}kv_heads'):
            flat[f'{mixer}kv_heads'] /= heads
    return flat


# ---- shapes ------------------------------------------------------------------------------------


def _timed(value: Any, free: set[str]) -> Any:
    """Returns a block without what leaves the time as it is, its numbers in one form."""
    if isinstance(value, Mapping):
        out = {}
        for key, inner in value.items():
            if key in free or (key in _SWITCHES and not inner):
                continue
            out[str(key)] = 'on' if key in _SWITCHES else _timed(inner, free)
        return out
    if isinstance(value, list | tuple):
        return [_timed(v, free) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _distance(shape: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[int, float]:
    """Returns (fields that differ, sum of the logarithms of ratios of numbers)."""
    pairs = _unequal(shape, wanted)
    logs = [abs(math.log(a / b)) for _, a, b in pairs if _is_positive(a) and _is_positive(b)]
    return len(pairs), sum(logs)


def _unequal(shape: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    one, other = flatten(shape), flatten(wanted)
    paths = [*one, *(k for k in other if k not in one)]
    pairs = [(k, one.get(k, 'unset'), other.get(k, 'unset')) for k in paths]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _differences(
    shape: Mapping[str, Any], wanted: Mapping[str, Any], *, sizes: bool = False
) -> str:
    """Returns 'model.layers 4 instead of 6' for the first three fields that differ."""
    pairs = _unequal(shape, wanted)
    if sizes:
        pairs = [p for p in pairs if _SIZE.fullmatch(p[0])]
    shown = [f'{path} {a} instead of {b}' for path, a, b in pairs[:3]]
    more = len(pairs) - 3
    return ', '.join([*shown, *([f'{more} more'] if more > 0 else [])])
