"""Feed-forward parts: what works on each token alone.

Contract: `FFN(ctx, *, <config arguments>, rngs)`; `ffn(x, *, info) -> (y, aux)` with x and y
[B, T, D] in the compute dtype and aux a dict of statistics (empty for dense parts);
`cost(batch, seq_len) -> Cost` from static attributes only, since parameters may be stacked.
"""

FFNS = {
    'swiglu': 'effjax.layers.ffn.dense:SwiGLU',
    'geglu': 'effjax.layers.ffn.dense:GeGLU',
    'gelu': 'effjax.layers.ffn.dense:GELU',
    'relu': 'effjax.layers.ffn.dense:ReLU',
    'identity': 'effjax.layers.ffn.identity:Identity',
    'relu2': 'effjax.layers.ffn.dense:ReLU2',
}
