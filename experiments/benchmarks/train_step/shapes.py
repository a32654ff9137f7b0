"""The shapes that every program of this benchmark runs: Llama-like decoders, vocabulary 32000.

Feed-forward widths are such that the parameters come to 374M and 1.36B with an untied head.
"""

import dataclasses

BATCHES = 16  # different batches of random tokens that a program takes in turn


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model and its batch.

    Attributes:
      layers, width, heads, head_dim, hidden: of the decoder; `hidden` is the width inside SwiGLU.
      vocab: entries of the vocabulary; embedding and head are apart.
      batch, length: rows a step and tokens a row.
    """

    layers: int
    width: int
    heads: int
    head_dim: int
    hidden: int
    batch: int
    length: int
    vocab: int = 32000

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.length

    @property
    def params(self) -> int:
        """Parameters: embedding, head, two norms a layer and a last one, projections, SwiGLU."""
        layer = 4 * self.width * self.heads * self.head_dim + 3 * self.width * self.hidden
        return self.layers * (layer + 2 * self.width) + (2 * self.vocab + 1) * self.width


SHAPES = {
    '374m': Shape(24, 1024, 8, 128, 2816, batch=16, length=2048),
    '374m_long': Shape(24, 1024, 8, 128, 2816, batch=2, length=16384),
    '1.36b': Shape(24, 2048, 16, 128, 5632, batch=8, length=2048),
    'smoke': Shape(2, 32, 2, 16, 64, batch=2, length=16, vocab=64),
}
