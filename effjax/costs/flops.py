"""FLOPs that a function really executes, counted by walking its jaxpr.

XLA's own `cost_analysis` counts the body of a loop once and is blind inside custom calls, so it
cannot give the cost of a training step. The walk multiplies a scan's body by its length, takes the
dearest branch of a `cond`, multiplies inside `shard_map` by the manual mesh, asks kernels for their
own cost, and knows cuDNN's attention by formula. Dead code is removed first, as the compiler does:
what rematerialisation recomputes for nothing is not executed.

Counted: matrix products, convolutions, FFTs, fused attention, kernels, and the arithmetic of
recurrences (`lax.associative_scan`, cumulative sums, and `lax.scan` bodies whose carry goes through
elementwise multiplications only). Not counted: other elementwise work, look-ups, sorts, the
optimizer's arithmetic, communication. See docs/costs.md.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.extend
from jax.interpreters import partial_eval

from effjax.core.errors import ConfigError
from effjax.costs import products

# Costs of kernels that state none themselves: `beginning of a name -> 'module:function'` (or the
# function), where the name is the `pallas_call`'s or the custom call's. The function takes a
# `products.KernelCall` and returns FLOPs on one device, or None where it cannot tell.
KERNELS: dict[str, str | Callable[[products.KernelCall], float | None]] = {
    'attention_': 'effjax.kernels.attention.cost:kernel_flops',
    'delta_rule_': 'effjax.kernels.delta_rule.cost:kernel_flops',
    'diagonal_scan_': 'effjax.kernels.diagonal_scan.cost:kernel_flops',
    'dplr_': 'effjax.kernels.dplr.cost:kernel_flops',
    'grouped_product_': 'effjax.kernels.grouped_product.cost:kernel_flops',
    'linear_recurrence_walk': 'effjax.kernels.linear_recurrence.cost:kernel_flops',
    'selective_scan_': 'effjax.kernels.selective_scan.cost:kernel_flops',
    'splash_': 'effjax.costs.products:splash_attention',
}

# Matrix decompositions and foreign calls whose FLOPs cannot be read from their shapes.
_OPAQUE = frozenset({
    'eig', 'eigh', 'svd', 'schur', 'hessenberg', 'tridiagonal', 'geqrf', 'householder_product',
    'ffi_call', 'custom_call', 'triton_kernel_call', 'pallas_call', 'core_map', 'mpmd_map',
    'mosaic_gpu_call', 'tpu_custom_call',
})  # fmt: skip

_Tally = dict[tuple[str, str, str, str], float]  # (kind, primitive, scope, phase) -> FLOPs

_TRANSFORM = re.compile(r'[a-z_0-9]+\(')
_PAIRS = re.compile(r'\bpairs=(\d+)')
_NOT_A_SCOPE = frozenset({'', 'rematted_computation', 'checkpoint'})


@dataclasses.dataclass(frozen=True)
class WalkResult:
    """FLOPs of one call of a function, over all devices of its mesh.

    Attributes:
      by_kind: 'matmul', 'conv', 'fft', 'scan', 'attention', 'kernel' -> FLOPs.
      by_primitive: jax primitive (or kernel name) -> FLOPs.
      by_scope: path of `jax.named_scope`s -> FLOPs; '' is outside of any.
      by_phase: 'forward', 'recompute' (rematerialisation), 'backward' -> FLOPs.
      unknown: what could not be counted, one word each; empty where the count is complete.
    """

    by_kind: dict[str, float]
    by_primitive: dict[str, float]
    by_scope: dict[str, float]
    by_phase: dict[str, float]
    unknown: tuple[str, ...] = ()

    @property
    def counted(self) -> float:
        """All FLOPs counted; a lower bound where `unknown` is not empty."""
        return sum(self.by_kind.values())

    @property
    def total(self) -> float | None:
        """All FLOPs, or None where something could not be counted."""
        return None if self.unknown else self.counted

    def kind(self, name: str) -> float:
        """FLOPs of one kind, 0.0 where there is none."""
        return self.by_kind.get(name, 0.0)


def walk(
    fn: Callable[..., Any],
    *args: Any,
    while_trips: Mapping[str, int] | None = None,
    strict: bool = False,
    **kwargs: Any,
) -> WalkResult:
    """Counts the FLOPs of `fn(*args, **kwargs)` without running it.

    Args:
      fn: any function that jax can trace, jitted or not.
      *args: arrays or `jax.ShapeDtypeStruct`s (nested).
      while_trips: number of trips of loops whose end depends on data: part of the loop's scope
        path (or of 'while', where it has none; '' is any loop) -> trips.
      strict: raise on anything that cannot be counted; else list it in `unknown`, and have no
        `total`.
      **kwargs: as `args`.

    Returns:
      The `WalkResult`. Shapes under `jax.jit` are global, so are the FLOPs.

    Raises:
      ConfigError: with `strict`, a loop with products and unknown trips, or a kernel without cost.
    """
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs)
    return walk_jaxpr(jaxpr, while_trips=while_trips, strict=strict)


def walk_jaxpr(
    jaxpr: Any, *, while_trips: Mapping[str, int] | None = None, strict: bool = False
) -> WalkResult:
    """Counts the FLOPs of a jaxpr, such as `jitted.trace(*args).jaxpr`; see `walk`."""
    walker = _Walker(while_trips or {})
    jaxpr = _open(jaxpr)
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    tally = walker.jaxpr(live, _Place())
    unknown = tuple(dict.fromkeys(walker.unknown))
    if strict and unknown:
        raise ConfigError(
            f'cannot count the FLOPs of {unknown[0]}; for a loop pass while_trips, for a kernel '
            'give it a cost_estimate or a line in effjax.costs.flops.KERNELS.'
        )
    return WalkResult(
        by_kind=_by(tally, 0),
        by_primitive=_by(tally, 1),
        by_scope=_by(tally, 2),
        by_phase=_by(tally, 3),
        unknown=unknown,
    )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an equation stands.

    Attributes:
      scope: path of named scopes.
      phase: 'forward', 'recompute' or 'backward'.
      recurrent: it belongs to a recurrence, whose elementwise arithmetic counts.
      pairs: N of the innermost `jax.named_scope('pairs=N')`, by which the caller of an attention
        kernel says what its shapes do not: the pairs of query and key that a mask allows a head.
    """

    scope: str = ''
    phase: str = 'forward'
    recurrent: bool = False
    pairs: int | None = None

    def enter(self, eqn: Any) -> '_Place':
        """Returns the place of an equation found in this place."""
        stack = str(eqn.source_info.name_stack)
        phase = self.phase
        if 'rematted_computation' in stack:
            phase = 'recompute'
        elif 'transpose(' in stack and phase == 'forward':
            phase = 'backward'
        told = _PAIRS.findall(stack)
        pairs = int(told[-1]) if told else self.pairs
        return _Place(_join(self.scope, stack), phase, self.recurrent, pairs)


