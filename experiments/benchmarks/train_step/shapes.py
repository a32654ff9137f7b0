"""The shapes of this benchmark: Llama-like decoders and recurrent ones, vocabulary 32000.

Feed-forward widths of the Llama-like ones are such that the parameters come to 374M and 1.36B with
an untied head. The recurrent ones have the widths that flash-linear-attention gives its models of
1024 channels, so that both sides hold the same parameters: RetNet 380M, GLA 374M, Mamba-2 382M.
"""

import dataclasses

BATCHES = 16  # different batches of random tokens that a program takes in turn
STATE = 128  # rows of a Mamba-2 head's state
RANK = 16  # inner dimensions of the product that GLA's decays come from
CONV = 4  # tokens that Mamba-2's short convolution sees


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model and its batch.

    Attributes:
      layers, width: of the decoder.
      heads, head_dim: of the mixer; `head_dim` is of queries and keys, and of values too, but for
        RetNet, whose values are twice as wide, and GLA, whose keys are half as wide as its values.
      hidden: the width inside SwiGLU; 0 leaves the feed-forward part and its norm out.
      batch, length: rows a step and tokens a row.
      vocab: entries of the vocabulary; embedding and head are apart.
      mixer: 'attention', 'retnet', 'gla' or 'mamba2', each as its paper has it.
    """

    layers: int
    width: int
    heads: int
    head_dim: int
    hidden: int
    batch: int
    length: int
    vocab: int = 32000
    mixer: str = 'attention'

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.length

    @property
    def params(self) -> int:
        """Parameters: embedding, head, norms, mixers, SwiGLU."""
        ffn = 3 * self.width * self.hidden
        norms = (2 if self.hidden else 1) * self.width
        return self.layers * (self._mixer() + ffn + norms) + (2 * self.vocab + 1) * self.width

    def _mixer(self) -> int:
        inner = self.heads * self.head_dim
        if self.mixer == 'retnet':  # q, k; v, gate and output, twice as wide
            return self.width * 8 * inner
        if self.mixer == 'gla':  # q, k, half as wide; v, gate, output; decays; a norm
            decays = RANK * self.width + (RANK + 1) * inner // 2
            return self.width * 4 * inner + decays + self.head_dim
        if self.mixer == 'mamba2':  # x, z, output; B, C; dt; convolution; dt, A and D; a norm
            seen = inner + 2 * STATE
            projections = self.width * (3 * inner + 2 * STATE + self.heads)
            return projections + (CONV + 1) * seen + 3 * self.heads + inner
        return self.width * 4 * inner


_SHORT = {'batch': 16, 'length': 2048}
_LONG = {'batch': 2, 'length': 16384}
_SMOKE = {'batch': 2, 'length': 16, 'vocab': 64}
SHAPES = {
    '374m': Shape(24, 1024, 8, 128, 2816, **_SHORT),
    '374m_long': Shape(24, 1024, 8, 128, 2816, **_LONG),
    '1.36b': Shape(24, 2048, 16, 128, 5632, batch=8, length=2048),
    'retnet_380m': Shape(24, 1024, 4, 256, 1536, **_SHORT, mixer='retnet'),
    'retnet_380m_long': Shape(24, 1024, 4, 256, 1536, **_LONG, mixer='retnet'),
    'gla_380m': Shape(24, 1024, 4, 256, 2816, **_SHORT, mixer='gla'),
    'gla_380m_long': Shape(24, 1024, 4, 256, 2816, **_LONG, mixer='gla'),
    'mamba2_380m': Shape(48, 1024, 32, 64, 0, **_SHORT, mixer='mamba2'),
    'mamba2_380m_long': Shape(48, 1024, 32, 64, 0, **_LONG, mixer='mamba2'),
    'smoke': Shape(2, 32, 2, 16, 64, **_SMOKE),
    'retnet_smoke': Shape(2, 32, 2, 16, 64, **_SMOKE, mixer='retnet'),
    'gla_smoke': Shape(2, 32, 2, 16, 64, **_SMOKE, mixer='gla'),
    'mamba2_smoke': Shape(2, 32, 4, 16, 0, **_SMOKE, mixer='mamba2'),
}


def having(*mixers: str) -> list[str]:
    """Returns the names of the shapes with one of these mixers."""
    return [name for name, shape in SHAPES.items() if shape.mixer in mixers]
