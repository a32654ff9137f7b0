"""What gzip makes of the held-out text: a yardstick that needs no training."""

import gzip
from collections.abc import Iterable
from typing import Any

from effjax.data.documents import Document


def gzip_baseline(documents: Iterable[Document], level: int = 9) -> dict[str, Any]:
    """Compresses each document by itself, as `gzip -9 -n file` would.

    Args:
      documents: the held-out documents.
      level: gzip's level, 1 to 9.

    Returns:
      `bits_per_byte` (compressed bits over raw bytes), `bytes`, `compressed_bytes`, `documents`.
    """
    count = raw = packed = 0
    for document in documents:
        data = document.text.encode()
        count += 1
        raw += len(data)
        packed += len(gzip.compress(data, level, mtime=0))
    return {
        'bits_per_byte': 8 * packed / max(raw, 1),
        'bytes': raw,
        'compressed_bytes': packed,
        'documents': count,
    }
