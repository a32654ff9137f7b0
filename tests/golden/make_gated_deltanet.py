"""Makes gated_deltanet.npz: Qwen3-Next's gated delta net of `transformers`, random weights, CPU.

Usage: python tests/golden/make_gated_deltanet.py, where torch and transformers (5.23) are
installed. The weights stand in the file by our names and in our layout; `weights` is the mapping.
"""

import pathlib

import numpy as np
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as source
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

WIDTH, HEADS, KEY, VALUE, TAPS = 12, 2, 5, 6, 4
NAMES = ('query', 'key', 'value')


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns our parameters by path from those of `Qwen3NextGatedDeltaNet`."""
    state = {name: w.detach().double().numpy() for name, w in module.state_dict().items()}
    # Rows of the joint projection: head by head its query, key, value and gate.
    joint = state['in_proj_qkvz.weight'].reshape(HEADS, 2 * (KEY + VALUE), WIDTH)
    q, k, v, gate = np.split(joint, np.cumsum([KEY, KEY, VALUE]), axis=1)
    beta, rate = np.moveaxis(state['in_proj_ba.weight'].reshape(HEADS, 2, WIDTH), 1, 0)
    # Channels of the joint convolution: all queries, all keys, all values.
    taps = np.split(state['conv1d.weight'][:, 0].T, np.cumsum([HEADS * KEY] * 2), axis=1)
    out = {'gate/linear/kernel': np.moveaxis(gate, -1, 0)}
    for name, w, t in zip(NAMES, (q, k, v), taps, strict=True):
        out[f'inputs/{name}/linear/kernel'] = np.moveaxis(w, -1, 0)
        out[f'inputs/{name}/conv/kernel'] = t.reshape(TAPS, HEADS, -1)
    out['beta/kernel'], out['rate/kernel'] = beta.T, rate.T
    out['rate_bias'], out['log_strength'] = state['dt_bias'], state['A_log']
    out['norm/scale'] = state['norm.weight']
    out['out/kernel'] = state['out_proj.weight'].T.reshape(HEADS, VALUE, WIDTH)
    return out


if __name__ == '__main__':
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=['linear_attention'],
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        linear_conv_kernel_dim=TAPS,
    )
    module = source.Qwen3NextGatedDeltaNet(config, 0).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(2, 37, WIDTH)
        y = module(x)
    arrays = {name: w.astype(np.float32) for name, w in weights(module).items()}
    np.savez_compressed(
        pathlib.Path(__file__).with_name('gated_deltanet.npz'),
        x=x.numpy(),
        y=y.numpy(),
        **{f'params/{name}': w for name, w in arrays.items()},
    )
