"""FLOPs of attention by hashing, as its chunks define it and as its implementations execute it.

Plain Python: `effjax.costs` imports it without jax.
"""


def pairs(length: int, chunk: int, *, causal: bool) -> int:
    """Pairs of one head, row and round that chunks of one sorted sequence allow.

    A token sees its chunk and the one before; where `causal`, of its own chunk what is not behind
    it. The diagonal counts, though a token sees itself only where there is nothing else.
    """
    out = 0
    for start in range(0, length, chunk):
        size = min(chunk, length - start)
        own = size * (size + 1) // 2 if causal else size * size
        out += own + (size * chunk if start else 0)
    return out


def hash_flops(
    batch: int, length: int, heads: int, head_dim: int, rounds: int, buckets: int
) -> float:
    """FLOPs of the random projections: half as many a round as there are buckets."""
    return 2.0 * batch * length * heads * head_dim * rounds * (buckets // 2)


def attention_flops(batch: int, heads: int, head_dim: int, scored: float) -> float:
    """FLOPs of scores and values for `scored` pairs a head and row, all rounds together."""
    return 4.0 * batch * heads * head_dim * scored


def neighbours(count: int, *, by_bucket: bool, documents: bool, causal: bool) -> tuple[int, ...]:
    """Which blocks of C sorted tokens a block has to read, relative to itself.

    Chunks that begin where blocks do need their own and the one before. Chunks that begin with a
    document or a bucket lie anywhere, so that two chunks may touch four blocks; where tokens of a
    bucket are in order, none of the last of them is needed.

    Args:
      count: number of blocks.
      by_bucket: chunks begin with each bucket.
      documents: chunks begin with each document.
      causal: nothing behind the query is read.
    """
    if not by_bucket and not documents:
        wanted: tuple[int, ...] = (-1, 0)
    elif by_bucket and causal:
        wanted = (-2, -1, 0)
    else:
        wanted = (-2, -1, 0, 1)
    return tuple(offset for offset in wanted if abs(offset) < count)


def executed_flops(
    implementation: str,
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    *,
    rounds: int,
    chunk: int,
    by_bucket: bool,
    documents: bool,
    causal: bool,
) -> float:
    """FLOPs of the forward products that an implementation really executes, without the hash."""
    if implementation == 'reference':
        # All rounds share one matrix of scores.
        return attention_flops(batch, heads, head_dim, (1 + rounds) / 2 * length**2)
    chunk = min(chunk, length)
    count = -(-length // chunk)
    read = neighbours(count, by_bucket=by_bucket, documents=documents, causal=causal)
    return attention_flops(batch, heads, head_dim, rounds * count * chunk**2 * len(read))
