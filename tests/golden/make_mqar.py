"""Makes mqar.npz: the two-layer models of experiments/recall/peer.py with random weights, CPU.

Usage: python tests/golden/make_mqar.py, where torch is installed. `weights` is the mapping.
"""

import pathlib

import numpy as np
import torch

from experiments.recall.peer import model

LENGTH, WIDTH, VOCABULARY = 64, 8, 64


def weights(net: torch.nn.Module, mixer: str) -> dict[str, np.ndarray]:
    """Returns our parameters by path, without the axis of layers."""
    state = {name: w.detach().numpy() for name, w in net.state_dict().items()}
    out = {'embedding/table': state['embedding.weight']}
    out |= {'norm/scale': state['last.weight'], 'norm/bias': state['last.bias']}
    for i in range(2):
        ours, theirs = f'body/segment_{i}/slot_0', f'mixers.{i}'
        for norm, name in (('norm_mixer', 'before'), ('norm_ffn', 'after')):
            out[f'{ours}/{norm}/scale'] = state[f'{name}.{i}.weight']
            out[f'{ours}/{norm}/bias'] = state[f'{name}.{i}.bias']
        ours = f'{ours}/mixer'
        if mixer == 'hyena':
            for j, name in enumerate(('gate_0', 'gate_1', 'value')):
                part = slice(j * WIDTH, (j + 1) * WIDTH)
                out[f'{ours}/{name}/kernel'] = state[f'{theirs}.inputs.weight'][part].T
                out[f'{ours}/{name}/bias'] = state[f'{theirs}.inputs.bias'][part]
                out[f'{ours}/{name}_conv/kernel'] = state[f'{theirs}.short.weight'][part, 0].T
                out[f'{ours}/{name}_conv/bias'] = state[f'{theirs}.short.bias'][part]
            out[f'{ours}/skip'] = state[f'{theirs}.skip'][None]
            out[f'{ours}/out/kernel'] = state[f'{theirs}.out.weight'].T
            out[f'{ours}/out/bias'] = state[f'{theirs}.out.bias']
        else:
            out[f'{ours}/project/kernel'] = state[f'{theirs}.project.weight'].T
            out[f'{ours}/project/bias'] = state[f'{theirs}.project.bias']
        if f'{theirs}.short.weight' in state and mixer == 'base_conv':
            out[f'{ours}/short/kernel'] = state[f'{theirs}.short.weight'][:, 0].T
            out[f'{ours}/short/bias'] = state[f'{theirs}.short.bias']
        if f'{theirs}.filter.network.0.weight' in state:
            network = f'{theirs}.filter.network'
            out[f'{ours}/filter/first'] = state[f'{network}.0.weight'].T
            out[f'{ours}/filter/first_bias'] = state[f'{network}.0.bias']
            out[f'{ours}/filter/frequency'] = state[f'{network}.1.frequency']
            out[f'{ours}/filter/hidden'] = np.stack(
                [state[f'{network}.{j}.weight'].T for j in (2, 4)]
            )
            out[f'{ours}/filter/hidden_bias'] = np.stack(
                [state[f'{network}.{j}.bias'] for j in (2, 4)]
            )
            out[f'{ours}/filter/last'] = state[f'{network}.6.weight'].T[:, None]
    return out


if __name__ == '__main__':
    torch.manual_seed(0)
    arrays = {}
    for mixer in ('base_conv', 'hyena'):
        net = model(mixer, LENGTH, WIDTH, VOCABULARY).eval()
        with torch.no_grad():
            for w in net.parameters():  # filters near 0 would test little
                w.add_(0.3 * torch.randn_like(w))
            tokens = torch.randint(VOCABULARY, (3, LENGTH))
            at = torch.tensor([[9, 30, 31, 63], [0, 1, 2, 62], [8, 20, 40, 60]])
            logits = net(tokens, at)
        found = {'tokens': tokens, 'at': at, 'logits': logits}
        arrays |= {f'{mixer}/{name}': x.numpy() for name, x in found.items()}
        arrays |= {f'{mixer}/params/{name}': w for name, w in weights(net, mixer).items()}
    np.savez_compressed(pathlib.Path(__file__).with_name('mqar.npz'), **arrays)
