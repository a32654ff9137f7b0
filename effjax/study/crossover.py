"""Where one mixer's layer begins to beat another's: time, memory, FLOPs and state by length.

A layer is a mixer alone, at the width and in the dtypes of a config. Its step is a forward and a
backward pass, gradients of parameters and input included. At each length all mixers are timed in
turns, each step until its result is there, on equally many tokens.
"""

import ast
import concurrent.futures
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax import parallel, precision
from effjax.core.axes import Buffer
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.registry import arguments, check_block, lookup, parameters
from effjax.kernels.choice import recording
from effjax.layers.mixers import MIXERS

Block = dict[str, Any]
WARM_UP = 3  # steps before the timed ones


@dataclasses.dataclass(frozen=True)
class Point:
    """One mixer at one length.

    Attributes:
      mixer: its label.
      length: tokens T in a row.
      batch: rows B.
      seconds: median time of a forward and backward pass; None where it could not run.
      spread: difference of the quartiles over the median.
      forward_seconds: median time of the forward pass alone.
      flops: model FLOPs of forward and backward, by the mixer's cost.
      peak_bytes: memory of the compiled step: arguments, results and temporaries.
      state_bytes: decoding state of one row after T tokens, in the compute dtype.
      ran: implementations that its kernels chose, 'op=name'.
      error: why it could not run, '' if it did.
    """

    mixer: str
    length: int
    batch: int
    seconds: float | None = None
    spread: float | None = None
    forward_seconds: float | None = None
    flops: float | None = None
    peak_bytes: int | None = None
    state_bytes: int | None = None
    ran: str = ''
    error: str = ''


def parse_mixers(text: str, own: Mapping[str, Any]) -> dict[str, Block]:
    """Reads 'retnet, mamba2(heads=8), attention' into label -> block of config.

    A mixer of the config's own kind takes the config's arguments; another takes those of the
    config's that it needs and does not say (`heads`, usually).

    Args:
      text: names, with arguments in parentheses where they differ.
      own: the config's mixer block.

    Raises:
      ConfigError: text that is no such list, an unknown mixer or argument, or one that is missing.
    """
    out: dict[str, Block] = {}
    for node in _items(text):
        name, given = _item(node, text)
        component = lookup(MIXERS, name, 'mixer', '--mixers')
        shared = arguments(own)
        if name != own['kind']:
            needed = [k for k, p in parameters(component).items() if p.default is p.empty]
            shared = {k: v for k, v in shared.items() if k in needed}
        block = {'kind': name, **shared, **given}
        check_block(MIXERS, block, 'mixer', f'--mixers {name}')
        label = ast.unparse(node).replace(' ', '')
        if label in out:
            raise ConfigError(f'--mixers names {label!r} twice.')
        out[label] = block
    return out


def parse_lengths(text: str) -> list[int]:
    """Reads '512:16384' (doubling) or '512,1000,4096' into ascending lengths.

    Raises:
      ConfigError: not such a list.
    """
    try:
        if ':' in text:
            low, high = (int(part) for part in text.split(':'))
            lengths = [low * 2**i for i in range(64) if 0 < low * 2**i <= high]
        else:
            lengths = sorted({int(part) for part in text.split(',')})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1:
        raise ConfigError(
            f'--lengths takes LOW:HIGH, doubled from the one to the other, or a list such as '
            f'512,2048, got {text!r}.'
        )
    return lengths


