"""FLOPs of single jax primitives, from the shapes and parameters of one equation of a jaxpr.

A multiply-add is 2 FLOPs (8 where the numbers are complex). Each function takes a `JaxprEqn` and
returns FLOPs as a float; `PRODUCTS` says under which heading they are booked. Zeros that a product
multiplies with (padding, masked pairs in a dense product) count, since they are executed; holes of
a dilated convolution do not, since no backend multiplies them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# cuDNN's mask types that forbid looking ahead (jax's MaskType: CAUSAL and PADDING_CAUSAL).
_CAUSAL = (2, 3)
_LAYOUT_BNTH = 1
# jax.lax.FftType
_RFFT, _IRFFT = 2, 3


def dot_general(eqn: Any) -> float:
    """FLOPs of `dot_general`: 2 x batch x rows x inner x columns."""
    (lhs_contract, _), _ = eqn.params['dimension_numbers']
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    inner = math.prod(lhs.shape[d] for d in lhs_contract)
    return _per_multiply_add(out) * inner * math.prod(out.shape)


def ragged_dot_general(eqn: Any) -> float:
    """FLOPs of a grouped product whose backend skips other groups' rows.

    XLA expands it to dense products on CPU, and by default on GPU: there the machine does as many
    times more as there are groups, which is a property of the backend and not of the program.
    """
    numbers = eqn.params['ragged_dot_dimension_numbers']
    (contract, _), _ = numbers.dot_dimension_numbers
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    flops = _per_multiply_add(out) * math.prod(out.shape)
    flops *= math.prod(lhs.shape[d] for d in contract)
    if set(numbers.lhs_ragged_dimensions) & set(contract):  # the groups share the inner dimension
        flops /= max(1, out.shape[0])
    return float(flops)


def conv_general_dilated(eqn: Any) -> float:
    """FLOPs of a convolution, the same for its two transposes: out x taps x channels of a group."""
    numbers = eqn.params['dimension_numbers']
    lhs, rhs, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    pairs = 1
    for d, dilation in enumerate(eqn.params['lhs_dilation']):
        # A dilated input belongs to the transpose of a strided convolution, whose work is counted
        # by the points that exist.
        at = lhs.shape[numbers.lhs_spec[2 + d]] if dilation > 1 else out.shape[
            numbers.out_spec[2 + d]]  # fmt: skip
        pairs *= at * rhs.shape[numbers.rhs_spec[2 + d]]
    rows, columns = out.shape[numbers.out_spec[0]], out.shape[numbers.out_spec[1]]
    inner = rhs.shape[numbers.rhs_spec[1]]
    return float(_per_multiply_add(out) * pairs * rows * columns * inner)


def fft(eqn: Any) -> float:
    """5 N log2 N for each complex transform of N points, half of it for a real one."""
    lengths = eqn.params['fft_lengths']
    points = math.prod(lengths)
    kind = int(eqn.params['fft_type'])
    array = (eqn.outvars if kind == _IRFFT else eqn.invars)[0].aval
    transforms = math.prod(array.shape) // points
    per_point = 2.5 if kind in (_RFFT, _IRFFT) else 5.0
    return per_point * transforms * points * math.log2(max(points, 2))


def triangular_solve(eqn: Any) -> float:
    """FLOPs of solving with a triangle of N x N: N^2 for each right-hand side."""
    a, b = eqn.invars[0].aval, eqn.invars[1].aval
    return _per_multiply_add(b) / 2 * a.shape[-1] * math.prod(b.shape)


def cholesky(eqn: Any) -> float:
    """N^3 / 3 for each matrix."""
    a = eqn.invars[0].aval
    return _per_multiply_add(a) / 6 * a.shape[-1] * math.prod(a.shape)


def lu(eqn: Any) -> float:
    """2 N^3 / 3 for each square matrix (m n^2 - n^3 / 3 multiply-adds for m x n, m >= n)."""
    a = eqn.invars[0].aval
    m, n = max(a.shape[-2:]), min(a.shape[-2:])
    matrices = math.prod(a.shape[:-2])
    return _per_multiply_add(a) / 2 * matrices * (m * n * n - n**3 / 3)


def attention_pairs(queries: int, keys: int, *, causal: bool, window: int | None) -> int:
    """Number of (query, key) pairs that a fused attention kernel computes for one head.

    Args:
      queries: query positions T.
      keys: key positions S; query t sees keys 0..t where causal.
      causal: no key after the query.
      window: keys seen at most, the query's own included; None for all.
    """
    if not causal:
        return queries * keys
    seen = np.minimum(np.arange(1, queries + 1), keys)
    return int(np.minimum(seen, window).sum()) if window else int(seen.sum())


def cudnn_attention(eqn: Any) -> float:
    """FLOPs of jax's cuDNN attention primitives: 2 products forward, 5 backward, per pair.

    cuDNN leaves out blocks that a causal mask or window hides, so only visible pairs count (the
    rest of the blocks on the diagonal, under one block a row, is ignored). The fifth product of the
    backward pass is the recomputed scores.
    """
    q, k, v = (x.aval.shape for x in eqn.invars[:3])
    params = eqn.params
    time, heads = (2, 1) if int(params['layout']) == _LAYOUT_BNTH else (1, 2)
    pairs = attention_pairs(
        q[time],
        k[time],
        causal=_is_causal(params),
        window=params.get('sliding_window_length'),
    )
    per_pair = 3 * q[3] + 2 * v[3] if '_bwd' in eqn.primitive.name else q[3] + v[3]
    return 2.0 * q[0] * q[heads] * pairs * per_pair


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A call of a kernel that states no cost itself.

    Attributes:
      name: the kernel's.
      inputs, outputs: things with shape and dtype.
      params: parameters of the jaxpr's equation.
      pairs: pairs of query and key that the mask allows one head, if the caller told.
    """

    name: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    params: Mapping[str, Any]
    pairs: int | None = None


