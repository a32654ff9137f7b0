"""Deduplication of a corpus: pure functions on arrays that every engine shares.

A document goes through these steps; each is a function of the content alone, and an engine may
put its own in the place of one if it gives the same values:

    decode(bytes) -> str                                         normalisation.py
    document_digest(text) -> 16 bytes; piece_digests(text)       normalisation.py
    shingles(text) -> uint64 [S], sorted, unique; shingle_many   shingling.py
    sign(shingles, seeds) -> uint32 [P]; sign_many               minhash.py
    band_keys(signature, bands, rows) -> uint64 [b]              minhash.py
    buckets, rounds: band keys -> candidate pairs                candidates.py
    similar(sets, pairs, threshold) -> bool [K]                  verify.py
    Forest, components, keepers                                  clusters.py

`near_duplicates(documents, settings) -> Result` ties them together in memory: the reference.

The contract:

- Exact duplicates are documents of one normalised text. Near-duplicates are clusters: connected
  components of the graph that joins two texts which share a band of their signatures (probability
  `s_curve`) and whose Jaccard similarity, computed exactly, reaches the threshold.
- The answer is a function of the set of documents and the settings: not of their order, of how
  they are divided among workers, of the machine, or of Python's hash seed.
- Of each cluster one document is kept: the least by (rank of its source, length, digest, id).
- A document without words has only exact duplicates. Ids must differ.
- numpy and the standard library only.
"""

from effjax.data.dedup.minhash import choose, s_curve
from effjax.data.dedup.near import (
    Decision,
    Part,
    Result,
    Settings,
    near_duplicates,
    prepare,
    resolve,
)
from effjax.data.dedup.normalisation import decode, document_digest, normalise, piece_digests
from effjax.data.dedup.shingling import shingles

__all__ = [
    'Decision',
    'Part',
    'Result',
    'Settings',
    'choose',
    'decode',
    'document_digest',
    'near_duplicates',
    'normalise',
    'piece_digests',
    'prepare',
    'resolve',
    's_curve',
    'shingles',
]
