"""Makes reformer.npz: the LSH self-attention of `transformers`' Reformer, random weights, CPU.

Usage: python tests/golden/make_reformer.py, where torch and transformers (5.23) are installed.
Causal and not, with the buckets that its hash gave, so that the attention alone is compared. Its
first chunk looks round at the last one of the round before, which the paper's does not: the test
leaves the first chunks' tokens out.
"""

import pathlib

import numpy as np
import torch
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

WIDTH, HEADS, LENGTH, CHUNK, ROUNDS, BUCKETS = 12, 2, 32, 4, 2, 6


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns our projections' kernels from those of `LSHSelfAttention`."""
    pairs = (('query', module.query_key), ('value', module.value))
    return {
        f'params/{name}/kernel': part.weight.detach().numpy().T.reshape(WIDTH, HEADS, -1)
        for name, part in pairs
    }


def run(causal: bool) -> dict[str, np.ndarray]:
    """Returns inputs, buckets, outputs and weights of one random module."""
    config = ReformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=WIDTH // HEADS,
        attn_layers=['lsh'],
        lsh_attn_chunk_length=CHUNK,
        num_hashes=ROUNDS,
        num_buckets=BUCKETS,
        is_decoder=causal,
        hash_seed=0,
    )
    module = LSHSelfAttention(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
        x = torch.randn(2, LENGTH, WIDTH)
        out = module(x)
    buckets = out.buckets - BUCKETS * torch.arange(ROUNDS)[:, None]
    return {
        'x': x.numpy(),
        'y': out.hidden_states.numpy(),
        'buckets': buckets.numpy().transpose(0, 2, 1, 3).astype(np.int8),
        **weights(module),
    }


if __name__ == '__main__':
    torch.manual_seed(0)
    cases = {'causal': run(True), 'both': run(False)}
    np.savez_compressed(
        pathlib.Path(__file__).with_name('reformer.npz'),
        **{f'{case}/{name}': w for case, arrays in cases.items() for name, w in arrays.items()},
    )