class _Walker:
    """Adds up the equations of nested jaxprs; one method for each kind of control flow."""

    def __init__(self, while_trips: Mapping[str, int]):
        self.while_trips = while_trips
        self.unknown: list[str] = []
        self.special: dict[str, Callable[[Any, _Place], _Tally]] = {
            'scan': self.scan,
            'while': self.while_loop,
            'cond': self.cond,
            'shard_map': self.shard_map,
            'custom_linear_solve': self.linear_solve,
        }

    def jaxpr(self, jaxpr: Any, place: _Place, recurrent: frozenset[int] = frozenset()) -> _Tally:
        """Tally of a jaxpr; `recurrent` are the indices of equations that are a recurrence."""
        tally: _Tally = {}
        for i, eqn in enumerate(_open(jaxpr).eqns):
            here = place.enter(eqn)
            if i in recurrent:
                here = dataclasses.replace(here, recurrent=True)
            _add(tally, self.eqn(eqn, here))
        return tally

    def eqn(self, eqn: Any, place: _Place) -> _Tally:
        name = eqn.primitive.name
        product = products.product_of(name)
        if product:
            kind, formula = product
            return {(kind, name, place.scope, place.phase): formula(eqn)}
        if name in self.special:
            return self.special[name](eqn, place)
        if name in _OPAQUE:
            return self.kernel(eqn, place)
        if name in products.ARITHMETIC:
            if place.recurrent or _in_associative_scan(eqn):
                flops = products.arithmetic(eqn)
                return {('scan', name, place.scope, place.phase): flops}
            return {}
        inner = list(jax.extend.core.jaxprs_in_params(eqn.params))
        if inner and not place.recurrent and _in_associative_scan(eqn):
            place = dataclasses.replace(place, recurrent=True)
        tally: _Tally = {}
        for jaxpr in inner:
            _add(tally, self.jaxpr(jaxpr, place))
        return tally

    def scan(self, eqn: Any, place: _Place) -> _Tally:
        body = _open(eqn.params['jaxpr'])
        chosen = _recurrence(body, *_carried(eqn, body))
        return _times(self.jaxpr(body, place, chosen), eqn.params['length'])

    def while_loop(self, eqn: Any, place: _Place) -> _Tally:
        unknown = len(self.unknown)
        tally = self.jaxpr(eqn.params['body_jaxpr'], place)
        _add(tally, self.jaxpr(eqn.params['cond_jaxpr'], place))
        if not any(tally.values()) and len(self.unknown) == unknown:
            return {}  # such as the loop of a random number generator
        name = f'{place.scope}/while'
        for part, trips in self.while_trips.items():
            if part in name:
                return _times(tally, trips)
        at = f' in scope {place.scope!r}' if place.scope else ''
        self.unknown.append(f'a while loop{at} whose number of trips depends on data')
        return {}

    def cond(self, eqn: Any, place: _Place) -> _Tally:
        branches = [self.jaxpr(branch, place) for branch in eqn.params['branches']]
        return max(branches, key=lambda tally: sum(tally.values()))

    def shard_map(self, eqn: Any, place: _Place) -> _Tally:
        shape = eqn.params['mesh'].shape
        devices = math.prod(shape[axis] for axis in eqn.params['newly_manual_axes'])
        return _times(self.jaxpr(eqn.params['jaxpr'], place), devices)

    def linear_solve(self, eqn: Any, place: _Place) -> _Tally:
        return self.jaxpr(eqn.params['jaxprs'].solve, place)

    def kernel(self, eqn: Any, place: _Place) -> _Tally:
        name = _kernel_name(eqn)
        estimate = eqn.params.get('cost_estimate')
        flops: float | None = None
        if estimate is not None:
            flops = float(estimate.flops)
        elif formula := _formula(name):
            flops = formula(
                products.KernelCall(
                    name,
                    tuple(v.aval for v in eqn.invars),
                    tuple(v.aval for v in eqn.outvars),
                    eqn.params,
                    place.pairs,
                )
            )
        if flops is None:
            self.unknown.append(f'{eqn.primitive.name} {name!r}')
            return {}
        return {('kernel', name, place.scope, place.phase): flops}


