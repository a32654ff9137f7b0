"""Exact similarity of sets of shingles: what decides, after the signatures have proposed.

Every engine divides the same two integers in float64, so that a pair right at the threshold is
judged the same by all.
"""

from collections.abc import Sequence

import numpy as np


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Returns how many values two sorted, unique uint64 arrays share."""
    if a.size > b.size:
        a, b = b, a
    if not a.size or a[0] > b[-1] or b[0] > a[-1]:
        return 0
    at = np.searchsorted(b, a)
    at[at == b.size] = 0  # beyond the end: compared with the first, which is smaller
    return int(np.count_nonzero(b[at] == a))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Returns |a and b| / |a or b| of two sorted, unique uint64 arrays; 0 for two empty ones."""
    shared = common(a, b)
    return shared / max(a.size + b.size - shared, 1)


def containment(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the part of `a` that is in `b`, |a and b| / |a| (Broder, 1997); 0 for empty `a`."""
    return common(a, b) / max(a.size, 1)


def similar(sets: Sequence[np.ndarray], pairs: np.ndarray, threshold: float) -> np.ndarray:
    """Says which pairs reach a Jaccard similarity.

    Args:
      sets: sorted, unique uint64 arrays, by document number.
      pairs: int64 [K, 2], document numbers.
      threshold: the least similarity.

    Returns:
      bool [K].
    """
    sizes = np.array([s.size for s in sets], np.int64)[pairs]
    # J is at most the smaller set's size over the larger's: most pairs of unequal length end here.
    # Division is monotone also when rounded, so that this never contradicts `jaccard`.
    found = sizes.min(axis=1) / np.maximum(sizes.max(axis=1), 1) >= threshold
    for k in np.flatnonzero(found).tolist():
        a, b = pairs[k]
        found[k] = jaccard(sets[a], sets[b]) >= threshold
    return found
