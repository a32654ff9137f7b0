"""Datasets: from the `data` block of a config to samplers for training and batches for evaluation.

    data = dict(kind='stdlib', tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')

`kind` picks a source; `tokenizer`, `packing` and `cache` belong to a dataset of text, `workers` to
any dataset, and every other key is the source's own. Text is tokenised once into prepared shards
in the cache.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from effjax.core.config import as_dict
from effjax.core.errors import ConfigError, DataError
from effjax.core.registry import arguments, check_arguments, lookup, parameters, suggest
from effjax.data import SOURCES, cache, packing, sampler, shards, tokenizer_copy
from effjax.data.documents import Document
from effjax.data.mixture import Mixture
from effjax.data.packing import Batch, Rows
from effjax.data.sampler import ExampleSampler, Sampler, TextPart, TextSampler
from effjax.data.tokenizer_copy import KeptTokenizer

# Keys of a dataset, not of its source, with their defaults. `cache` is a folder, '' the user's
# own; `workers` is a number of processes that make batches, 0 a thread (see `loader`).
TEXT_KEYS: dict[str, Any] = {'tokenizer': None, 'packing': 'pack', 'cache': ''}
ANY_KEYS: dict[str, Any] = {'workers': 0}
DEFAULT_TOKENIZER = {'kind': 'byte'}


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a model and a task need to know of the data.

    Attributes:
      kind: 'text', 'image' or 'rows' (synthetic tokens with a few labels).
      digest: names the content (and the tokenizer).
      description: what the source says of itself, and of text: splits with documents, tokens,
        raw bytes.
      splits: names that `eval` takes.
      vocab_size: number of token ids; 0 for images.
      bos_id: precedes every document of text; else None.
      eos_id: the id that ends a document where documents follow each other: BOS, of the next one.
      tokenizer: `encode_batch`, `decode`; None without text.
      image_shape: (H, W, C) of images; else ().
      classes: number of labels of images; else 0.
      queries: labelled positions in each of the rows; else 0.
    """

    kind: str
    digest: str
    description: dict[str, Any]
    splits: tuple[str, ...]
    vocab_size: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    tokenizer: Any = None
    image_shape: tuple[int, ...] = ()
    classes: int = 0
    queries: int = 0


class EvalBatches(Protocol):
    """A split in a fixed order; iterate it as often as you like.

    Attributes:
      bytes: raw bytes of the text behind the targets; 0 without text.
      tokens: targets with weight 1; without text, examples.
    """

    bytes: int
    tokens: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Dataset(Protocol):
    """Text, images or synthetic rows, ready to train on.

    Attributes:
      info: what it holds.
    """

    info: DataInfo

    def describe(self) -> dict[str, Any]:
        """Returns what a run records of its data."""
        ...

    def train(self, batch_size: int, seq_len: int, seed: int) -> Sampler:
        """Returns the sampler of the training split."""
        ...

    def eval(self, split: str, batch_size: int, seq_len: int, batches: int = 0) -> EvalBatches:
        """Returns a split's batches, each token or image exactly once.

        Args:
          split: one of `info.splits`.
          batch_size: rows; the last batch is padded with rows of weight 0.
          seq_len: tokens a row; ignored for images.
          batches: 0 is the whole split; else so many batches of rows spread evenly over it.

        Raises:
          DataError: no such split.
        """
        ...


