"""Which methods go together: the rows of two in one small config, trained for two steps.

`combine` puts rows of `methods.toml` into one config, `attempt` trains it, `build` only builds it.
What `tools/pairs.py` found by this for every pair stands in `effjax/pairs.json`; `load` reads it.
"""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import pathlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from effjax.core import config as config_lib
from effjax.core.errors import ConfigError, StudyError

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
FILE = PACKAGE / 'pairs.json'
STATES = ('works', 'refused', 'untested', 'broken')
STEPS = 2
# The base config on which techniques are shown that any model could have.
PLAIN = 'configs/lm.py'
NOT_RUN = 'not run yet; run: python tools/pairs.py'
TWO_BASES = 'are two base configs, and a run has one'
# Values that make any decoder or vision transformer small, wherever the key stands.
TINY = {
    'width': 32, 'layers': 2, 'heads': 2, 'head_dim': 16, 'hidden': 48, 'repeat': 1, 'window': 8,
    'max_len': 32, 'vocab_size': 0, 'image_size': 8, 'patch': 2, 'channels': 1, 'classes': 10,
}  # fmt: skip


class Row(Protocol):
    """What a pair needs of a method: its name, its base config, and the lines that turn it on."""

    @property
    def id(self) -> str:
        """Name of the method."""

    @property
    def base(self) -> str:
        """Config file and variant, relative to the repository."""

    @property
    def config(self) -> tuple[str, ...]:
        """Overrides as 'a.b=value'."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """What came of two methods in one config.

    Attributes:
      first, second: the methods, in the order of `methods.toml`.
      state: 'works' (two steps were trained), 'refused' (by a `ConfigError`), 'untested' (no one
        config holds both), 'broken' (any other error: a bug).
      reason: why, in one sentence; '' where it works.
      digest: of both rows' base and lines, by which a stale entry is told.
    """

    first: str
    second: str
    state: str
    reason: str
    digest: str

    @property
    def key(self) -> tuple[str, str]:
        """The two names."""
        return self.first, self.second


# ---- what was found ----------------------------------------------------------------------------


def load(file: pathlib.Path = FILE) -> dict[tuple[str, str], Pair]:
    """Returns (first, second) -> `Pair` of a stored table; of a missing file, nothing.

    Raises:
      StudyError: a file that is not such a table.
    """
    if not file.exists():
        return {}
    try:
        pairs = [Pair(**entry) for entry in json.loads(file.read_text())]
    except (ValueError, TypeError) as e:
        raise StudyError(
            f'{file.name} is no table of pairs ({e}); make it again: python tools/pairs.py --all.'
        ) from e
    return {pair.key: pair for pair in pairs}


def as_json(pairs: Iterable[Pair]) -> str:
    """Returns a table as JSON, one pair a line, so that a difference shows pairs."""
    lines = [json.dumps(dataclasses.asdict(pair), ensure_ascii=False) for pair in pairs]
    return '[\n' + ',\n'.join(lines) + '\n]\n'


def digest(first: Row, second: Row) -> str:
    """Returns what identifies the configs of two rows: 16 hexadecimal digits."""
    text = json.dumps([[row.base, list(row.config)] for row in (first, second)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def partners(
    name: str, rows: Mapping[str, Row], pairs: Mapping[tuple[str, str], Pair]
) -> dict[str, dict[str, str]]:
    """Returns state -> {other method: reason} of one method, over every other row.

    A pair without an entry, or whose rows have changed since, counts as untested.

    Args:
      name: a key of `rows`.
      rows: the methods, in the order of their file.
      pairs: a stored table.
    """
    out: dict[str, dict[str, str]] = {state: {} for state in STATES}
    order = list(rows)
    for other in order:
        if other == name:
            continue
        first, second = sorted((name, other), key=order.index)
        pair = pairs.get((first, second))
        if pair is None or pair.digest != digest(rows[first], rows[second]):
            changed = 'a row has changed since it was run; run: python tools/pairs.py'
            out['untested'][other] = NOT_RUN if pair is None else changed
        else:
            out[pair.state][other] = pair.reason
    return out


# ---- one config for several rows ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Combined:
    """Several rows in one config.

    Attributes:
      config: the config as plain dicts, or None where there cannot be one.
      reason: why there is none, in one sentence.
    """

    config: dict[str, Any] | None
    reason: str = ''


def combine(rows: Sequence[Row], root: pathlib.Path) -> Combined:
    """Puts the lines of rows onto one base config, made small enough to train in a moment.

    Args:
      rows: one or two methods.
      root: the repository, which holds the base configs.

    Raises:
      ConfigError: a line that the base config refuses.
    """
    base = _base(rows)
    if base is None:
        both = ' and '.join(row.base for row in rows)
        return Combined(None, f'{both} {TWO_BASES}')
    config = tiny(config_lib.load(str(root / base)))
    set_by = [_assigned(config, row.config) for row in rows]
    reason = _conflict([values for _, values in set_by])
    if reason:
        return Combined(None, reason)
    reason = _without_effect(config, base, [name for _, values in set_by for name in values])
    if reason:
        return Combined(None, reason)
    # Blocks are emptied before any value is set: a row may set a key in another row's block.
    for name in sorted({name for blocks, _ in set_by for name in blocks}):
        _put(config, name, {})
    for _, values in set_by:
        for name, value in values.items():
            _put(config, name, copy.deepcopy(value))
    return Combined(config)


def tiny(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with a small model on small data, two steps long, without outputs.

    Decoders read the bytes of effjax's own core, vision transformers the 8x8 digits.
    """
    out = config_lib.as_dict(config)
    whole = out['model']
    out['model'] = _shrink(out['model'])
    out |= {'steps': STEPS, 'budget': '', 'batch_size': 8, 'seq_len': 32, 'evals': {}}
    if out['stages']:
        out['model']['layers'] = 4  # which a quarter of are one
        out['stages'] = [_tiny_stage(stage, whole, out['model']) for stage in out['stages']]
        out['steps'] = sum(stage['steps'] for stage in out['stages'])
    out['log'] |= {'progress': False, 'tensorboard': False}
    if out['model']['kind'] == 'vit':
        out |= {'data': {'kind': 'digits'}, 'task': {'kind': 'classification'}}
        out['seq_len'] = (TINY['image_size'] // TINY['patch']) ** 2 + 1
    else:
        # One document, since the few files might all be drawn for training.
        text = {'path': str(PACKAGE / 'core'), 'pattern': '*.py', 'one_document': True}
        # Some mixers take no documents: their configs say 'stream'.
        packing = {'packing': out['data'].get('packing', 'pack')}
        out['data'] = {'kind': 'text', **text, **packing, 'tokenizer': {'kind': 'byte'}}
    return out


def _tiny_stage(
    stage: Mapping[str, Any], whole: Mapping[str, Any], small: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a stage of one step, its model as much smaller than the run's as it was."""
    out = {k: v for k, v in stage.items() if k not in ('share', 'budget', 'until', 'batch_size')}
    out['steps'] = 1
    if 'model' in stage:
        out['model'] = _in_proportion(stage['model'], whole, small)
    if 'seq_len' in stage:
        out['seq_len'] = 16
    if isinstance(stage.get('grow'), Mapping) and 'steps' in stage['grow']:
        # One more to learn maps in.
        out |= {'steps': 2, 'grow': {**stage['grow'], 'steps': 1}}
    return out


def _in_proportion(value: Any, whole: Any, small: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            k: _in_proportion(v, whole[k], small[k]) if k in whole else v for k, v in value.items()
        }
    if isinstance(value, int) and not isinstance(value, bool):
        return value * small // whole
    return value


def taught(config: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Returns a config whose teacher, where it has one, is a run that is made for it.

    Args:
      config: of `combine`.
      folder: an empty folder for the teacher's files.
    """
    from effjax.training.session import train

    task = config['task']
    if task['kind'] != 'distillation':
        return config
    inner = task.get('task', {'kind': 'next_token'})
    with contextlib.suppress(ConfigError):  # the student's refusal is the one that counts
        train({**config, 'task': inner}, folder)
    return {**config, 'task': {**task, 'teacher': {**task['teacher'], 'run': str(folder)}}}


def _shrink(value: Any, key: str = '') -> Any:
    """Returns a model block with every size small; None and zero stay what they mean."""
    if isinstance(value, dict):
        return {k: _shrink(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_shrink(v) for v in value]
    return TINY[key] if key in TINY and value else value


def _base(rows: Sequence[Row]) -> str | None:
    """Returns the base config that can hold all rows, or None.

    A row without lines is its base config; lines can be carried to another row's.
    """
    bases = {row.base for row in rows}
    if len(bases) == 1:
        return rows[0].base
    fixed = {row.base for row in rows if not row.config} or bases - {PLAIN}
    return fixed.pop() if len(fixed) == 1 else None


def _assigned(base: Mapping[str, Any], lines: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns the blocks that lines replace, and path -> value of everything they set."""
    trial = copy.deepcopy(dict(base))
    blocks, values = [], {}
    for line in lines:
        name = line.partition('=')[0]
        config_lib.apply_override(trial, line)
        value = _get(trial, name)
        if isinstance(value, dict):
            blocks.append(name)
        values.update(_leaves(name, value))
    return blocks, values


def _leaves(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    out = {}
    for key, inner in value.items():
        out.update(_leaves(f'{name}.{key}', inner))
    return out


def _conflict(values: Sequence[Mapping[str, Any]]) -> str:
    """Returns why two rows' values exclude each other, or ''."""
    if len(values) < 2:
        return ''
    first, second = values
    for name, value in first.items():
        if name in second and second[name] != value:
            return f'both set config.{name}: {value!r} and {second[name]!r}'
        inside = [other for other in second if other.startswith(f'{name}.')]
        inside += [name for other in second if name.startswith(f'{other}.')]
        if inside:
            return f'one sets config.{inside[0]}, the other replaces what holds it'
    return ''


def _without_effect(config: Mapping[str, Any], base: str, names: Sequence[str]) -> str:
    """Returns which line a model would not see since it lists its blocks one by one, or ''."""
    segments = config['model'].get('segments') or []
    blocks = [block for segment in segments for block in segment['pattern']]
    for name in names:
        keys = name.split('.')
        if blocks and keys[0] == 'model' and all(keys[1] in block for block in blocks):
            part = f'config.model.{keys[1]}'
            return f'{base} lists its blocks, each with its own {keys[1]}, and does not read {part}'
    return ''


def _get(config: Any, name: str) -> Any:
    for key in name.split('.'):
        config = config[int(key)] if isinstance(config, list) else config[key]
    return config


def _put(config: dict[str, Any], name: str, value: Any) -> None:
    holder, _, last = name.rpartition('.')
    node = config
    for key in holder.split('.') if holder else ():
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


# ---- trying it ---------------------------------------------------------------------------------


def build(config: Mapping[str, Any]) -> tuple[str, str]:
    """Builds data, model and optimizer of a config without an array or a compiled step.

    Returns:
      (state, reason); the state 'works' means only that nothing was refused so far.
    """
    from effjax.training import setup
    from effjax.training.runtime import Runtime

    def made() -> None:
        with tempfile.TemporaryDirectory() as folder:
            whole = taught(dict(config), pathlib.Path(folder))
            config_lib.check_form(whole)
            setup.check(whole)
            Runtime(whole)

    return _outcome(made)


def attempt(config: Mapping[str, Any], workdir: pathlib.Path) -> tuple[str, str]:
    """Trains a combined config to its end, as `effjax.train` does, its summary included.

    Args:
      config: of `combine`.
      workdir: an empty folder for what the run leaves.

    Returns:
      (state, reason): 'works', 'refused' or 'broken'.

    Raises:
      KeyboardInterrupt: a signal stopped the run.
    """
    from effjax.training import finish, setup
    from effjax.training.loop import Trainer

    def trained() -> None:
        whole = taught(dict(config), workdir / 'teacher')
        config_lib.check_form(whole)
        setup.check(whole)
        trainer = Trainer(whole, workdir / 'run')
        if trainer.run():  # the trainer takes a first Ctrl-C as a wish to save and leave
            raise KeyboardInterrupt
        done = finish.summary(trainer)
        if done['final_step'] != config['steps'] or not done['ledger']['model_flops'] > 0:
            raise StudyError(
                f'the run ended at step {done["final_step"]} of {config["steps"]} with '
                f'{done["ledger"]["model_flops"]} model FLOPs on its ledger.'
            )

    return _outcome(trained)


def attempt_json(text: str) -> tuple[str, str]:
    """Returns what `attempt` says of a config given as JSON, in a folder that is thrown away.

    A process may be asked for hundreds: compiled steps are dropped from time to time.
    """
    import jax

    if next(_attempts) % 20 == 19:
        jax.clear_caches()
    with tempfile.TemporaryDirectory() as folder:
        return attempt(json.loads(text), pathlib.Path(folder))


_attempts = itertools.count()


def judge(first: Row, second: Row, root: pathlib.Path) -> tuple[Combined, tuple[str, str] | None]:
    """Returns two rows combined, and (state, reason) where that is known without building."""
    try:
        combined = combine((first, second), root)
    except ConfigError as e:
        return Combined(None), ('refused', _what(e))
    if combined.config is None:
        return combined, ('untested', combined.reason)
    return combined, None


def _outcome(work: Any) -> tuple[str, str]:
    try:
        work()
    except ConfigError as e:
        return 'refused', _what(e)
    except Exception as e:  # whatever it is, the table shows it
        return 'broken', f'{type(e).__name__}: {_line(e)}'
    return 'works', ''


def _what(error: Exception) -> str:
    """Returns what a message says is wrong; what to do about it is of no use in a table."""
    return _line(error).partition(';')[0].rstrip('.')


def _line(error: Exception) -> str:
    """Returns a message on one line, without where this machine keeps its files."""
    return ' '.join(str(error).split()).replace(f'{PACKAGE.parent.as_posix()}/', '')
