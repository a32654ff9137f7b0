"""64-bit hashes of numbers and words: vectorised, and the same on every machine for ever.

Words are read eight bytes at a time, so that the cost is by the word, not by the byte. All
arithmetic is modulo 2^64 on little-endian words of explicit type.
"""

import numpy as np

# Stafford's mix 13, the finaliser of splitmix64 (Steele et al., 2014): a bijection.
_STEPS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST = np.uint64(31)
_LENGTH = np.uint64(0x9E3779B97F4A7C15)
# 3 modulo 8, so that neither M - 1 nor M + 1 is divisible by a high power of two.
_COMBINE = np.uint64(0xD1342543DE82EF9B)
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_BLOCK = 1 << 14  # elements: stays in the second cache


def mix(x: np.ndarray) -> np.ndarray:
    """Mixes uint64 of any shape in place, and returns it: each output bit on every input bit."""
    spare = np.empty_like(x)
    for shift, factor in _STEPS:
        np.right_shift(x, shift, out=spare)
        np.bitwise_xor(x, spare, out=x)
        np.multiply(x, factor, out=x)
    np.right_shift(x, _LAST, out=spare)
    return np.bitwise_xor(x, spare, out=x)


def hash_spans(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hashes parts of a byte string.

    A chain over chunks of eight bytes: h = mix(h xor chunk), from the length. `mix` is a
    bijection, so different parts of one length up to eight bytes never collide; any other two do
    with odds of 2^-64, unless the text was written to make them.

    Args:
      data: the bytes.
      starts: int64 [N].
      lengths: int64 [N], at least 1; starts + lengths stay within `data`.

    Returns:
      uint64 [N].
    """
    if not starts.size:
        return np.empty(0, np.uint64)
    # Every offset is the start of a little-endian number: a view, nothing is copied.
    numbers = np.ndarray((len(data),), '<u8', buffer=data + bytes(8), strides=(1,))
    hashes = lengths.astype(np.uint64) * _LENGTH
    hashes ^= numbers[starts] & _MASKS[np.minimum(lengths, 8)]
    mix(hashes)
    longer = np.flatnonzero(lengths > 8)
    done = 8
    while longer.size:
        chunk = numbers[starts[longer] + done]
        chunk &= _MASKS[np.minimum(lengths[longer] - done, 8)]
        hashes[longer] = mix(hashes[longer] ^ chunk)
        done += 8
        longer = longer[lengths[longer] > done]
    return hashes


def combine(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes each run of n consecutive hashes, in the memory of its input.

    A polynomial modulo 2^64 in an odd constant, mixed. Runs that differ in one place never
    collide; others do with odds of 2^-61 or less where the input is well mixed.

    Args:
      hashes: uint64 [N]; overwritten.
      n: length of a run.

    Returns:
      uint64 [N - n + 1], a part of `hashes`; [0] where N is below n.
    """
    count = max(hashes.size - n + 1, 0)
    # A block reads n - 1 elements beyond its end, which no earlier block has written.
    for at in range(0, count, _BLOCK):
        size = min(_BLOCK, count - at)
        total = hashes[at : at + size].copy()
        for k in range(1, n):
            total *= _COMBINE
            total += hashes[at + k : at + k + size]
        hashes[at : at + size] = mix(total)
    return hashes[:count]
