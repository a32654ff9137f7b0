"""FLOPs and bytes of the head product with its cross-entropy. Plain Python."""


def head_flops(tokens: int, width: int, vocab: int) -> float:
    """FLOPs of the forward product `[tokens, width] x [width, vocab]`."""
    return 2.0 * tokens * width * vocab


def logits_bytes(tokens: int, vocab: int, itemsize: int, chunks: int) -> float:
    """Bytes of logits and their gradient that live at once in the 'chunked' implementation."""
    return 2.0 * -(-tokens // chunks) * vocab * itemsize