class InBatches:
    """Iteration over a fixed list of rows or images; a subclass makes the batch of a slice."""

    def __init__(self, count: int, batch_size: int):
        """Sets the number of rows and how many make a batch; the last may have fewer."""
        self._count = count
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f'batch {index} of {len(self)}')
        return self._make(slice(index * self._batch_size, (index + 1) * self._batch_size))

    def _make(self, chosen: slice) -> Batch:
        """Returns the batch of these rows, padded to `batch_size`."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------ text


@dataclasses.dataclass(frozen=True)
class TextMember:
    """One source of a text dataset.

    Attributes:
      name: for people and evaluations.
      prepared: its shards.
      share: its part of the training samples.
    """

    name: str
    prepared: shards.Prepared
    share: float


class TextDataset:
    """Prepared text of one source, or of several mixed."""

    def __init__(
        self,
        members: list[TextMember],
        *,
        source: Any,
        tokenizer: Any,
        packing: str,
        record: int,
        workers: int = 0,
    ):
        """Describes itself.

        Args:
          members: the sources, all with the same tokenizer.
          source: the one source, or the mixture that holds them.
          tokenizer: theirs.
          packing: 'pack', 'split' or 'stream'.
          record: tokens in a unit of shuffling: the longest row that will be asked for.
          workers: processes that make training batches.
        """
        self._workers = workers
        self._members = members
        self._source = source
        self._packing = packing
        self._record = record
        self.tokenizer = tokenizer
        digests = [m.prepared.digest for m in members]
        named = [f'{m.name}/{s}' for m in members for s in m.prepared.splits]
        self.info = DataInfo(
            kind='text',
            digest=digests[0] if len(digests) == 1 else cache.key(digests),
            description={
                **source.describe(),
                'packing': packing,
                'tokenizer': tokenizer.describe(),
                'prepared': {m.name: _sizes(m.prepared) for m in members},
            },
            splits=(*source.splits, *(named if len(members) > 1 else ())),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.bos_id,
            tokenizer=tokenizer,
        )

    def describe(self) -> dict[str, Any]:
        """Returns what the source says of itself, the tokenizer, and each split's size."""
        return self.info.description

    def documents(self, split: str) -> Iterator[Document]:
        """Streams a split's texts; those of prepared data are decoded."""
        return self._source.documents(split)

    def train(self, batch_size: int, seq_len: int, seed: int) -> TextSampler:
        """Returns the sampler of the training split.

        Raises:
          DataError: a source without training text, or with too little for one row.
        """
        parts = [
            self._part(m, 'train') for m in self._members if m.share or len(self._members) == 1
        ]
        return TextSampler(
            parts,
            record=self._record,
            batch_size=batch_size,
            seq_len=seq_len,
            seed=seed,
            workers=self._workers,
        )

    def eval(
        self, split: str, batch_size: int, seq_len: int, batches: int = 0
    ) -> 'TextEvalBatches':
        """Returns a split's batches: see `Dataset.eval`."""
        _check_split(split, self.info)
        name, _, own = split.rpartition('/')
        members = [m for m in self._members if not name or m.name == name]
        parts = [self._part(m, own) for m in members]
        return TextEvalBatches(parts, batch_size, seq_len, batches)

    def _part(self, member: TextMember, split: str) -> TextPart:
        prepared = member.prepared
        if split not in prepared.splits:
            raise DataError(
                f'source {member.name!r} has no split {split!r}; it has '
                f'{", ".join(prepared.splits)}.'
            )
        key = cache.key(prepared.digest, split, self._packing)[:12]
        return TextPart(member.name, key, prepared.splits[split], self._packing, member.share)


class TextEvalBatches(InBatches):
    """Rows of a split in the order of its text."""

    def __init__(self, parts: list[TextPart], batch_size: int, seq_len: int, batches: int):
        """Chooses the rows and counts what they cover.

        Args:
          parts: the sources, one after another.
          batch_size: rows in a batch.
          seq_len: tokens in a row.
          batches: how many; 0 is all.
        """
        self._parts = parts
        self._seq_len = seq_len
        rows = [
            packing.make_order(p.packing, p.tokens, seq_len, 0).held_out(seq_len) for p in parts
        ]
        self._part = np.repeat(np.arange(len(parts)), [len(r) for r in rows])
        self._rows = Rows.join(rows)
        chosen = _spread(len(self._rows), batches * batch_size)
        if chosen is not None:
            self._part, self._rows = self._part[chosen], self._rows[chosen]
        super().__init__(len(self._rows), batch_size)
        covered = [covers(p.tokens, self._rows[self._part == i]) for i, p in enumerate(parts)]
        self.tokens = sum(tokens for tokens, _ in covered)
        self.bytes = round(sum(size for _, size in covered))

    def _make(self, chosen: slice) -> Batch:
        size, rows, owner = self._batch_size, self._rows[chosen], self._part[chosen]
        out: Batch = {}
        for i, part in enumerate(self._parts):
            mine = np.flatnonzero(owner == i)
            piece = packing.make_batch(
                part.tokens, rows[mine], self._seq_len, part.packing, training=False
            )
            for name, array in piece.items():
                out.setdefault(name, np.zeros((size, self._seq_len), array.dtype))
                out[name][mine] = array
        return out


def covers(tokens: Any, rows: Rows) -> tuple[int, float]:
    """Counts what rows cover.

    Args:
      tokens: a `TokenStream`.
      rows: slices of it.

    Returns:
      The targets with weight 1, and the raw bytes behind them. A document that is covered in
      part counts its bytes in proportion to its tokens; one that is whole, exactly.
    """
    stop = np.minimum(rows.start + rows.length + 1, tokens.size)
    # Targets before a place in the stream: all tokens but the BOS ones.
    first, last = (p - np.searchsorted(tokens.starts, p) for p in (rows.start + 1, stop))
    ends = np.cumsum(np.diff(tokens.starts, append=tokens.size) - 1)
    size = np.cumsum(_predicted_bytes(tokens))
    before, after = (
        np.interp(p, np.concatenate([[0], ends]), np.concatenate([[0], size]))
        for p in (first, last)
    )
    return int((last - first).sum()), float((after - before).sum())


