"""Makes nystromformer.npz: self-attention of `transformers`' Nyströmformer, random weights, CPU.

Usage: python tests/golden/make_nystromformer.py, where torch and transformers (5.23) are
installed. Twice, with a convolution and without. The pseudo-inverse starts from each matrix's own
norm (their option 'exact'; by default it takes the largest norm of the whole batch, so that one
row's output depends on the others).
"""

import pathlib

import numpy as np
import torch
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

WIDTH, HEADS, LENGTH = 12, 2, 24


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns our parameters by path from those of `NystromformerSelfAttention`."""
    state = {name: w.detach().numpy() for name, w in module.state_dict().items()}
    split, out = (HEADS, WIDTH // HEADS), {}
    for name in ('query', 'key', 'value'):
        out[f'{name}/kernel'] = state[f'{name}.weight'].T.reshape(WIDTH, *split)
        out[f'{name}/bias'] = state[f'{name}.bias'].reshape(split)
    if 'conv.weight' in state:
        out['conv'] = state['conv.weight'][:, 0, :, 0].T
    return out


def run(taps: int) -> dict[str, np.ndarray]:
    """Returns inputs, outputs and weights of one random module."""
    config = NystromformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_landmarks=4,
        segment_means_seq_len=LENGTH,
        conv_kernel_size=taps or 1,
    )
    module = NystromformerSelfAttention(config).eval()
    module.init_option = 'exact'
    if not taps:
        del module.conv
        module.conv_kernel_size = None
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(2, LENGTH, WIDTH)
        y = module(x)[0]
    params = {f'params/{name}': w for name, w in weights(module).items()}
    return {'x': x.numpy(), 'y': y.numpy(), **params}


if __name__ == '__main__':
    torch.manual_seed(0)
    cases = {'nystromformer': run(0), 'nystromformer_conv': run(5)}
    np.savez_compressed(
        pathlib.Path(__file__).with_name('nystromformer.npz'),
        **{f'{case}/{name}': w for case, arrays in cases.items() for name, w in arrays.items()},
    )
