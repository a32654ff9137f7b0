"""Shingles: a document as the set of hashes of its n-grams (Broder, 1997).

    words   n-grams of words. A word is a run of letters, digits and underscores; punctuation and
            white space only separate. In scripts without spaces every character is a word, so
            that there the same n-grams are n-grams of characters (`scripts.py` has the rule).
            A rule by the character, not by the document, has no threshold at which two nearly
            equal documents of mixed scripts are cut differently.
    chars   n-grams of all characters that are not separators, in any script.

A document with fewer than n words is one shingle of all of them; without any word it has none,
and is then nobody's near-duplicate. Words of more than 256 characters count as words of 256.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from effjax.core.errors import ConfigError
from effjax.data.dedup import hashing, scripts
from effjax.data.dedup.normalisation import canonical

KINDS = ('words', 'chars')
LONGEST = 256  # characters of a word: base64 and the like is cut, or memory had no bound
_BLOCK = 1 << 17  # characters taken at once: what is made of them stays in the cache
_SHORT = 0x5851F42D4C957F2D  # sets the one shingle of a short document apart from an n-gram


def shingles(text: str, n: int = 5, kind: str = 'words', fold_case: bool = False) -> np.ndarray:
    """Returns the set of a document's shingles.

    The same for texts with the same `normalise(text, fold_case)`. Memory beyond the text: three
    times eight bytes a word, and a few MB.

    Args:
      text: the document.
      n: words, or characters, of a shingle.
      kind: one of `KINDS`.
      fold_case: whether case matters not.

    Returns:
      uint64 [S], sorted, unique, well mixed.

    Raises:
      ConfigError: n below 1, or an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f'shingles are of {" or ".join(KINDS)}, got {kind!r}.')
    if n < 1:
        raise ConfigError(f'a shingle has at least 1 of the {kind}, got {n}.')
    text = canonical(text, fold_case)
    hashes = word_hashes(text) if kind == 'words' else char_hashes(text)
    return unique(ngrams(hashes, n))


def shingle_many(
    texts: Sequence[str], n: int = 5, kind: str = 'words', fold_case: bool = False
) -> list[np.ndarray]:
    """Returns `shingles` of each text; several times faster where texts are short.

    Numpy's price of a call is that of hundreds of words: short texts are hashed in one go.
    """
    out: list[np.ndarray] = []
    for a, b in _groups([len(t) for t in texts]):
        if b - a == 1 or kind != 'words' or n < 1:
            out += [shingles(text, n, kind, fold_case) for text in texts[a:b]]
        else:
            out += _together([canonical(text, fold_case) for text in texts[a:b]], n)
    return out


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields where runs of texts begin and end that have at most a block of characters."""
    begin = total = 0
    for at, size in enumerate(sizes):
        if at > begin and total + size > _BLOCK:
            yield begin, at
            begin, total = at, 0
        total += size
    if begin < len(sizes):
        yield begin, len(sizes)


def _together(texts: Sequence[str], n: int) -> list[np.ndarray]:
    """Shingles `canonical` texts, at least two, as one text with breaks."""
    hashes, starts, _ = _block_hashes('\n'.join(texts), True)
    edges = np.cumsum([0, *(len(t) + 1 for t in texts)])
    words = np.searchsorted(starts, edges).tolist()
    spans = list(itertools.pairwise(words))
    short = {a: ngrams(hashes[a:b].copy(), n) for a, b in spans if 0 < b - a < n}
    grams = hashing.combine(hashes, n)
    # Runs across a break are left out. An empty text's span begins where the next one's does.
    return [
        unique(grams[a : b - n + 1]) if b - a >= n else short[a] if b > a else grams[:0].copy()
        for a, b in spans
    ]


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hashes of all runs of n, in order; one of everything where there are fewer.

    Args:
      hashes: uint64 [N]; overwritten.
      n: length of a run.

    Returns:
      uint64 [N - n + 1]; [1] where 0 < N < n; [0] where N is 0.
    """
    if 0 < hashes.size < n:
        hashes[0] ^= np.uint64(_SHORT + hashes.size)
        return hashing.combine(hashes, hashes.size)
    return hashing.combine(hashes, n) if hashes.size else hashes


