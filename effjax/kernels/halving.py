"""Sizes of chunks that are halved down to leaves, whose pairs are formed one by one."""


def whole_size(length: int, chunk: int, leaf: int) -> int:
    """Returns the tokens of a chunk: what was asked for, or a leaf doubled until it is no less."""
    size = max(1, min(chunk, length))
    doubled = min(leaf, size)
    while doubled < size:
        doubled *= 2
    return doubled


def leaf_size(size: int, leaf: int) -> int:
    """Returns the tokens of the blocks that halving a chunk of `whole_size` ends in."""
    while size > leaf:
        size //= 2
    return size
