"""The peer for recurrent models in PyTorch: flash-linear-attention's models and Triton kernels.

RetNet, GLA and Mamba-2 as `fla.models` has them, with its defaults: fused norms and gates, fused
SwiGLU, fused cross entropy. Random initialisation, fused AdamW. Two precisions:
  bf16: weights in bf16 and the optimizer's own copies in fp32, as FSDP's mixed precision keeps
    them; residuals are in bf16.
  autocast: weights in fp32 under bf16 autocast, as the `hf` peer has it; residuals are in fp32.
Mamba-2 needs the Triton kernels of mamba-ssm too; see `mamba_kernels`.

    python -m experiments.benchmarks.train_step.peers.fla --shape=retnet_380m --steps=10

Needs one NVIDIA GPU and the packages flash-linear-attention and fla-core (read at 0.6.0).
"""

import argparse
import json
import sys

from experiments.benchmarks.train_step.peers import mamba_kernels, torch_clock
from experiments.benchmarks.train_step.shapes import CONV, SHAPES, STATE, Shape, having

MIXERS = ('retnet', 'gla', 'mamba2')


def config_of(shape: Shape):
    """Returns the model's class and its config; imports `fla`, needs no GPU."""
    from fla import models

    common = {
        'vocab_size': shape.vocab,
        'hidden_size': shape.width,
        'num_hidden_layers': shape.layers,
        'tie_word_embeddings': False,
        'use_cache': False,
    }
    if shape.mixer == 'mamba2':
        sizes = {'head_dim': shape.head_dim, 'state_size': STATE, 'conv_kernel': CONV}
        expand = shape.heads * shape.head_dim // shape.width
        config = models.Mamba2Config(expand=expand, **sizes, **common)
        return models.Mamba2ForCausalLM, config
    common |= {
        'num_heads': shape.heads,
        'intermediate_size': shape.hidden,
        'max_position_embeddings': shape.length,
    }
    if shape.mixer == 'gla':
        return models.GLAForCausalLM, models.GLAConfig(expand_k=0.5, expand_v=1.0, **common)
    return models.RetNetForCausalLM, models.RetNetConfig(expand_k=1.0, expand_v=2.0, **common)


def build(shape: Shape, device: str):
    """Returns the model in training mode, with fp32 weights."""
    import torch

    kind, config = config_of(shape)
    with torch.device(device):
        return kind(config).to(torch.float32).train()


class Optimizer:
    """Fused AdamW over fp32 weights; where the model holds bf16 ones, over copies of them."""

    def __init__(self, model, precision: str):
        import torch

        self.weights = list(model.parameters())
        self.masters = self.weights
        if precision == 'bf16':
            self.masters = [w.detach().clone() for w in self.weights]
            for master in self.masters:
                master.grad = torch.zeros_like(master)
            model.to(torch.bfloat16)
        self.adamw = torch.optim.AdamW(
            self.masters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self) -> None:
        """One update from the gradients of the model's weights, which it clears."""
        import torch

        copied = self.masters is not self.weights
        if copied:
            torch._foreach_copy_([m.grad for m in self.masters], [w.grad for w in self.weights])
        self.adamw.step()
        with torch.no_grad():
            if copied:
                torch._foreach_copy_(self.weights, self.masters)
        for weight in self.weights:
            weight.grad = None


def bench(
    shape: Shape, steps: int, rounds: int = 5, precision: str = 'bf16', compiled: bool = False
) -> dict:
    """Times the training step on random tokens.

    Args:
      shape: model and batch.
      steps: steps a round; the device is waited for once a round.
      rounds: the result is their median.
      precision: 'bf16' or 'autocast', see above.
      compiled: whether the model goes through torch.compile.

    Returns:
      What `torch_clock.time_steps` measures, and params.
    """
    import torch

    device = torch_clock.prepare()
    model = build(shape, device)
    params = sum(p.numel() for p in model.parameters())
    optimizer = Optimizer(model, precision)
    forward = torch.compile(model) if compiled else model

    def step(tokens_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == 'autocast'):
            loss = forward(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return torch_clock.time_steps(step, shape, device, steps, rounds) | {'params': params}


def check(shape: Shape) -> None:
    """Ends the program with a word on what is missing, if something is."""
    try:
        import torch

        if not torch.cuda.is_available():
            sys.exit('fla: its Triton kernels need an NVIDIA GPU, and torch sees none here.')
        if shape.mixer == 'mamba2':
            mamba_kernels.install()
        import fla.models  # noqa: F401
    except ImportError as e:
        sys.exit(
            'fla: needs torch, triton, transformers, flash-linear-attention and fla-core, and for '
            f'Mamba-2 mamba-ssm; {e}.'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', choices=having(*MIXERS), default='retnet_380m')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--precision', choices=('bf16', 'autocast'), default='bf16')
    parser.add_argument('--compile', action='store_true', help='through torch.compile')
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    check(shape)
    result = bench(shape, args.steps, args.rounds, args.precision, args.compile)
    program = f'fla_{args.precision}' + ('_compile' if args.compile else '')
    print(json.dumps({'program': program, 'shape': args.shape, **result}))


if __name__ == '__main__':
    main()
