"""`Cost`: what a part of a model costs, as a static function of its config and the shape.

Convention (docs/costs.md): a multiply-add is 2 FLOPs; only matrix products, scans and FFTs count
(`5 N log2 N`); causal attention counts T (T + 1) / 2 pairs; the backward pass is twice the
forward; packing earns no credit; rematerialisation is not model work.
"""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one forward pass over a batch.

    Attributes:
      matmul: FLOPs of matrix products.
      scan: FLOPs of recurrences.
      fft: FLOPs of Fourier transforms.
      params: number of parameters.
      params_used: number of parameters that one token uses (less than `params` in an MoE).
      activation_bytes: bytes saved for the backward pass without rematerialisation.
      state_bytes: bytes of decoding state (KV cache, recurrent state) at the full length.
    """

    matmul: float = 0.0
    scan: float = 0.0
    fft: float = 0.0
    params: int = 0
    params_used: int = 0
    activation_bytes: float = 0.0
    state_bytes: int = 0

    @property
    def model_flops(self) -> float:
        """Forward FLOPs: products, scans and transforms."""
        return self.matmul + self.scan + self.fft

    @property
    def train_flops(self) -> float:
        """Forward and backward FLOPs: three times the forward."""
        return 3.0 * self.model_flops

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(
            *(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Cost))
        )

    def times(self, n: int, *, shared: bool = False) -> 'Cost':
        """Returns the cost of `n` repeats; `shared` repeats have one copy of the parameters."""
        copies = 1 if shared else n
        return Cost(
            matmul=self.matmul * n,
            scan=self.scan * n,
            fft=self.fft * n,
            params=self.params * copies,
            params_used=self.params_used * n,
            activation_bytes=self.activation_bytes * n,
            state_bytes=self.state_bytes * n,
        )


def total(costs: Iterable[Cost]) -> Cost:
    """Returns the sum of costs."""
    out = Cost()
    for c in costs:
        out = out + c
    return out


def matmul_flops(rows: int, inner: int, columns: int) -> float:
    """FLOPs of a `[rows, inner] x [inner, columns]` product, a multiply-add being 2."""
    return 2.0 * rows * inner * columns
