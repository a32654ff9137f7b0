"""Makes rg_lru.npz: RecurrentGemma's recurrent block of `transformers`, random weights, on a CPU.

Usage: python tests/golden/make_rg_lru.py, where torch and transformers (5.23) are installed. The
weights stand in the file by our names and in our layout; `weights` is the mapping.
"""

import pathlib

import numpy as np
import torch
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
    RecurrentGemmaRecurrentBlock,
)

WIDTH, HEADS, SIZE, LENGTH = 12, 3, 4, 37


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns our parameters by path from those of `RecurrentGemmaRecurrentBlock`."""
    state = {name: w.detach().numpy() for name, w in module.state_dict().items()}
    out = {}
    for ours, theirs in (('value', 'linear_x'), ('gate', 'linear_y')):
        out[f'{ours}/kernel'] = state[f'{theirs}.weight'].T.reshape(WIDTH, HEADS, SIZE)
        out[f'{ours}/bias'] = state[f'{theirs}.bias'].reshape(HEADS, SIZE)
    for ours, theirs in (('enter', 'input_gate'), ('forget', 'recurrent_gate')):
        out[f'{ours}/kernel'] = state[f'rg_lru.{theirs}_weight']
        out[f'{ours}/bias'] = state[f'rg_lru.{theirs}_bias']
    out['conv/kernel'] = state['conv_1d.weight'][:, 0].T.reshape(-1, HEADS, SIZE)
    out['conv/bias'] = state['conv_1d.bias'].reshape(HEADS, SIZE)
    out['decay'] = state['rg_lru.recurrent_param'].reshape(HEADS, SIZE)
    out['out/kernel'] = state['linear_out.weight'].T.reshape(HEADS, SIZE, WIDTH)
    out['out/bias'] = state['linear_out.bias']
    return out


if __name__ == '__main__':
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        hidden_size=WIDTH,
        lru_width=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
    )
    module = RecurrentGemmaRecurrentBlock(config, 0).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
        x = torch.randn(2, LENGTH, WIDTH)
        positions = torch.arange(LENGTH)[None].expand(2, -1)
        y, _ = module(x, positions, None, use_cache=False)
    np.savez_compressed(
        pathlib.Path(__file__).with_name('rg_lru.npz'),
        x=x.numpy(),
        y=y.numpy(),
        **{f'params/{path}': w for path, w in weights(module).items()},
    )
