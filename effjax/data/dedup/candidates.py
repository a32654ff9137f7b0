"""From band keys to candidate pairs, in rounds, by a rule that knows no order but the content's.

A bucket holds the documents that share a band key. Document numbers must be ranks by digest:
then "the first members of a bucket" means the same documents for any order and sharding of the
input. The rule: each of the first `centres` members of a bucket meets every other member.

Guarantee. In a bucket of at most `centres` + 1 members that is every pair. So where no bucket is
larger, the clusters are exactly the connected components of the graph that joins two documents
when they share a band and their similarity reaches the threshold. In larger buckets pairs of two
non-centres are left out (all pairs of a bucket of a million are out of anyone's reach): such a
pair is missed only if no path of similar pairs joins it, in no bucket. The set of candidates is a
function of the set of documents either way, and so is every answer made from it.

One centre, the usual star, would not do: when the smallest member of a bucket is similar to none
of the others, they lose each other. Nor do all pairs have to be verified: a pair whose ends are
connected already cannot change the components. Round k holds the pairs of the k-th centres, so
that round 0 connects most of what is similar, and later rounds are mostly skipped.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Groups of two and more documents that share a band key.

    Attributes:
      documents: int64 [M], the members of all buckets, ascending within each.
      starts: int64 [B], where each bucket begins in `documents`.
      sizes: int64 [B], how many members it has, at least 2.
    """

    documents: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


def buckets(keys: np.ndarray, documents: np.ndarray) -> Buckets:
    """Groups documents by band key.

    Args:
      keys: uint64 [M].
      documents: int64 [M], the document of each key; a pair given twice counts once.
    """
    order = np.lexsort((documents, keys))
    keys, documents = keys[order], documents[order]
    new_key = np.ones(keys.size, bool)
    np.not_equal(keys[1:], keys[:-1], out=new_key[1:])
    new = new_key.copy()
    new[1:] |= documents[1:] != documents[:-1]
    documents, new_key = documents[new], new_key[new]
    starts = np.flatnonzero(new_key)
    sizes = np.diff(starts, append=documents.size)
    return Buckets(documents, starts[sizes > 1], sizes[sizes > 1])


def rounds(groups: Buckets, centres: int) -> Iterator[np.ndarray]:
    """Yields the candidate pairs, round by round: that of the k-th centre of every bucket.

    Args:
      groups: from `buckets`.
      centres: how many members of a bucket meet all others, at least 1.

    Yields:
      int64 [K, 2], the smaller number first, sorted, unique within the round; K is at most M.
    """
    starts, sizes = groups.starts, groups.sizes
    for k in range(centres):
        going_on = sizes > k + 1
        starts, sizes = starts[going_on], sizes[going_on]
        if not starts.size:
            return
        yield _with_later(groups.documents, starts + k, sizes - k - 1)


def pairs(keys: np.ndarray, documents: np.ndarray, centres: int) -> np.ndarray:
    """Returns all candidate pairs of all rounds: int64 [K, 2], sorted, unique."""
    found = [np.empty((0, 2), np.int64), *rounds(buckets(keys, documents), centres)]
    return np.unique(np.concatenate(found), axis=0)


def _with_later(documents: np.ndarray, first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pairs the document at each place of `first` with the `counts` that follow it."""
    place = np.repeat(first, counts)
    begin = np.repeat(np.cumsum(counts) - counts, counts)
    later = place + 1 + np.arange(place.size) - begin
    return np.unique(np.stack([documents[place], documents[later]], axis=1), axis=0)
