"""The WordPiece vocabulary: greedy merges by likelihood.

Of all adjacent pairs inside words, the one whose merge raises the unigram likelihood of the text
most is merged (Schuster and Nakajima, 2012), where byte-pair encoding merges the most frequent.
With f(n) = n log n, n the counts of pieces and N their sum, the log-likelihood is
`sum f(n) - f(N)`, and merging k times a pair (a, b) changes it by
`f(n_a - k) - f(n_a) + f(n_b - k) - f(n_b) + f(k) + f(N) - f(N - k)`.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

PREFIX = '##'


def alphabet(counts: Mapping[str, int], limit: int) -> list[str]:
    """Returns the single-character pieces, sorted.

    Args:
      counts: word -> how often.
      limit: how many characters, the most frequent ones.

    Returns:
      Each character, and `##` with each character that words of several characters hold: any such
      word over the alphabet can then be written, wherever its characters stand.
    """
    seen: Counter[str] = Counter()
    inside: set[str] = set()
    for word, n in counts.items():
        for character in word:
            seen[character] += n
        if len(word) > 1:
            inside |= set(word)
    ranked = sorted(seen, key=lambda c: (-seen[c], c))[:limit]
    return sorted([*ranked, *(PREFIX + c for c in ranked if c in inside)])


def learn(
    counts: Mapping[str, int], letters: list[str], size: int, min_frequency: int
) -> list[str]:
    """Learns multi-character pieces.

    Args:
      counts: word -> how often.
      letters: the alphabet; words with other characters teach nothing.
      size: how many pieces to learn.
      min_frequency: words and pairs seen less often are left out.

    Returns:
      At most `size` pieces, in the order in which they were learned; fewer where no pair is left.
    """
    state = _Merger(counts, letters, min_frequency)
    learned: dict[str, None] = {}
    while len(learned) < size:
        piece = state.merge_best()
        if piece is None:
            break
        learned[piece] = None  # two ways to the same piece count once
    return list(learned)


class _Merger:
    """Words as lists of piece numbers, with the counts of pieces and of adjacent pairs."""

    def __init__(self, counts: Mapping[str, int], letters: list[str], min_frequency: int):
        self.pieces = list(letters)
        self.number = {piece: i for i, piece in enumerate(letters)}
        self.min_frequency = max(min_frequency, 1)
        ranked = sorted((-n, word) for word, n in counts.items() if n >= min_frequency)
        self.words: list[list[int]] = []
        self.times: list[int] = []
        for negative, word in ranked:
            split = [PREFIX + c if i else c for i, c in enumerate(word)]
            if all(piece in self.number for piece in split):
                self.words.append([self.number[piece] for piece in split])
                self.times.append(-negative)
        self.piece_count = np.zeros(1024, np.int64)
        self.pair_number: dict[tuple[int, int], int] = {}
        self.where: dict[int, set[int]] = defaultdict(set)  # pair -> words that held it
        self.left = np.zeros(1024, np.int64)
        self.right = np.zeros(1024, np.int64)
        self.count = np.zeros(1024, np.int64)
        self.gain = np.zeros(1024)  # without the term of N, which changes for all pairs
        self._count_all()

    def _count_all(self) -> None:
        self.piece_count = _room(self.piece_count, len(self.pieces))
        for w, (word, times) in enumerate(zip(self.words, self.times, strict=True)):
            for piece in word:
                self.piece_count[piece] += times
            for pair in itertools.pairwise(word):
                self._add(pair, times, w)
        self.total = int(self.piece_count.sum())
        self._refresh(np.arange(len(self.pair_number)))

    def _add(self, pair: tuple[int, int], times: int, word: int) -> int:
        p = self.pair_number.setdefault(pair, len(self.pair_number))
        if p >= len(self.count):
            self.left, self.right = _room(self.left, p + 1), _room(self.right, p + 1)
            self.count, self.gain = _room(self.count, p + 1), _room(self.gain, p + 1)
        self.left[p], self.right[p] = pair
        self.count[p] += times
        self.where[p].add(word)
        return p

    def _refresh(self, pairs: np.ndarray) -> None:
        k = self.count[pairs]
        left, right = self.piece_count[self.left[pairs]], self.piece_count[self.right[pairs]]
        apart = _f(left - k) - _f(left) + _f(right - k) - _f(right)
        # A piece beside itself loses two for each merge; in a run of three, one pair is not merged.
        twice = _f(left - 2 * k) - _f(left)
        same = self.left[pairs] == self.right[pairs]
        self.gain[pairs] = np.where(same, twice, apart) + _f(k)

    def merge_best(self) -> str | None:
        """Merges the best pair everywhere and returns the piece it makes; None if none is left."""
        n = len(self.pair_number)
        k = self.count[:n]
        gain = self.gain[:n] + _f(np.array(self.total)) - _f(self.total - k)
        gain = np.where(k >= self.min_frequency, gain, -np.inf)
        if not n or not np.isfinite(best := gain.max()):
            return None
        p = int(np.flatnonzero(gain == best)[0])  # of equals, the pair that was seen first
        a, b = int(self.left[p]), int(self.right[p])
        piece = self.pieces[a] + self.pieces[b].removeprefix(PREFIX)
        if piece not in self.number:
            self.number[piece] = len(self.pieces)
            self.pieces.append(piece)
            self.piece_count = _room(self.piece_count, len(self.pieces))
        new = self.number[piece]
        touched = set()
        for w in sorted(self.where.pop(p, ())):
            touched |= self._merge_in(w, a, b, new)
        self.count[p] = 0
        pairs = np.arange(len(self.pair_number))
        left, right = self.left[: len(pairs)], self.right[: len(pairs)]
        changed = np.isin(left, (a, b, new)) | np.isin(right, (a, b, new))
        changed[list(touched)] = True
        self._refresh(pairs[changed])
        return piece

    def _merge_in(self, w: int, a: int, b: int, new: int) -> set[int]:
        """Merges inside one word and returns the pairs whose counts changed."""
        old, times = self.words[w], self.times[w]
        word: list[int] = []
        i = 0
        while i < len(old):
            if old[i] == a and i + 1 < len(old) and old[i + 1] == b:
                word.append(new)
                i += 2
            else:
                word.append(old[i])
                i += 1
        merges = len(old) - len(word)
        if not merges:
            return set()
        self.words[w] = word
        self.piece_count[a] -= merges * times
        self.piece_count[b] -= merges * times
        self.piece_count[new] += merges * times
        self.total -= merges * times
        touched = set()
        for pair in itertools.pairwise(old):
            p = self.pair_number[pair]
            self.count[p] -= times
            touched.add(p)
        return touched | {self._add(pair, times, w) for pair in itertools.pairwise(word)}


def _f(n: np.ndarray) -> np.ndarray:
    """n log n, and 0 where n is 0 (or would be below, in runs of one piece)."""
    n = np.maximum(n, 0)
    return n * np.log(np.maximum(n, 1))


def _room(array: np.ndarray, size: int) -> np.ndarray:
    """Returns the array with room for `size` entries, doubled as needed."""
    if size <= len(array):
        return array
    grown = np.zeros(max(size, 2 * len(array)), array.dtype)
    grown[: len(array)] = array
    return grown
