"""What a model says of a batch: what a task judges, and a student and a teacher differ in."""

import dataclasses

import jax

from effjax.kernels import Head, linear_cross_entropy, linear_divergence, row_divergences


@dataclasses.dataclass(frozen=True)
class Outputs:
    """One row for each prediction; its logits are `cap(rows head + bias)`, or the rows themselves.

    Attributes:
      rows: [N, D] what the head reads; without a head, logits [N, V].
      targets: int32 [N].
      weights: [N] weight of each row; 0 leaves it out.
      head: [D, V] the head's weight, or None.
      bias: [V] or None.
      soft_cap: bounds the logits, or None.
      chunks: pieces of the head's product.
    """

    rows: jax.Array
    targets: jax.Array
    weights: jax.Array
    head: jax.Array | None = None
    bias: jax.Array | None = None
    soft_cap: float | None = None
    chunks: int = 1

    def cross_entropy(self, z_loss: float = 0.0) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns `linear_cross_entropy` of rows that a head reads."""
        assert self.head is not None
        return linear_cross_entropy(
            self.rows,
            self.head,
            self.targets,
            self.weights,
            soft_cap=self.soft_cap,
            z_loss=z_loss,
            chunks=self.chunks,
            bias=self.bias,
        )

    def divergence(self, teacher: 'Outputs', temperature: float) -> jax.Array:
        """Returns the weighted sum of rows' KL(teacher || self) at a temperature, float32."""
        if self.head is None or teacher.head is None:
            rows = row_divergences(self.rows, teacher.rows, temperature)
            return (rows * self.weights).sum()
        return linear_divergence(
            Head(self.rows, self.head, self.bias, self.soft_cap),
            Head(teacher.rows, teacher.head, teacher.bias, teacher.soft_cap),
            self.weights,
            temperature=temperature,
            chunks=self.chunks,
        )
