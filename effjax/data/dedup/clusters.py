"""Connected components of similar pairs, and which document of each is kept."""

import numpy as np


class Forest:
    """Disjoint sets of the numbers below n, all edges of a batch at once.

    Union-find with vectorised steps: every root is hooked onto the smallest root that an edge
    joins it to, and pointer jumping halves all paths until they are flat (Shiloach and Vishkin,
    1982). The rounds are about the logarithm of n; a loop over edges in Python would take a
    microsecond each. The representative of a set is its smallest number, whatever the order.

    Attributes:
      roots: int64 [n], the smallest number of each number's set.
    """

    def __init__(self, n: int):
        """Makes n sets of one."""
        self.roots = np.arange(n, dtype=np.int64)

    def apart(self, pairs: np.ndarray) -> np.ndarray:
        """Says which pairs, int64 [K, 2], stand in different sets: bool [K]."""
        return self.roots[pairs[:, 0]] != self.roots[pairs[:, 1]]

    def join(self, pairs: np.ndarray) -> None:
        """Unites the sets of each pair: int64 [K, 2]."""
        while True:
            ends = self.roots[pairs]
            ends = ends[ends[:, 0] != ends[:, 1]]
            if not ends.size:
                return
            np.minimum.at(self.roots, ends.max(axis=1), ends.min(axis=1))
            self._flatten()

    def _flatten(self) -> None:
        while True:
            above = self.roots[self.roots]
            if np.array_equal(above, self.roots):
                return
            self.roots = above


def components(n: int, pairs: np.ndarray) -> np.ndarray:
    """Returns the smallest number of each number's component: int64 [n].

    Args:
      n: how many numbers.
      pairs: int64 [K, 2], edges, in any order and direction, repeated or not.
    """
    forest = Forest(n)
    forest.join(pairs)
    return forest.roots


def keepers(cluster: np.ndarray, *ranks: np.ndarray) -> np.ndarray:
    """Chooses one document of each cluster: the least by the first rank, ties by the next.

    Args:
      cluster: int64 [N], any number that names the document's cluster.
      *ranks: arrays [N]; together they must tell all documents of a cluster apart, or the choice
        would depend on their order.

    Returns:
      int64 [N], the place of the document that is kept for each.
    """
    order = np.lexsort((*reversed(ranks), cluster))
    _, first, member = np.unique(cluster[order], return_index=True, return_inverse=True)
    kept = np.empty(cluster.size, np.int64)
    kept[order] = order[first[member]]
    return kept
