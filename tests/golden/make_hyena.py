"""Makes hyena.npz: the authors' standalone Hyena operator with random weights, CPU.

Usage: python tests/golden/make_hyena.py standalone_hyena.py, the file of the repository
HazyResearch/safari, where torch and einops are installed. `weights` is the mapping.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch

WIDTH, LONGEST, HIDDEN = 6, 40, 8


def weights(module: torch.nn.Module, order: int) -> dict[str, np.ndarray]:
    """Returns our parameters by path from those of `HyenaOperator`."""
    state = {name: w.detach().numpy() for name, w in module.state_dict().items()}
    names = [*(f'gate_{i}' for i in range(order)), 'value']
    parts = {
        'kernel': state['in_proj.weight'].T.reshape(WIDTH, order + 1, WIDTH),
        'bias': state['in_proj.bias'].reshape(order + 1, WIDTH),
        'conv/kernel': state['short_filter.weight'][:, 0].T.reshape(-1, order + 1, WIDTH),
        'conv/bias': state['short_filter.bias'].reshape(order + 1, WIDTH),
    }
    out = {}
    for i, name in enumerate(names):
        out[f'{name}/kernel'], out[f'{name}/bias'] = parts['kernel'][:, i], parts['bias'][i]
        out[f'{name}_conv/kernel'] = parts['conv/kernel'][:, i]
        out[f'{name}_conv/bias'] = parts['conv/bias'][i]
    network = 'filter_fn.implicit_filter'
    out['filter/first'] = state[f'{network}.0.weight'].T
    out['filter/first_bias'] = state[f'{network}.0.bias']
    out['filter/frequency'] = state[f'{network}.1.freq'][0]
    out['filter/hidden'] = np.stack([state[f'{network}.{i}.weight'].T for i in (2, 4)])
    out['filter/hidden_bias'] = np.stack([state[f'{network}.{i}.bias'] for i in (2, 4)])
    out['filter/last'] = state[f'{network}.6.weight'].T.reshape(HIDDEN, order - 1, WIDTH)
    out['skip'] = state['filter_fn.bias'].reshape(order - 1, WIDTH)
    out['out/kernel'], out['out/bias'] = state['out_proj.weight'].T, state['out_proj.bias']
    return out


if __name__ == '__main__':
    spec = importlib.util.spec_from_file_location('standalone_hyena', sys.argv[1])
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    torch.manual_seed(0)
    arrays = {}
    for order in (2, 3):
        module = source.HyenaOperator(
            WIDTH, LONGEST, order=order, filter_order=HIDDEN, emb_dim=5, w=3
        ).eval()
        with torch.no_grad():
            x = torch.randn(2, 37, WIDTH)
            arrays |= {f'{order}/x': x.numpy(), f'{order}/y': module(x).numpy()}
        arrays |= {f'{order}/params/{name}': w for name, w in weights(module, order).items()}
    np.savez_compressed(pathlib.Path(__file__).with_name('hyena.npz'), **arrays)