def _predicted_bytes(tokens: Any) -> np.ndarray:
    """Returns the bytes of each document that targets stand for: all, where BOS predicts the first.

    Without BOS a document's first token is no target, and its mean share is left out.
    """
    if tokens.bos:
        return tokens.raw_bytes
    length = np.diff(tokens.starts, append=tokens.size)
    return tokens.raw_bytes * ((length - 1) / length)


# ------------------------------------------------------------------------------ images and rows


class ExampleDataset:
    """Images, or synthetic rows, of one source."""

    def __init__(self, source: Any, *, workers: int = 0):
        """Describes itself.

        Args:
          source: an image source, or one of rows (see `effjax.data`).
          workers: processes that make training batches.
        """
        self._workers = workers
        self._source = source
        described = source.describe()
        self._digest = described['digest']
        self._row = 0 if source.modality == 'image' else int(source.seq_len)
        self.info = DataInfo(
            kind=source.modality,
            digest=self._digest,
            description=described,
            splits=tuple(source.splits),
            vocab_size=getattr(source, 'vocab_size', 0),
            image_shape=tuple(getattr(source, 'image_shape', ())),
            classes=int(getattr(source, 'classes', 0)),
            queries=getattr(source, 'queries', 0),
        )

    def describe(self) -> dict[str, Any]:
        """Returns what the source says of itself."""
        return self.info.description

    def train(self, batch_size: int, seq_len: int, seed: int) -> ExampleSampler:
        """Returns the sampler of the training split; of images `seq_len` has no meaning.

        Raises:
          DataError: a split without examples, or rows of another length than `seq_len`.
        """
        self._check_length(seq_len)
        return ExampleSampler(
            self._examples('train'),
            name=self.info.description.get('source', self.info.kind),
            key=cache.key(self._digest, 'train')[:12],
            batch_size=batch_size,
            seed=seed,
            workers=self._workers,
        )

    def eval(
        self, split: str, batch_size: int, seq_len: int = 0, batches: int = 0
    ) -> 'ExampleEvalBatches':
        """Returns a split's batches: see `Dataset.eval`."""
        _check_split(split, self.info)
        self._check_length(seq_len)
        return ExampleEvalBatches(self._examples(split), batch_size, batches)

    def _check_length(self, seq_len: int) -> None:
        if self._row and seq_len != self._row:
            name = self.info.description.get('source', 'rows')
            raise DataError(
                f'config.seq_len is {seq_len}, but the rows of data source {name!r} have '
                f'{self._row} tokens; make config.seq_len and config.data.seq_len the same.'
            )

    def _examples(self, split: str) -> Any:
        examples = self._source.examples(split)
        if not len(examples):
            raise DataError(f'split {split!r} has no {self.info.kind} examples; give it some.')
        return examples


class ExampleEvalBatches(InBatches):
    """Images or rows of a split in their own order."""

    bytes = 0

    def __init__(self, examples: Any, batch_size: int, batches: int):
        """Chooses the examples.

        Args:
          examples: `len` and `[indices]`.
          batch_size: examples in a batch.
          batches: how many; 0 is all.
        """
        self._examples = examples
        chosen = _spread(len(examples), batches * batch_size)
        self._index = np.arange(len(examples)) if chosen is None else chosen
        super().__init__(len(self._index), batch_size)
        self.tokens = len(self._index)

    def _make(self, chosen: slice) -> Batch:
        return sampler.example_batch(self._examples, self._index[chosen], self._batch_size)


# -------------------------------------------------------------------------------------- building


def build(
    block: Mapping[str, Any],
    *,
    seq_len: int,
    cache_dir: str | pathlib.Path | None = None,
    progress: shards.Progress | None = None,
) -> Dataset:
    """Builds the dataset of a config's `data` block; tokenises it where the cache has it not.

    Args:
      block: the block, with its `kind`.
      seq_len: the longest row that any stage will ask for; text is shuffled in records of it.
      cache_dir: where tokenizers and shards are kept; None takes the block's `cache`, else the
        user's cache.
      progress: called while tokenising with (split, documents, raw bytes, tokens).

    Raises:
      ConfigError: unknown kind or key, missing or mistyped argument.
      DataError: missing, empty or damaged data.
    """
    block = as_dict(block)
    _check_own(block)
    workers = block.get('workers', ANY_KEYS['workers'])
    source = build_source(block, 'config.data')
    if source.modality != 'text':
        return ExampleDataset(source, workers=workers)
    folder = pathlib.Path(cache_dir or block.get('cache') or cache.root()).expanduser()
    kept = build_tokenizer(source, block.get('tokenizer'), folder)
    if isinstance(source, Mixture):
        members = [
            TextMember(name, _prepared(member, kept, folder, progress), source.shares[name])
            for name, member in source.members.items()
        ]
    else:
        members = [TextMember(block['kind'], _prepared(source, kept, folder, progress), 1.0)]
    return TextDataset(
        members,
        source=source,
        tokenizer=kept.tokenizer,
        packing=block.get('packing', TEXT_KEYS['packing']),
        record=seq_len,
        workers=workers,
    )


