"""What the tests of mixers share: calls and steps run as programs, as they do in training."""

import functools
from collections.abc import Callable, Iterator

import jax
import pytest
from flax import nnx

from effjax.core.registry import lookup
from effjax.layers.mixers import MIXERS


@pytest.fixture(scope='module', autouse=True)
def _whole_programs() -> Iterator[None]:
    """A mixer called outside `jit` is compiled as one program.

    Operation by operation, each would be compiled by itself, which took most of these tests' time.
    """
    classes = [lookup(MIXERS, kind, 'mixer') for kind in MIXERS]
    with pytest.MonkeyPatch.context() as patch:
        for component in classes:
            for name in ('__call__', 'step'):
                patch.setattr(component, name, _compiled(getattr(component, name)))
        yield


def _compiled(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self, *args, **kw):
        graphdef, arrays = nnx.split(self)
        static = {k: v for k, v in kw.items() if isinstance(v, bool)}
        traced = {k: v for k, v in kw.items() if k not in static}
        leaves = jax.tree.leaves((arrays, args, traced))
        if any(isinstance(x, jax.core.Tracer) or callable(x) for x in leaves):
            return method(self, *args, **kw)  # a part of a program, or with a part replaced

        # A program of its own for each call: tests change constants that no cache would notice.
        def program(arrays, args, traced):
            return method(nnx.merge(graphdef, arrays), *args, **traced, **static)

        return jax.jit(program)(arrays, args, traced)

    return call
