"""Makes mamba2.npz: the mixer of `transformers` with random weights, on a CPU.

Usage: python tests/golden/make_mamba2.py, where torch and transformers (5.23) are installed. The
weights stand in the file by our names and in our layout; `weights` is the mapping.
"""

import pathlib

import numpy as np
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

WIDTH, HEAD, HEADS, STATES, GROUPS, LENGTH = 12, 6, 4, 5, 2, 37


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns our parameters by path from those of `Mamba2Mixer`."""
    state = {name: w.detach().numpy() for name, w in module.state_dict().items()}
    inner, shared = HEADS * HEAD, GROUPS * STATES
    shapes = {'value': (HEADS, HEAD), 'write': (GROUPS, STATES), 'read': (GROUPS, STATES)}
    gate, rest = np.split(state['in_proj.weight'], [inner])
    *parts, pace = np.split(rest, np.cumsum([inner, shared, shared]))
    taps = np.split(state['conv1d.weight'][:, 0], np.cumsum([inner, shared]))
    biases = np.split(state['conv1d.bias'], np.cumsum([inner, shared]))
    out = {
        'gate/kernel': gate.T.reshape(WIDTH, HEADS, HEAD),
        'pace/kernel': pace.T,
        'step_bias': state['dt_bias'],
        'log_rate': state['A_log'],
        'skip': state['D'],
        'scale': state['norm.weight'].reshape(HEADS, HEAD),
        'out/kernel': state['out_proj.weight'].T.reshape(HEADS, HEAD, WIDTH),
    }
    for (name, shape), part, tap, bias in zip(shapes.items(), parts, taps, biases, strict=True):
        out[f'{name}/kernel'] = part.T.reshape(WIDTH, *shape)
        out[f'{name}_conv/kernel'] = tap.T.reshape(-1, *shape)
        out[f'{name}_conv/bias'] = bias.reshape(shape)
    return out


if __name__ == '__main__':
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=WIDTH,
        expand=2,
        head_dim=HEAD,
        num_heads=HEADS,
        state_size=STATES,
        n_groups=GROUPS,
        chunk_size=8,
        num_hidden_layers=1,
    )
    module = Mamba2Mixer(config, 0).eval()
    with torch.no_grad():
        module.D.fill_(1.0)
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(2, LENGTH, WIDTH)
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
    np.savez_compressed(
        pathlib.Path(__file__).with_name('mamba2.npz'),
        x=x.numpy(),
        y=y.numpy(),
        **{f'params/{path}': w for path, w in weights(module).items()},
    )
