"""BaseConv and Hyena on MQAR once more in PyTorch: an independent run of cells that are disputed.

    python -m experiments.recall.peer --mixer base_conv --width 64 --rates 1e-2

Written after the published description and code of Zoology (arXiv 2312.04927): two pre-norm layers
whose second norm's output is added too, tied embeddings, every linear layer normal with a deviation
of 0.02 and no bias at first, float32 without TF32, AdamW on all parameters. It shares nothing with
the sweep but the rows. With equal weights its logits are ours (tests/golden/make_mqar.py). Each
rate is one line of results/peer.jsonl. Needs PyTorch; a GPU takes about a minute a rate.
"""

import argparse
import datetime
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.recall.cells import ENOUGH, EPOCHS, HELD_OUT, LENGTHS, RATES, ROWS, batch_size

RESULTS = pathlib.Path(__file__).parent / 'results'
VOCABULARY, STD = 8192, 0.02


def rows(length: int, count: int, held_out: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns the sweep's own training and held-out rows."""
    from effjax.data.sources.mqar import Mqar

    source = Mqar(seq_len=length, pairs=LENGTHS[length], train=count, valid=held_out)
    return {split: dict(source.examples(split)[:]) for split in ('train', 'valid')}


def model(
    mixer: str, length: int, width: int, vocabulary: int = VOCABULARY, layers: int = 2
) -> Any:
    """Returns the model, a `torch.nn.Module` of (tokens [B, T], at [B, Q]).

    Its output is the logits at the places asked for, [B, Q, V].
    """
    import torch
    from torch import nn

    def convolve(x: Any, taps: Any) -> Any:
        """Causal convolution of x [B, D, T] by taps [D, T]."""
        n = 2 * x.shape[-1]
        product = torch.fft.rfft(x, n=n) * torch.fft.rfft(taps, n=n)
        return torch.fft.irfft(product, n=n)[..., : x.shape[-1]]

    def short(channels: int) -> Any:
        return nn.Conv1d(channels, channels, 3, groups=channels, padding=2)

    class Sine(nn.Module):
        def __init__(self, size: int):
            super().__init__()
            self.frequency = nn.Parameter(torch.ones(size))

        def forward(self, x: Any) -> Any:
            return torch.sin(self.frequency * x)

    class Filter(nn.Module):
        def __init__(self, hidden: int):
            super().__init__()
            time_ = torch.linspace(0, 1, length)[:, None]
            angle = 2 * math.pi * torch.arange(length)[:, None] / length * 1e-4
            features = torch.cat([time_, torch.cos(angle), -torch.sin(angle)], -1)
            fading = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, width)
            self.register_buffer('features', features, persistent=False)
            self.register_buffer('fading', torch.exp(-time_ * fading), persistent=False)
            sine = Sine(hidden)  # one for all layers
            layers = [nn.Linear(3, hidden), sine]
            for _ in range(2):
                layers += [nn.Linear(hidden, hidden), sine]
            self.network = nn.Sequential(*layers, nn.Linear(hidden, width, bias=False))

        def forward(self) -> Any:
            return (self.network(self.features) * self.fading).T

    class BaseConv(nn.Module):
        def __init__(self, layer: int):
            super().__init__()
            self.project = nn.Linear(width, width)
            self.short = short(width) if layer % 2 == 0 else None
            self.filter = None if layer % 2 == 0 else Filter(16)

        def forward(self, u: Any) -> Any:
            x = u.transpose(1, 2)
            y = self.short(x)[..., :length] if self.short else convolve(x, self.filter()) + x
            return y.transpose(1, 2) * self.project(u) + u

    class Hyena(nn.Module):
        def __init__(self, layer: int):
            super().__init__()
            self.inputs, self.short = nn.Linear(width, 3 * width), short(3 * width)
            self.filter, self.skip = Filter(64), nn.Parameter(torch.randn(width))
            self.out = nn.Linear(width, width)

        def forward(self, u: Any) -> Any:
            x = self.short(self.inputs(u).transpose(1, 2))[..., :length]
            gate, second, v = x.chunk(3, 1)
            v = v * second
            v = convolve(v, self.filter()) + v * self.skip[:, None]
            return self.out((v * gate).transpose(1, 2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(vocabulary, width)
            kind = {'base_conv': BaseConv, 'hyena': Hyena}[mixer]
            self.mixers = nn.ModuleList(kind(layer) for layer in range(layers))
            self.before, self.after = (
                nn.ModuleList(nn.LayerNorm(width) for _ in range(layers)) for _ in range(2)
            )
            self.last = nn.LayerNorm(width)
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=STD)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            if mixer == 'hyena':
                for layer in self.mixers:
                    nn.init.normal_(layer.out.weight, std=STD / math.sqrt(2 * layers))

        def forward(self, tokens: Any, at: Any) -> Any:
            x = nn.functional.dropout(self.embedding(tokens), 0.1, self.training)
            for mixer_, before, after in zip(self.mixers, self.before, self.after, strict=True):
                x = x + mixer_(before(x))
                x = x + after(x)
            x = self.last(x).gather(1, at[..., None].expand(-1, -1, width))
            return x @ self.embedding.weight.T

    return Model()


def train(
    mixer: str,
    length: int,
    width: int,
    layers: int,
    rate: float,
    decay: float,
    epochs: int,
    data: Any,
) -> dict[str, Any]:
    """Trains one model and returns its line of results."""
    import torch

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    put = lambda x: torch.as_tensor(np.asarray(x, np.int64), device=device)  # noqa: E731
    taken, held = ({n: put(x) for n, x in data[s].items()} for s in ('train', 'valid'))
    net = model(mixer, length, width, layers=layers).to(device)
    batch, started = batch_size(length), time.time()
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    accuracy, epoch, count = 0.0, 0, len(taken['tokens'])
    while epoch < epochs and accuracy <= ENOUGH:
        net.train()
        for chosen in torch.randperm(count, device=device).split(batch):
            logits = net(taken['tokens'][chosen], taken['at'][chosen])
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), taken['labels'][chosen].flatten()
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        net.eval()
        with torch.no_grad():
            found = net(held['tokens'], held['at']).argmax(-1) == held['labels']
        accuracy, epoch = float(found.float().mean()), epoch + 1
    return {
        'mixer': mixer, 'length': length, 'width': width, 'layers': layers,
        'rate': rate, 'decay': decay, 'accuracy': accuracy, 'epochs': epoch,
        'seconds': round(time.time() - started, 1),
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        'torch': torch.__version__, 'date': datetime.date.today().isoformat(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--mixer', choices=['base_conv', 'hyena'], required=True)
    parser.add_argument('--length', type=int, choices=list(LENGTHS), default=64)
    parser.add_argument('--width', type=int, default=64)
    parser.add_argument('--layers', type=int, default=2)
    parser.add_argument('--rates', type=float, nargs='+', default=list(RATES))
    parser.add_argument('--decay', type=float, default=0.1)
    parser.add_argument('--epochs', type=int, default=EPOCHS, help='of the schedule of 64')
    parser.add_argument('--rows', type=int, default=ROWS)
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise SystemExit(
            'experiments.recall.peer needs PyTorch: pip install "effjax[hf]", or torch alone.'
        ) from None
    data = rows(args.length, args.rows, min(HELD_OUT, args.rows))
    for rate in args.rates:
        row = train(
            args.mixer, args.length, args.width, args.layers, rate, args.decay, args.epochs, data
        )
        with (args.results / 'peer.jsonl').open('a') as f:
            f.write(json.dumps(row) + '\n')
        print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