def unique(hashes: np.ndarray) -> np.ndarray:
    """Returns the distinct values in order; sorts its input in place."""
    hashes.sort()
    new = np.ones(hashes.size, bool)
    np.not_equal(hashes[1:], hashes[:-1], out=new[1:])
    return hashes[new]


def word_hashes(text: str) -> np.ndarray:
    """Returns the hash of each word of a `canonical` text, in order: uint64 [N]."""
    parts, at = [], 0
    while at < len(text):
        block = text[at : at + _BLOCK]
        hashes, _, used = _block_hashes(block, at + _BLOCK >= len(text))
        parts.append(hashes)
        at += used
    return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.uint64)])


def char_hashes(text: str) -> np.ndarray:
    """Returns the hash of each character that is not a separator, in order: uint64 [N]."""
    parts = [np.empty(0, np.uint64)]
    for at in range(0, len(text), _BLOCK):
        points = _points(text[at : at + _BLOCK])
        points = points[scripts.classes()[points] != scripts.SEPARATOR]
        # The hash of a word of one character is of its UTF-8; here of its number: never compared.
        parts.append(hashing.mix(points.astype(np.uint64)))
    return np.concatenate(parts)


def _block_hashes(block: str, final: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Hashes the words of a block; returns also where they start, and the characters used up.

    A word that touches the end of the block, and may go on, is left for the next one.
    """
    data = block.encode()
    if len(data) == len(block):
        kinds, before = np.frombuffer(data.translate(scripts.byte_classes()), np.uint8), None
        starts, ends = _ascii_words(kinds)
    else:
        points = _points(block)
        kinds, before = scripts.classes()[points], _bytes_before(points)
        starts, ends = _words(kinds)
    used = len(block)
    starts, ends = _cut(starts, ends)
    if not final and kinds[-1] == scripts.WORD and ends[-1] - starts[-1] < LONGEST:
        used = int(starts[-1])
        starts, ends = starts[:-1], ends[:-1]
    if before is None:
        return hashing.hash_spans(data, starts, ends - starts), starts, used
    return hashing.hash_spans(data, before[starts], before[ends] - before[starts]), starts, used


def _ascii_words(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the runs of 1 in uint8 [N] of 0 and 1 start and end."""
    edges = np.flatnonzero(kinds[1:] != kinds[:-1]) + 1
    first = [0] if kinds[0] else []
    last = [kinds.size] if kinds[-1] else []
    edges = np.concatenate([np.array(first, np.int64), edges, np.array(last, np.int64)])
    return edges[::2], edges[1::2]


def _words(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where words start and end, among separators and characters that stand alone."""
    padded = np.zeros(kinds.size + 2, np.uint8)
    padded[1:-1] = kinds
    left, right = padded[:-1], padded[1:]  # on both sides of each place between characters
    differ = left != right
    starts = np.flatnonzero((right == scripts.ALONE) | ((right == scripts.WORD) & differ))
    ends = np.flatnonzero((left == scripts.ALONE) | ((left == scripts.WORD) & differ))
    return starts, ends


def _cut(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts words longer than `LONGEST` into words of that length and a rest."""
    lengths = ends - starts
    if not lengths.size or lengths.max() <= LONGEST:
        return starts, ends
    counts = -(-lengths // LONGEST)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(starts, counts) + LONGEST * (np.arange(first.size) - first)
    return starts, np.minimum(starts + LONGEST, np.repeat(ends, counts))


def _points(text: str) -> np.ndarray:
    """Returns the code points of a text: uint32 [N]."""
    return np.frombuffer(text.encode('utf-32-le'), '<u4')


def _bytes_before(points: np.ndarray) -> np.ndarray:
    """Returns how many bytes of UTF-8 stand before each character, and in all: int64 [N + 1]."""
    sizes = np.ones(points.size, np.int64)
    for least in (0x80, 0x800, 0x10000):
        sizes += points >= least
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
