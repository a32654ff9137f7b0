"""Makes bert.npz: the masked-language model of `transformers`, random weights, on a CPU.

Usage: python tests/golden/make_bert.py, where torch and transformers (5.23) are installed. The
weights stand in the file by our names and in our layout; `weights` is the mapping. The vector of
[MASK] becomes our mask's own, and the only token type used is added to the positions.
"""

import pathlib

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

WIDTH, HEADS, LAYERS, VOCAB, LENGTH = 12, 2, 2, 19, 10
MASK = 3
PROJECTIONS = {
    'query': 'attention.self.query',
    'key': 'attention.self.key',
    'value': 'attention.self.value',
}


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns our parameters by path from those of `BertForMaskedLM`."""
    state = {name: w.detach().double().numpy() for name, w in module.state_dict().items()}
    inner = state['bert.embeddings.word_embeddings.weight']
    out = {'embedding/table': inner, 'mask_token': inner[MASK]}
    types = state['bert.embeddings.token_type_embeddings.weight'][0]
    out['positions/table'] = state['bert.embeddings.position_embeddings.weight'] + types
    out |= norm('embed_norm', state, 'bert.embeddings.LayerNorm')
    blocks = [block(state, f'bert.encoder.layer.{i}.') for i in range(LAYERS)]
    for name in blocks[0]:
        out[f'body/segment_0/slot_0/{name}'] = np.stack([block[name] for block in blocks])
    head = 'cls.predictions.'
    out['transform/kernel'] = state[f'{head}transform.dense.weight'].T
    out['transform/bias'] = state[f'{head}transform.dense.bias']
    out |= norm('transform_norm', state, f'{head}transform.LayerNorm')
    out['head_bias'] = state[f'{head}bias']
    return out


def block(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns one block's parameters."""
    split, out = (HEADS, WIDTH // HEADS), {}
    for ours, theirs in PROJECTIONS.items():
        w, b = (state[f'{prefix}{theirs}.{kind}'] for kind in ('weight', 'bias'))
        out[f'mixer/{ours}/kernel'] = w.T.reshape(WIDTH, *split)
        out[f'mixer/{ours}/bias'] = b.reshape(split)
    out['mixer/out/kernel'] = state[f'{prefix}attention.output.dense.weight'].T.reshape(
        *split, WIDTH
    )
    out['mixer/out/bias'] = state[f'{prefix}attention.output.dense.bias']
    for ours, theirs in (('up', 'intermediate.dense'), ('down', 'output.dense')):
        out[f'ffn/{ours}/kernel'] = state[f'{prefix}{theirs}.weight'].T
        out[f'ffn/{ours}/bias'] = state[f'{prefix}{theirs}.bias']
    out |= norm('norm_mixer', state, f'{prefix}attention.output.LayerNorm')
    return out | norm('norm_ffn', state, f'{prefix}output.LayerNorm')


def norm(ours: str, state: dict[str, np.ndarray], theirs: str) -> dict[str, np.ndarray]:
    """Returns a norm's parameters."""
    return {f'{ours}/scale': state[f'{theirs}.weight'], f'{ours}/bias': state[f'{theirs}.bias']}


if __name__ == '__main__':
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=20,
        hidden_act='gelu_new',
        max_position_embeddings=LENGTH,
    )
    module = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        tokens = torch.randint(4, VOCAB, (2, LENGTH))
        tokens[:, 2::3] = MASK
        logits = module(tokens).logits
    arrays = {name: w.astype(np.float32) for name, w in weights(module).items()}
    np.savez_compressed(
        pathlib.Path(__file__).with_name('bert.npz'),
        tokens=np.where(tokens == MASK, -1, tokens).astype(np.int32),
        logits=logits.numpy(),
        **{f'params/{name}': w for name, w in arrays.items()},
    )
