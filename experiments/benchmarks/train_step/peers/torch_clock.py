"""How the peers in PyTorch are timed, all alike: random tokens, rounds of steps, their median."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.train_step.shapes import BATCHES, Shape


def prepare() -> str:
    """Seeds PyTorch and lets fp32 products use TF32; returns the device, 'cuda' or 'cpu'."""
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def time_steps(
    step: Callable[[Any], Any], shape: Shape, device: str, steps: int, rounds: int
) -> dict:
    """Times a training step on random tokens.

    Args:
      step: takes token ids int64 `[B, T]`, trains on them and returns the loss.
      shape: model and batch.
      device: 'cuda' or 'cpu'.
      steps: steps a round; the device is waited for once a round.
      rounds: the result is their median.

    Returns:
      tok_s (tokens a second), step_s and rounds_s (seconds a step), compile_s (the first steps,
      which compile), peak_bytes (largest allocation since then; None on a CPU), loss after the
      last step.
    """
    import torch

    # More batches than it could learn by heart: products run faster on vanishing gradients.
    batches = torch.randint(shape.vocab, (BATCHES, shape.batch, shape.length), device=device)
    taken = itertools.cycle(batches)

    def wait() -> None:
        if device == 'cuda':
            torch.cuda.synchronize()

    def timed(count: int) -> tuple[float, torch.Tensor]:
        wait()
        started = time.perf_counter()
        for _ in range(count):
            loss = step(next(taken))
        wait()
        return time.perf_counter() - started, loss

    compile_s, _ = timed(2)
    timed(min(steps, 3))
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        elapsed, loss = timed(steps)
        seconds.append(elapsed / steps)
    return {
        'tok_s': shape.tokens / statistics.median(seconds),
        'step_s': statistics.median(seconds),
        'rounds_s': seconds,
        'compile_s': compile_s,
        'peak_bytes': torch.cuda.max_memory_allocated() if device == 'cuda' else None,
        'loss': float(loss),
    }
