"""Makes mamba.npz and falcon_mamba.npz: mixers of `transformers`, random weights, on a CPU.

Usage: python tests/golden/make_mamba.py, where torch and transformers (5.23) are installed. The
weights stand in the files by our names and in our layout; `weights` is the mapping. FalconMamba
is Mamba with norms on the step, B and C.
"""

import pathlib

import numpy as np
import torch
from transformers import FalconMambaConfig, MambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

WIDTH, INNER, STATES, RANK = 12, 24, 5, 3


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns our parameters by path from those of `MambaMixer`."""
    state = {name: w.detach().numpy() for name, w in module.state_dict().items()}
    value, gate = np.split(state['in_proj.weight'], 2)
    down, write, read = np.split(state['x_proj.weight'], [RANK, RANK + STATES])
    return {
        'value/kernel': value.T,
        'gate/kernel': gate.T,
        'conv/kernel': state['conv1d.weight'][:, 0].T,
        'conv/bias': state['conv1d.bias'],
        'step_down/kernel': down.T,
        'write/kernel': write.T,
        'read/kernel': read.T,
        'step_up/kernel': state['dt_proj.weight'].T,
        'step_bias': state['dt_proj.bias'],
        'log_rate': state['A_log'],
        'skip': state['D'],
        'out/kernel': state['out_proj.weight'].T,
    }


if __name__ == '__main__':
    for name, kind, make in (
        ('mamba', MambaMixer, MambaConfig),
        ('falcon_mamba', FalconMambaMixer, FalconMambaConfig),
    ):
        torch.manual_seed(0)
        config = make(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            expand=2,
            state_size=STATES,
            time_step_rank=RANK,
            num_hidden_layers=1,
        )
        # FalconMamba's initial values can only be set once it is whole.
        module = kind(config, 0, initialize_mixer_weights=False).eval()
        getattr(module, f'init_{name}_weights')()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            x = torch.randn(2, 37, WIDTH)
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
        np.savez_compressed(
            pathlib.Path(__file__).with_name(f'{name}.npz'),
            x=x.numpy(),
            y=y.numpy(),
            **{f'params/{path}': w for path, w in weights(module).items()},
        )
