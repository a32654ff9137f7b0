"""Exact and near-duplicates of documents in memory: the reference that every engine must equal.

Two stages with nothing but content between them. `prepare` looks at each document by itself, on
any worker; `resolve` puts the parts together. Whatever the order of the documents, and however
they are divided into parts, the result is equal: texts are numbered by their digest before
anything is compared.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from effjax.core.errors import ConfigError, DataError
from effjax.data.dedup import candidates, clusters, minhash, normalisation, verify
from effjax.data.dedup.shingling import KINDS, shingle_many
from effjax.data.documents import Document

PREFER = ('longest', 'shortest')
BATCH = 1 << 20  # characters shingled and signed together


@dataclasses.dataclass(frozen=True)
class Settings:
    """What counts as a duplicate, how it is searched for, and which one is kept.

    Attributes:
      threshold: the Jaccard similarity of two sets of shingles from which they are duplicates.
      n: words (or characters) of a shingle.
      kind: 'words' or 'chars', see `shingles`.
      fold_case: whether case matters not.
      permutations: P, places of a signature.
      bands, rows: how it is cut; both 0 chooses them for `recall` at the threshold.
      recall: see `minhash.choose`.
      seed: names the permutations.
      centres: members of a bucket that meet all others, see `candidates`.
      sources: names of sources, the most trusted first; others follow, all alike.
      prefer: 'longest' or 'shortest' text, among documents of equally trusted sources.
    """

    threshold: float = 0.8
    n: int = 5
    kind: str = 'words'
    fold_case: bool = False
    permutations: int = 128
    bands: int = 0
    rows: int = 0
    recall: float = 0.98
    seed: int = 0
    centres: int = 64
    sources: tuple[str, ...] = ()
    prefer: str = 'longest'

    def __post_init__(self) -> None:
        """Checks all values.

        Raises:
          ConfigError: one cannot be.
        """
        _check(self)

    @property
    def cut(self) -> tuple[int, int]:
        """The bands and rows in use."""
        if self.bands:
            return self.bands, self.rows
        chosen = minhash.choose(self.threshold, self.permutations, self.recall)
        return chosen.bands, chosen.rows


@dataclasses.dataclass(frozen=True)
class Text:
    """What is kept of a text: bytes of its normalised form, band keys [b], shingles [S]."""

    size: int
    keys: np.ndarray
    shingles: np.ndarray


@dataclasses.dataclass(frozen=True)
class Entry:
    """One document of the input: its id, its text's digest, the rank of its source."""

    id: str
    digest: bytes
    rank: int


@dataclasses.dataclass(frozen=True)
class Part:
    """What `prepare` makes of some documents; texts that are equal are there once."""

    settings: Settings
    entries: list[Entry]
    texts: dict[bytes, Text]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of one document.

    Attributes:
      id: the document's.
      keeper: the id of the document that stands for it; its own if it is kept.
      cluster: hexadecimal digest of the cluster's smallest text: a name by content.
      why: 'kept', 'exact' (the keeper has the same normalised text) or 'near'.
      jaccard: its similarity to the keeper, 1 for 'kept' and 'exact'. Below the threshold where
        similar documents form a chain: clusters are connected components.
    """

    id: str
    keeper: str
    cluster: str
    why: str
    jaccard: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One decision a document, in the order of ids, and counts of what was done.

    The decisions are what every engine must equal. Of the counts, 'verified' and 'similar' depend
    on which pairs an engine skips because they are connected already.
    """

    decisions: list[Decision]
    counts: dict[str, int]

    @property
    def kept(self) -> list[str]:
        """Ids of the documents that stay, in order."""
        return [d.id for d in self.decisions if d.why == 'kept']


def near_duplicates(documents: Iterable[Document], settings: Settings) -> Result:
    """Finds exact and near-duplicates, and says which document of each cluster is kept.

    Raises:
      DataError: two documents have one id.
    """
    return resolve([prepare(documents, settings)], settings)


def prepare(documents: Iterable[Document], settings: Settings) -> Part:
    """Normalises, shingles and signs documents, in batches of `BATCH` characters."""
    seeds = minhash.permutations(settings.permutations, settings.seed)
    ranks = {name: rank for rank, name in enumerate(settings.sources)}
    part = Part(settings, [], {})
    waiting: dict[bytes, tuple[int, str]] = {}
    characters = 0
    for document in documents:
        digest, size = normalisation.measure(document.text, settings.fold_case)
        rank = ranks.get(document.source, len(ranks))
        part.entries.append(Entry(document.id, digest, rank))
        if digest not in part.texts and digest not in waiting:
            waiting[digest] = size, document.text
            characters += len(document.text)
        if characters >= BATCH:
            part.texts.update(_prepared(waiting, settings, seeds))
            waiting, characters = {}, 0
    part.texts.update(_prepared(waiting, settings, seeds))
    return part


def _prepared(
    waiting: Mapping[bytes, tuple[int, str]], settings: Settings, seeds: np.ndarray
) -> dict[bytes, Text]:
    """Shingles and signs texts, given by digest with their sizes."""
    texts = [text for _, text in waiting.values()]
    found = shingle_many(texts, settings.n, settings.kind, settings.fold_case)
    keys = minhash.band_keys(minhash.sign_many(found, seeds), *settings.cut)
    return {
        digest: Text(size, keys[i], found[i])
        for i, (digest, (size, _)) in enumerate(waiting.items())
    }


