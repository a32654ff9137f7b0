"""Closed forms for planning: 6ND, device-hours, and bytes of a KV cache.

These are rules of thumb to plan and to compare with published runs. A run is charged by its
model's own `Cost`, never by 6ND.
"""


def pretrain_flops(params: float, tokens: float) -> float:
    """C = 6 N D: forward and backward FLOPs of pretraining (Kaplan et al. 2020).

    Args:
      params: N, parameters that take part in products for a token.
      tokens: D, tokens trained on.
    """
    return 6.0 * params * tokens


def device_hours(flops: float, *, peak: float, mfu: float) -> float:
    """Hours on one device of `peak` FLOP/s at utilisation `mfu` (0 to 1)."""
    return flops / (peak * mfu * 3600.0)


def implied_mfu(flops: float, *, hours: float, peak: float) -> float:
    """Utilisation (0 to 1) that a published number of device-hours implies."""
    return flops / (peak * hours * 3600.0)


def kv_cache_bytes(
    *, batch: int, length: int, layers: int, kv_heads: int, head_dim: int, itemsize: int
) -> int:
    """Bytes of the keys and values of `length` tokens: 2 B S L G K x itemsize.

    Args:
      batch: B, sequences.
      length: S, tokens kept for each.
      layers: L, layers with attention.
      kv_heads: G, key/value heads (all heads, fewer under GQA, 1 under MQA).
      head_dim: K.
      itemsize: bytes of a number: 4 for float32, 2 for bfloat16.
    """
    return 2 * batch * length * layers * kv_heads * head_dim * itemsize