def _check_own(block: Mapping[str, Any]) -> None:
    """Checks the dataset's own keys; the tokenizer's block is checked where it is built."""
    packing.check_packing(block.get('packing', TEXT_KEYS['packing']))
    workers = block.get('workers', ANY_KEYS['workers'])
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise ConfigError(f'config.data.workers must be an int of at least 0, got {workers!r}.')
    if not isinstance(block.get('cache', ''), str):
        raise ConfigError(f'config.data.cache must be a folder, got {block["cache"]!r}.')


def build_source(block: Mapping[str, Any], path: str) -> Any:
    """Builds the source of a block, its arguments checked; the dataset's own keys are left out.

    Args:
      block: with `kind`.
      path: where the block stands in the config, for messages.

    Raises:
      ConfigError: unknown kind or key, missing or mistyped argument.
      DataError: the source has no data.
    """
    if not isinstance(block, Mapping) or 'kind' not in block:
        raise ConfigError(f"{path}: expected a block such as dict(kind='stdlib'), got {block!r}.")
    component = lookup(SOURCES, block['kind'], 'data source', f'{path}.kind')
    inside = path != 'config.data'  # a member of a mixture
    own = {} if inside else {**TEXT_KEYS, **ANY_KEYS}
    known = {*parameters(component), *own}
    given = {}
    for name, value in arguments(block).items():
        if inside and name in (*TEXT_KEYS, *ANY_KEYS):
            raise ConfigError(
                f'{path}.{name}: {name!r} belongs to the mixture, not to one source; move it to '
                f'config.data.{name}.'
            )
        if name not in known:
            raise ConfigError(
                f'{path}.{name}: data source {block["kind"]!r} takes no {name!r}; it takes: '
                f'{", ".join(sorted(known)) or "nothing"}.' + suggest(name, known)
            )
        if name not in own:
            given[name] = value
    check_arguments(component, given, f'data source {block["kind"]!r}', path)
    source = component(**given)
    for name in TEXT_KEYS:
        if source.modality != 'text' and name in block:
            raise ConfigError(f'{path}.{name}: {name!r} belongs to text; remove it for images.')
    return source


def build_tokenizer(
    source: Any, block: Mapping[str, Any] | None, folder: pathlib.Path
) -> KeptTokenizer:
    """Builds the tokenizer of a block, or takes the one that prepared data was made with.

    Args:
      source: a text source.
      block: the block; None is the default.
      folder: the cache.

    Raises:
      ConfigError: a tokenizer for prepared data, or prepared data with different ones.
    """
    members = list(source.members.values()) if isinstance(source, Mixture) else [source]
    ready = [m.prepared for m in members if isinstance(m, shards.PreparedSource)]
    if not ready:
        return tokenizer_copy.build(
            block or DEFAULT_TOKENIZER,
            lambda: (document.text for document in source.documents('train')),
            folder,
            source.describe()['digest'],
        )
    if block is not None:
        raise ConfigError(
            'config.data.tokenizer: prepared data brings its own tokenizer; remove the key.'
        )
    if len({p.manifest['tokenizer_digest'] for p in ready}) > 1:
        raise ConfigError(
            'config.data.sources: their prepared data was made with different tokenizers '
            f'({", ".join(str(p.folder) for p in ready)}); prepare them with the same one.'
        )
    return ready[0].tokenizer()


def _prepared(
    source: Any, kept: KeptTokenizer, folder: pathlib.Path, progress: shards.Progress | None
) -> shards.Prepared:
    if isinstance(source, shards.PreparedSource):
        return source.prepared
    return shards.cached(source, kept, folder, progress=progress)


def _sizes(prepared: shards.Prepared) -> dict[str, dict[str, int]]:
    """Returns documents, tokens and raw bytes of each split."""
    return {
        split: {k: facts[k] for k in ('documents', 'tokens', 'bytes', 'without_tokens')}
        for split, facts in prepared.manifest['splits'].items()
    }


def _check_split(split: str, info: DataInfo) -> None:
    if split not in info.splits:
        raise DataError(
            f'the data has no split {split!r}; it has {", ".join(info.splits)}.'
            + suggest(split, info.splits)
        )


def _spread(total: int, wanted: int) -> np.ndarray | None:
    """Returns `wanted` of `total` indices, evenly spread; None where that is all of them."""
    if wanted == 0 or wanted >= total:
        return None
    return (2 * np.arange(wanted) + 1) * total // (2 * wanted)
