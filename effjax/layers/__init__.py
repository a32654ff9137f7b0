"""The parts of which models are assembled, as Flax NNX modules.

Contract of a part: `Part(ctx, *, <its own config arguments>, rngs)` with `ctx` a `core.context.
Context`; parameters made by `core.axes.param` with a name for each dimension; children are plain
attributes; a call is pure. A part does not drop its output: the block around it does, with
`dropout.dropout`. Parameters are stored in the policy's parameter dtype and cast to its compute
dtype where they are used.

  mixers/: what moves information along the sequence (`MIXERS`);
  ffn/: what works on each token alone (`FFNS`);
  norms (`NORMS`), positions (`POSITIONS`), embeddings, linear (projections), dropout.
"""
