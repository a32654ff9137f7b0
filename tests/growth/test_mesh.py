"""A sharded state grows to what a state on one device grows to."""

import jax
import numpy as np
import pytest

from effjax import models
from effjax.core import trees
from effjax.growth import grow
from effjax.training import optimizers
from effjax.training import state as state_lib


@pytest.mark.mesh
@pytest.mark.parametrize(
    ('operator', 'sizes', 'kw'),
    [
        ('stack', {'layers': 4}, {}),
        ('identity', {'layers': 4}, {}),
        ('staged', None, {}),
        ('lemon', None, {}),
        ('ligo', None, {'moments': 'reset'}),
        ('msg', {'ffn__hidden': 16, 'layers': 4}, {}),
    ],
)
def test_same_result_on_a_mesh(lab, operator, sizes, kw):
    form = lab.forms['llama']
    small = lab.config_of(form)
    large = lab.doubled(form) if sizes is None else lab.config_of(form, **sizes)
    results = []
    for mesh in ({'data': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}):
        configs = [{**c, 'mesh': {**c['mesh'], **mesh}} for c in (small, large)]
        # The plain state lives on one device of the eight.
        results.append(_grown(lab, configs, operator, kw, sharded=len(mesh) > 1))
    wanted, found = results
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
    for (name, a), b in zip(trees.flatten(wanted).items(), jax.tree.leaves(found), strict=True):
        # Sums over a sharded dimension may come in another order.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=name)


def _grown(lab, configs, operator, kw, sharded):
    from effjax import parallel

    devices = None if sharded else jax.devices()[:1]
    meshes = [parallel.make_mesh(c['mesh'], devices) for c in configs]
    built = [models.build(c, mesh=m) for c, m in zip(configs, meshes, strict=True)]
    chosen = [optimizers.build({'kind': 'adamw'}, meta=b.meta['params']) for b in built]
    abstract = [state_lib.abstract(b, o, None, True) for b, o in zip(built, chosen, strict=True)]
    places = [
        state_lib.shardings(*parts) for parts in zip(built, chosen, abstract, meshes, strict=True)
    ]
    state = jax.device_put(lab.noise(abstract[0], np.float32), places[0])
    run = jax.jit(
        lambda s: grow(s, *configs, operator, optimizer=chosen[1], **kw), out_shardings=places[1]
    )
    with jax.set_mesh(meshes[1]):
        return run(state)
