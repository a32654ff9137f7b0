"""Sequence mixers: what moves information along the sequence.

Contract: `Mixer(ctx, *, <config arguments>, rngs)`, and
  `mixer(x_BTD, *, info, context=None, state=None, return_state=False) -> (y_BTD, state, aux)`: the
    parallel form. `info` carries positions and documents (0 is padding): nothing crosses a change
    of document, and padding is never read. With `state` it continues where the state ends; the
    new state comes back where `return_state` (static) or a state was given, else None;
  `init_state(batch, max_len, dtype)`: the empty state, a dict of arrays with the batch in front;
  `step(x_BD, state, *, reset=None) -> (y_BD, state)`: one token; `reset` (bool [B]) says where it
    begins a new document;
  `cost(batch, seq_len) -> Cost` and `state_bytes(batch, max_len, dtype)`: from static attributes
    only, since parameters may be stacked over layers;
  `causal` (bool), and `supports`, a frozenset of 'packing' (several documents a row), 'stepping'
    (states and steps), 'bidirectional' (a context with causal=False), 'context' (attending to
    another sequence), 'globals' (the first `ctx.globals` tokens of a row are global ones, and
    `info.groups` says whose). `directed` (optional) is True where a mixer over both directions
    tells them apart by itself, so that a document turned round does not give its result turned
    round. `growth_spec` says what growth may do: units that it may get more of, and the products
    whose zeros make its result zero (`core.axes.GrowthSpec`).
A state holds each row's last document and position, so that a cut on a document's boundary is
exact; at a row's end it belongs to the last document, padding after it or not. A mixer that
cannot do a thing raises a `ValueError` naming itself, the thing, and what to use instead.
`tests/layers/test_mixer_contract.py` checks every entry of `MIXERS`.
"""

MIXERS = {
    'attention': 'effjax.layers.mixers.attention:Attention',
    'base_conv': 'effjax.layers.mixers.base_conv:BaseConv',
    'based': 'effjax.layers.mixers.based:Based',
    'bigbird': 'effjax.layers.mixers.bigbird:BigBird',
    'deltanet': 'effjax.layers.mixers.deltanet:DeltaNet',
    'etc': 'effjax.layers.mixers.etc:ETC',
    'gated_deltanet': 'effjax.layers.mixers.gated_deltanet:GatedDeltaNet',
    'gla': 'effjax.layers.mixers.gla:GLA',
    'h3': 'effjax.layers.mixers.h3:H3',
    'hyena': 'effjax.layers.mixers.hyena:Hyena',
    'linear_attention': 'effjax.layers.mixers.linear_attention:LinearAttention',
    'linformer': 'effjax.layers.mixers.linformer:Linformer',
    'longformer': 'effjax.layers.mixers.longformer:Longformer',
    'longnet': 'effjax.layers.mixers.longnet:LongNet',
    'mamba': 'effjax.layers.mixers.mamba:Mamba',
    'mamba2': 'effjax.layers.mixers.mamba2:Mamba2',
    'mate': 'effjax.layers.mixers.mate:Mate',
    'mega': 'effjax.layers.mixers.mega:Mega',
    'nystromformer': 'effjax.layers.mixers.nystromformer:Nystromformer',
    'reformer': 'effjax.layers.mixers.reformer:Reformer',
    'polysketch': 'effjax.layers.mixers.polysketch:PolySketch',
    'retnet': 'effjax.layers.mixers.retnet:RetNet',
    'rg_lru': 'effjax.layers.mixers.rg_lru:RGLRU',
    'rwkv4': 'effjax.layers.mixers.rwkv4:RWKV4',
    'rwkv6': 'effjax.layers.mixers.rwkv6:RWKV6',
    'rwkv7': 'effjax.layers.mixers.rwkv7:RWKV7',
    's4': 'effjax.layers.mixers.s4:S4',
    's4d': 'effjax.layers.mixers.s4d:S4D',
    's5': 'effjax.layers.mixers.s5:S5',
    'shaped_attention': 'effjax.layers.mixers.shaped:ShapedAttention',
    'transformer_xl': 'effjax.layers.mixers.transformer_xl:TransformerXL',
}