def splash_attention(call: KernelCall) -> float | None:
    """FLOPs of jax's Splash attention kernels on TPU, of visible pairs as for cuDNN.

    The kernels are 'fwd' (2 products a pair), 'dq' (3), 'dkv' (4) and the fused 'dkv' that gives
    dq as well (5).
    """
    if call.pairs is None:
        return None
    floating = [x.shape for x in call.inputs if _is_floating(x)]
    (*rows, _, dim), values = floating[0], floating[2][-1]  # q, k, v come before other numbers
    per_pair = dim + values
    if '_dq' in call.name:
        per_pair = 2 * dim + values
    elif '_dkv' in call.name:
        per_pair = (2 if len(call.outputs) == 2 else 3) * dim + 2 * values
    return 2.0 * math.prod(rows) * call.pairs * per_pair


def _is_causal(params: Any) -> bool:
    if 'mask_type' in params:
        mask = params['mask_type']
        return int(getattr(mask, 'value', mask)) in _CAUSAL
    return bool(params['use_causal_mask'])  # the float8 primitives


def cumulative(eqn: Any) -> float:
    """One operation an element, for floating-point cumulative sums, products and maxima."""
    return arithmetic(eqn)


def arithmetic(eqn: Any) -> float:
    """One FLOP for each element that a floating-point operation writes (or reduces).

    Of complex numbers a product takes 6 and everything else 2, as a multiply-add takes 8.
    """
    out = eqn.outvars[0].aval
    if not _is_floating(out):
        return 0.0
    size = math.prod(out.shape)
    if eqn.primitive.name.startswith('reduce_'):
        size = math.prod(eqn.invars[0].aval.shape)
    each = 1
    if np.issubdtype(out.dtype, np.complexfloating):
        each = 6 if eqn.primitive.name == 'mul' else 2
    return float(each * size)


PRODUCTS: dict[str, tuple[str, Callable[[Any], float]]] = {
    'dot_general': ('matmul', dot_general),
    'ragged_dot_general': ('matmul', ragged_dot_general),
    'triangular_solve': ('matmul', triangular_solve),
    'cholesky': ('matmul', cholesky),
    'lu': ('matmul', lu),
    'conv_general_dilated': ('conv', conv_general_dilated),
    'fft': ('fft', fft),
    'cumsum': ('scan', cumulative),
    'cumprod': ('scan', cumulative),
    'cummax': ('scan', cumulative),
    'cummin': ('scan', cumulative),
    'cumlogsumexp': ('scan', cumulative),
}

# Elementwise operations that count where they belong to a recurrence, one FLOP each.
ARITHMETIC = frozenset({
    'mul', 'add', 'sub', 'div', 'add_any', 'max', 'min', 'exp', 'exp2', 'log', 'log1p', 'expm1',
    'tanh', 'logistic', 'sqrt', 'rsqrt', 'integer_pow', 'pow', 'square', 'neg', 'reduce_sum',
    'reduce_max',
})  # fmt: skip


def product_of(name: str) -> tuple[str, Callable[[Any], float]] | None:
    """Returns (kind, formula) of a primitive that always counts, or None."""
    if name.startswith('dot_product_attention_'):
        return 'attention', cudnn_attention
    return PRODUCTS.get(name)


def _per_multiply_add(aval: Any) -> float:
    return 8.0 if np.issubdtype(aval.dtype, np.complexfloating) else 2.0


def _is_floating(aval: Any) -> bool:
    # By name: numpy does not know bfloat16 and the float8 types as inexact.
    return any(word in str(getattr(aval, 'dtype', '')) for word in ('float', 'complex'))