def _carried(eqn: Any, body: Any) -> tuple[list[Any], list[Any]]:
    """Returns the body's variables that hold the carry, on the way in and on the way out.

    Told from shapes, since the parameters that number them differ between jax versions: what is
    scanned over or stacked has one more dimension outside of the body.
    """

    def same(outer: Iterable[Any], inner: Iterable[Any]) -> list[bool]:
        return [len(o.aval.shape) == len(i.aval.shape) for o, i in zip(outer, inner, strict=True)]

    carries = sum(same(eqn.outvars, body.outvars))
    kept = sum(same(eqn.invars, body.invars))  # constants, then the carry
    return body.invars[kept - carries : kept], body.outvars[:carries]


def _recurrence(body: Any, carry_in: list[Any], carry_out: list[Any]) -> frozenset[int]:
    """Returns the equations of a scan's body that are an elementwise recurrence, as indices.

    A body is one where the way from the carry back to the carry holds a multiplication and no
    product: then everything that depends on the carry counts. A stack of layers (products on the
    way) and an accumulator (sums only) are none.
    """
    reached = set(carry_in)
    depends = []
    for i, eqn in enumerate(body.eqns):
        if any(_is_var(v) and v in reached for v in eqn.invars):
            depends.append(i)
            reached.update(eqn.outvars)
    wanted = {v for v in carry_out if _is_var(v)}
    core = []
    for i in reversed(range(len(body.eqns))):
        eqn = body.eqns[i]
        if any(v in wanted for v in eqn.outvars):
            wanted.update(v for v in eqn.invars if _is_var(v))
            core.append(eqn)
    core = [e for e in core if any(_is_var(v) and v in reached for v in e.invars)]
    names = set()
    for eqn in core:
        names.update(_names(eqn))
    multiplies = any('mul' in _float_names(eqn) for eqn in core)
    opaque = any(products.product_of(n) or n in _OPAQUE for n in names - _CUMULATIVE)
    return frozenset(depends) if multiplies and not opaque else frozenset()


