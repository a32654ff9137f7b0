"""Makes sparse_attention.npz: Longformer's and BigBird's attention of `transformers`, CPU.

Usage: python tests/golden/make_sparse_attention.py, where torch and transformers (5.23) are
installed. Longformer's weights stand in the file by our names (its output is before the output
projection); of BigBird the block-sparse product alone, with the random blocks that it drew.
"""

import pathlib

import numpy as np
import torch
from transformers import BigBirdConfig, LongformerConfig
from transformers.models.big_bird import modeling_big_bird as bird
from transformers.models.longformer import modeling_longformer as longformer

WIDTH, HEADS, DIM = 12, 2, 6


def longformer_arrays() -> dict[str, np.ndarray]:
    """Window of 8 (reach 5), two global tokens, 40 tokens."""
    config = LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_window=[8],
        attention_probs_dropout_prob=0.0,
    )
    module = longformer.LongformerSelfAttention(config, 0).eval()
    x, is_global = torch.randn(2, 40, WIDTH), torch.zeros(2, 40, dtype=torch.bool)
    is_global[:, :2] = True
    with torch.no_grad():
        y = module(
            x,
            attention_mask=10000.0 * is_global,
            is_index_masked=torch.zeros_like(is_global),
            is_index_global_attn=is_global,
            is_global_attn=True,
        )[0]
    out = {'x': x, 'y': y}
    for name in ('query', 'key', 'value'):
        for theirs, ours in ((name, name), (f'{name}_global', f'global_{name}')):
            layer = getattr(module, theirs)
            out[f'params/{ours}/kernel'] = layer.weight.T.reshape(WIDTH, HEADS, DIM)
            out[f'params/{ours}/bias'] = layer.bias.reshape(HEADS, DIM)
    return {f'longformer/{name}': a.detach().numpy() for name, a in out.items()}


def bigbird_arrays() -> dict[str, np.ndarray]:
    """13 blocks of 4 tokens, 2 random blocks for each head and block but the first and last."""
    config = BigBirdConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, block_size=4, num_random_blocks=2
    )
    module = bird.BigBirdBlockSparseAttention(config, seed=1).train()  # eval draws no blocks
    drawn, draw = [], module._bigbird_block_rand_mask_with_head

    def record(**arguments):
        drawn.append(np.stack(draw(**arguments)))
        return list(drawn[-1])

    module._bigbird_block_rand_mask_with_head = record
    q, k, v = torch.randn(3, 2, HEADS, 52, DIM)
    masks = bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, 52), 4)
    blocked, band, from_mask, to_mask = masks
    with torch.no_grad():
        y, _ = module.bigbird_block_sparse_attention(
            q, k, v, band, from_mask, to_mask, blocked, blocked, HEADS, 2, DIM, 4, 4, 2, 52, 52,
            seed=1, plan_from_length=None, plan_num_rand_blocks=None,
        )  # fmt: skip
    out = {name: a.transpose(1, 2).numpy() for name, a in zip('qkv', (q, k, v), strict=True)}
    out |= {'y': y.numpy(), 'blocks': drawn[0].astype(np.int32)}
    return {f'bigbird/{name}': a for name, a in out.items()}


if __name__ == '__main__':
    torch.manual_seed(0)
    np.savez_compressed(
        pathlib.Path(__file__).with_name('sparse_attention.npz'),
        **longformer_arrays(),
        **bigbird_arrays(),
    )