def resolve(parts: Iterable[Part], settings: Settings) -> Result:
    """Compares the texts of all parts, and decides.

    Args:
      parts: from `prepare` with the same settings, in any order.
      settings: the same.

    Raises:
      DataError: two documents have one id, or a part was made with other settings.
    """
    parts = list(parts)
    for part in parts:
        _check_settings(part.settings, settings)
    entries = sorted((e for p in parts for e in p.entries), key=lambda e: e.id)
    _check_ids(entries)
    texts: dict[bytes, Text] = {}
    for part in parts:
        texts.update(part.texts)
    digests = sorted(texts)  # the number of a text is the rank of its digest
    ordered = [texts[d] for d in digests]
    roots, counts = cluster_texts(ordered, settings)
    decisions = _decide(entries, digests, ordered, roots, settings)
    why = Counter(d.why for d in decisions)
    counts |= {'documents': len(entries), 'clusters': len({d.cluster for d in decisions})}
    return Result(decisions, counts | {w: why[w] for w in ('kept', 'exact', 'near')})


def cluster_texts(texts: list[Text], settings: Settings) -> tuple[np.ndarray, dict[str, int]]:
    """Returns the smallest number of each text's cluster, int64 [N], and counts.

    Args:
      texts: in the order of their digests.
      settings: threshold and centres are used.
    """
    sets = [t.shingles for t in texts]
    # A text without words has the signature of every other such text: it meets nobody.
    wordy = np.array([i for i, s in enumerate(sets) if s.size], np.int64)
    keys = [texts[i].keys for i in wordy]
    bands = len(keys[0]) if keys else 1
    flat = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    groups = candidates.buckets(flat, np.repeat(wordy, bands))
    forest, verified, joined = clusters.Forest(len(texts)), 0, 0
    refused = np.empty(0, np.int64)  # pairs found too different; they may meet in another round
    for pairs in candidates.rounds(groups, settings.centres):
        pairs = pairs[forest.apart(pairs)]
        codes = pairs[:, 0] * len(texts) + pairs[:, 1]
        new = ~np.isin(codes, refused)
        pairs, codes = pairs[new], codes[new]
        alike = verify.similar(sets, pairs, settings.threshold)
        forest.join(pairs[alike])
        refused = np.concatenate([refused, codes[~alike]])
        verified += len(pairs)
        joined += int(alike.sum())
    counts = {
        'texts': len(texts),
        'without_words': len(texts) - len(wordy),
        'buckets': len(groups.sizes),
        'large_buckets': int(np.count_nonzero(groups.sizes > settings.centres + 1)),
        'verified': verified,
        'similar': joined,
    }
    return forest.roots, counts


def _decide(
    entries: list[Entry],
    digests: list[bytes],
    texts: list[Text],
    roots: np.ndarray,
    settings: Settings,
) -> list[Decision]:
    """Applies the keep-rule: least by (rank of the source, length, digest, id)."""
    numbers: Mapping[bytes, int] = {d: i for i, d in enumerate(digests)}
    number = np.array([numbers[e.digest] for e in entries], np.int64)
    rank = np.array([e.rank for e in entries], np.int64)
    size = np.array([t.size for t in texts], np.int64)[number]
    if settings.prefer == 'longest':
        size = -size
    # Entries come in the order of their ids: their place is the last rank.
    kept = clusters.keepers(roots[number], rank, size, number, np.arange(len(entries)))
    out = []
    for place, entry in enumerate(entries):
        keeper = int(kept[place])
        a, b = number[place], number[keeper]
        why = 'kept' if keeper == place else 'exact' if a == b else 'near'
        score = verify.jaccard(texts[a].shingles, texts[b].shingles) if why == 'near' else 1.0
        cluster = digests[roots[a]].hex()
        out.append(Decision(entry.id, entries[keeper].id, cluster, why, score))
    return out


def _check_ids(entries: list[Entry]) -> None:
    for one, other in itertools.pairwise(entries):
        if one.id == other.id:
            raise DataError(
                f'two documents have the id {one.id!r}; ids name what is removed and must differ.'
            )


def _check_settings(made: Settings, wanted: Settings) -> None:
    for field in dataclasses.fields(Settings):
        a, b = getattr(made, field.name), getattr(wanted, field.name)
        if a != b:
            raise DataError(
                f'a part was prepared with {field.name}={a!r}, not {b!r}; prepare it again with '
                'these settings.'
            )


def _check(s: Settings) -> None:
    if not 0 < s.threshold <= 1:
        raise ConfigError(f'threshold must be above 0 and at most 1, got {s.threshold}.')
    if s.n < 1:
        raise ConfigError(f'n, the words of a shingle, must be at least 1, got {s.n}.')
    if s.centres < 1:
        raise ConfigError(f'centres must be at least 1, got {s.centres}.')
    for name, value, known in (('kind', s.kind, KINDS), ('prefer', s.prefer, PREFER)):
        if value not in known:
            raise ConfigError(f'{name} must be {" or ".join(map(repr, known))}, got {value!r}.')
    if len(set(s.sources)) < len(s.sources):
        raise ConfigError(f'sources names one twice: {", ".join(s.sources)}.')
    if bool(s.bands) != bool(s.rows):
        raise ConfigError(
            f'bands and rows are given together, or both 0 to be chosen; got {s.bands} and '
            f'{s.rows}.'
        )
    minhash.check(*s.cut, s.permutations)
