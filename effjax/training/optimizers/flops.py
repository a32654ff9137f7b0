"""Counts the arithmetic of an optimizer's update from its jaxpr."""

import math
from typing import Any

# fmt: off
_ELEMENTWISE = frozenset({
    'abs', 'add', 'add_any', 'cbrt', 'clamp', 'div', 'exp', 'exp2', 'expm1', 'integer_pow', 'log',
    'log1p', 'max', 'min', 'mul', 'neg', 'pow', 'rem', 'rsqrt', 'sign', 'sqrt', 'square', 'sub',
    'tanh',
})
# fmt: on
_REDUCTIONS = frozenset({'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod'})


def arithmetic(jaxpr: Any) -> float:
    """Returns a jaxpr's arithmetic: products 2 m n k, the rest 1 an element.

    The convention is that of `Optimizer.flops`. Scalars are not counted; a scan counts its body
    times its length.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        shape = eqn.outvars[0].aval.shape if eqn.outvars else ()
        if name == 'dot_general':
            (inner, _), _ = eqn.params['dimension_numbers']
            lhs = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(shape) * math.prod(lhs[i] for i in inner)
        elif name in _ELEMENTWISE and shape:
            total += math.prod(shape)
        elif name in _REDUCTIONS:
            total += math.prod(eqn.invars[0].aval.shape)
        else:
            repeats = eqn.params.get('length', 1) if name == 'scan' else 1
            total += repeats * sum(arithmetic(inner) for inner in _inner(eqn.params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    out = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, 'jaxpr', item)
            if hasattr(item, 'eqns'):
                out.append(item)
    return out
