"""Makes rwkv4.npz: RWKV's time mixing of `transformers` with random weights, on a CPU.

Usage: python tests/golden/make_rwkv4.py, where torch and transformers (5.23) are installed. The
weights stand in the file by our names and in our layout; `weights` is the mapping.
"""

import pathlib

import numpy as np
import torch
from transformers import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

WIDTH, INNER, LENGTH = 12, 10, 37


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns our parameters by path from those of `RwkvSelfAttention`."""
    state = {name: w.detach().numpy() for name, w in module.state_dict().items()}
    out = {'log_rate': state['time_decay'], 'bonus': state['time_first']}
    for name in ('key', 'value', 'receptance'):
        out[f'{name}/kernel'] = state[f'{name}.weight'].T
        out[f'{name}_share'] = 1 - state[f'time_mix_{name}'][0, 0]
    return {**out, 'out/kernel': state['output.weight'].T}


if __name__ == '__main__':
    torch.manual_seed(0)
    config = RwkvConfig(hidden_size=WIDTH, attention_hidden_size=INNER, num_hidden_layers=1)
    module = RwkvSelfAttention(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (2.0 if 'time' in name else 0.5))
        x = torch.randn(2, LENGTH, WIDTH)
        y, _ = module(x)
        loud, _ = module(40 * x)  # keys that overflow without the exponent apart
    np.savez_compressed(
        pathlib.Path(__file__).with_name('rwkv4.npz'),
        x=x.numpy(),
        y=y.numpy(),
        loud=loud.numpy(),
        **{f'params/{path}': w for path, w in weights(module).items()},
    )