class Layer:
    """A mixer's layer with its compiled step and everything that the step needs.

    Args:
      label: the mixer's.
      block: its config.
      config: the run's config: width, dtypes, positions, causality.
      length: tokens in a row.
      batch: rows.

    Raises:
      ConfigError: the mixer refuses the config or the length.
    """

    def __init__(
        self, label: str, block: Block, config: Mapping[str, Any], length: int, batch: int
    ):
        self.label, self.length, self.batch = label, length, batch
        ctx = context(config, length)
        component = check_block(MIXERS, block, 'mixer', '--mixers')

        def make() -> nnx.Module:
            return component(ctx, **arguments(block), rngs=nnx.Rngs(0))

        model: Any = nnx.eval_shape(make)
        self._graphdef = nnx.split(model, nnx.Param, Buffer)[0]
        self._make, self._dtype = make, ctx.policy.compute_dtype
        self.flops = 3.0 * model.cost(batch, length).model_flops
        self.state_bytes = (
            model.state_bytes(1, length, self._dtype) if 'stepping' in model.supports else None
        )
        self._width = ctx.width
        self._args: tuple[Any, ...] = ()

    def trace(self) -> None:
        """Traces both passes, and what places parameters and inputs."""
        shape = (self.batch, self.length, self._width)

        def place():
            params, buffers = nnx.split(self._make(), nnx.Param, Buffer)[1:]
            x, dy = (jax.random.normal(jax.random.key(i), shape, self._dtype) for i in (1, 2))
            return params, buffers, x, dy

        info = SeqInfo.of(self.batch, self.length)

        def forward(params, buffers, x):
            return nnx.merge(self._graphdef, params, buffers)(x, info=info)[0]

        def both(params, buffers, x, dy):
            y, pull = jax.vjp(lambda p, x: forward(p, buffers, x), params, x)
            return y, pull(dy.astype(y.dtype))

        args = jax.eval_shape(place)
        with recording() as ran:
            self._lowered = (
                jax.jit(place).lower(),
                jax.jit(forward).lower(*args[:3]),
                jax.jit(both).lower(*args),
            )
        self.ran = ', '.join(f'{op}={name}' for op, name in ran.items())

    def compile(self) -> None:
        """Compiles all three; threads may do so for several layers at once."""
        self._place, self._forward, self._both = (lowered.compile() for lowered in self._lowered)
        self.peak_bytes = _peak(self._both)

    def place(self) -> None:
        """Places parameters and inputs."""
        self._args = self._place()

    def step(self) -> None:
        """Runs forward and backward and waits."""
        jax.block_until_ready(self._both(*self._args))

    def forward(self) -> None:
        """Runs the forward pass and waits."""
        jax.block_until_ready(self._forward(*self._args[:3]))

    def close(self) -> None:
        """Frees parameters and inputs."""
        self._args = ()


def context(config: Mapping[str, Any], length: int) -> Context:
    """Returns what a mixer of a config's model is told, for rows of `length` tokens."""
    model = config['model']
    norm, positions = model.get('norm'), model.get('positions', {'kind': 'rope'})
    return Context(
        width=model['width'],
        policy=precision.build(config['precision']).policy,
        causal=model['kind'] == 'decoder',
        max_len=length,
        positions=dict(positions),
        norm=dict(norm or {'kind': 'rmsnorm'}),
        bias=bool(model.get('bias', False)),
        init=model.get('init', 'gpt2'),
    )


Compiling = list[tuple[Layer, concurrent.futures.Future]]