_CUMULATIVE = frozenset(n for n, (kind, _) in products.PRODUCTS.items() if kind == 'scan')


def _names(eqn: Any) -> set[str]:
    """Names of the primitives of an equation, nested ones too."""
    names = {eqn.primitive.name}
    for jaxpr in jax.extend.core.jaxprs_in_params(eqn.params):
        for inner in _open(jaxpr).eqns:
            names |= _names(inner)
    return names


def _float_names(eqn: Any) -> set[str]:
    """As `_names`, of an equation that writes floating-point numbers; else none."""
    dtypes = (str(getattr(v.aval, 'dtype', '')) for v in eqn.outvars)
    return _names(eqn) if any('float' in d or 'complex' in d for d in dtypes) else set()


def _in_associative_scan(eqn: Any) -> bool:
    """True for the combining function of a `lax.associative_scan`, in gradients too.

    jax leaves no trace of it in the jaxpr but the call stack that each equation remembers; the
    weaving together of even and odd elements is not arithmetic of the recurrence.
    """
    traceback = eqn.source_info.traceback
    if traceback is None:
        return False
    names = {frame.function_name.rpartition('.')[2] for frame in traceback.frames}
    return 'associative_scan' in names and '_interleave' not in names


def _kernel_name(eqn: Any) -> str:
    for key in ('name', 'target_name', 'call_target_name'):
        if eqn.params.get(key):
            return str(eqn.params[key])
    return str(eqn.primitive.name)


def _formula(name: str) -> Callable[[products.KernelCall], float | None] | None:
    """Returns the cost of a kernel from `KERNELS`, the longest fitting key first."""
    for key in sorted(KERNELS, key=len, reverse=True):
        if name.startswith(key):
            cost = KERNELS[key]
            if callable(cost):
                return cost
            module, _, attribute = cost.partition(':')
            return getattr(importlib.import_module(module), attribute)
    return None


def _join(outer: str, stack: str) -> str:
    """Returns a scope path without the names of jax's transformations."""
    plain = _TRANSFORM.sub('', stack).replace(')', '')
    parts = outer.split('/') if outer else []
    for part in plain.split('/'):
        # An einsum names itself by its formula.
        if '->' in part or part in _NOT_A_SCOPE or _PAIRS.match(part):
            continue
        if not parts or parts[-1] != part:
            parts.append(part)
    return '/'.join(parts)


def _open(jaxpr: Any) -> Any:
    """Returns a closed jaxpr's jaxpr."""
    return getattr(jaxpr, 'jaxpr', jaxpr)


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jax.extend.core.Literal)


def _add(tally: _Tally, more: _Tally) -> None:
    for key, flops in more.items():
        tally[key] = tally.get(key, 0.0) + flops


def _times(tally: _Tally, n: int) -> _Tally:
    return {key: flops * n for key, flops in tally.items()}


def _by(tally: _Tally, index: int) -> dict[str, float]:
    out: dict[str, float] = {}
    for key, flops in tally.items():
        if flops:
            out[key[index]] = out.get(key[index], 0.0) + flops
    return out