def prepare(
    config: Mapping[str, Any],
    mixers: Mapping[str, Block],
    length: int,
    tokens: int,
    pool: concurrent.futures.Executor,
) -> Compiling:
    """Traces every mixer's layer at one length, and leaves compiling it to a pool.

    Args:
      config: the run's config, as plain dicts.
      mixers: label -> block, from `parse_mixers`.
      length: tokens in a row.
      tokens: tokens a step; the batch is `tokens // length` rows, at least 1.
      pool: threads.

    Raises:
      ConfigError: a mixer refuses the config or the length.
    """
    out: Compiling = []
    with _on_one_device():
        for label, block in mixers.items():
            layer = Layer(label, block, config, length, max(1, tokens // length))
            layer.trace()
            out.append((layer, pool.submit(layer.compile)))
    return out


def measure(
    compiling: Compiling,
    *,
    steps: int = 20,
    seconds: float = 5.0,
    timer: Callable[[], float] = time.perf_counter,
) -> list[Point]:
    """Measures every mixer at one length.

    Nothing should still be compiled beside it: the compiler tries things out on the device.

    Args:
      compiling: from `prepare`.
      steps: timed steps of each mixer, at most.
      seconds: of timing for each mixer, at most, after at least 3 steps.
      timer: seconds by a steady clock.
    """
    failed: dict[str, str] = {}
    with _on_one_device():
        for layer, done in compiling:
            with _out_of_memory(layer.label, failed):
                done.result()
                layer.place()
                for _ in range(WARM_UP):
                    layer.step()
        layers = [layer for layer, _ in compiling]
        alive = [layer for layer in layers if layer.label not in failed]
        both = _turns(alive, Layer.step, steps, seconds, timer)
        forward = _turns(alive, Layer.forward, steps, seconds, timer)
    out = [_point(x, both.get(x.label), forward.get(x.label), failed) for x in layers]
    for layer in layers:
        layer.close()
    return out


def crossing(
    points: Sequence[Point], mixer: str, against: str, value: str = 'seconds'
) -> tuple[int | None, str]:
    """Returns the first measured length from which on a mixer is below another, and words for it.

    Args:
      points: all points.
      mixer: label.
      against: label of the other.
      value: the attribute compared.
    """
    ratios = ratio(points, mixer, against, value)
    if not ratios:
        return None, 'cannot be compared'
    lengths = sorted(ratios)
    first = next((n for n in lengths if all(ratios[m] < 1 for m in lengths if m >= n)), None)
    if first is None:
        some = ', though less at some shorter ones' if min(ratios.values()) < 1 else ''
        last = lengths[-1]
        return None, f'at no length from some one on: {ratios[last]:.2f}x at {last:,} tokens{some}'
    if first == lengths[0]:
        return first, f'at every length measured, {ratios[first]:.2f}x at {first:,} tokens'
    before = lengths[lengths.index(first) - 1]
    low, high = math.log(ratios[before]), math.log(ratios[first])
    guess = before * (first / before) ** (low / (low - high))
    return first, f'from about {guess:,.0f} tokens on (between {before:,} and {first:,})'


def ratio(
    points: Sequence[Point], mixer: str, against: str, value: str = 'seconds'
) -> dict[int, float]:
    """Returns length -> value of a mixer over that of another, where both are known."""
    sides = [
        {p.length: getattr(p, value) for p in points if p.mixer == m} for m in (mixer, against)
    ]
    return {
        length: mine / sides[1][length]
        for length, mine in sides[0].items()
        if mine is not None and sides[1].get(length)
    }


# ---- inside ------------------------------------------------------------------------------------


def _items(text: str) -> list[ast.expr]:
    try:
        node = ast.parse(f'[{text}]', mode='eval').body
    except SyntaxError:
        node = ast.Tuple([])
    if not isinstance(node, ast.List) or not node.elts:
        raise ConfigError(
            f"--mixers takes names and arguments such as 'retnet,mamba2(heads=8),attention', got "
            f'{text!r}.'
        )
    return node.elts


def _item(node: ast.expr, text: str) -> tuple[str, Block]:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = call.func.id if isinstance(call.func, ast.Name) else ''
    try:
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except ValueError:
        name = ''
    if not name or call.args or len(given) < len(call.keywords):
        raise ConfigError(
            f'--mixers: {ast.unparse(node)!r} is no mixer; write NAME or NAME(ARGUMENT=VALUE, ...).'
        )
    return name, given


def _turns(
    layers: Sequence[Layer],
    run: Callable[[Layer], None],
    steps: int,
    seconds: float,
    timer: Callable[[], float],
) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {layer.label: [] for layer in layers}
    for _ in range(steps):
        for layer in layers:
            mine = out[layer.label]
            if len(mine) >= 3 and sum(mine) > seconds:
                continue
            started = timer()
            run(layer)
            mine.append(timer() - started)
    return out


def _point(
    layer: Layer,
    both: Sequence[float] | None,
    forward: Sequence[float] | None,
    failed: Mapping[str, str],
) -> Point:
    point = Point(
        layer.label,
        layer.length,
        layer.batch,
        flops=layer.flops,
        state_bytes=layer.state_bytes,
        error=failed.get(layer.label, ''),
    )
    if not both or not forward:
        return point
    return dataclasses.replace(
        point,
        seconds=statistics.median(both),
        spread=_spread(both),
        forward_seconds=statistics.median(forward),
        peak_bytes=layer.peak_bytes,
        ran=layer.ran,
    )


def _spread(samples: Sequence[float]) -> float:
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method='inclusive')
    return (high - low) / statistics.median(samples)


def _peak(compiled: Any) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


@contextmanager
def _on_one_device() -> Iterator[None]:
    with parallel.mesh_context(parallel.make_mesh({'data': 1}), parallel.make_rules({})):
        yield


@contextmanager
def _out_of_memory(label: str, failed: dict[str, str]) -> Iterator[None]:
    """Notes a mixer that does not fit; whatever else goes wrong is an error."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as e:
        if isinstance(e, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        failed[label] = f'does not fit into the memory of {jax.devices()[0].device_kind}'


def dtype_name(config: Mapping[str, Any]) -> str:
    """Returns the compute dtype of a config."""
    return str(jnp.dtype(precision.build(config['precision']).policy.compute_dtype))
