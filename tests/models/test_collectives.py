"""What each kind of parallelism sends, read from the compiled program."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from effjax import models, parallel
from effjax.core import config as config_lib
from effjax.core import trees
from effjax.core.info import SeqInfo

ROWS, LENGTH = 8, 16
KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


def make(layers: int, **mesh: int):
    """Returns (built, mesh, forward) of a decoder whose every dimension the mesh divides."""
    config = config_lib.defaults()
    config.update(steps=1, batch_size=ROWS, seq_len=LENGTH)
    config.model = {
        'kind': 'decoder', 'vocab_size': 256, 'width': 32, 'layers': layers, 'tied': False,
        'mixer': {'kind': 'attention', 'heads': 4}, 'ffn': {'kind': 'swiglu', 'hidden': 64},
    }  # fmt: skip
    config.precision.kind = 'fp32'
    config.execution.layers = 'unroll'
    config.mesh.update({'data': 1, **mesh})
    made = parallel.make_mesh(config.mesh)
    built = models.build(config, mesh=made)

    def forward(params, tokens):
        model = models.merge(built.graphdef, {'params': params, 'buffers': {}})
        return model(tokens, SeqInfo.of(ROWS, LENGTH))[0]

    return built, made, forward


def compiled(f, built, mesh, out) -> str:
    rows = parallel.batch_sharding(mesh)
    params = built.shardings['params']
    with parallel.mesh_context(mesh, built.rules):
        jitted = jax.jit(f, in_shardings=(params, rows), out_shardings=out(params, rows))
        tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
        return jitted.lower(built.abstract_state['params'], tokens).compile().as_text()


def collectives(text: str) -> dict[str, list[int]]:
    """Returns kind -> bytes of the results of each such instruction on one device."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for line in text.splitlines():
        match = re.search(r'= (.*?) (' + '|'.join(KINDS) + r')(?:-start)?\(', line)
        if match:
            shapes = re.findall(r'(?:f32|s32)\[([\d,]*)\]', match[1])
            sizes = [4 * math.prod(int(n) for n in s.split(',') if n) for s in shapes]
            found[match[2]].append(sum(sizes))
    return found


@pytest.mark.mesh
@pytest.mark.parametrize('layers', [1, 3])
def test_tensor_parallel_adds_up_once_a_sub_block(layers):
    built, mesh, forward = make(layers, tensor=4)
    found = collectives(compiled(forward, built, mesh, lambda params, rows: rows))
    # Megatron's count: after attention's output and after the feed-forward part of each layer,
    # and one for the look-up in the sharded vocabulary.
    assert len(found['all-reduce']) == 2 * layers + 1
    assert set(found['all-reduce']) == {ROWS * LENGTH * 32 * 4}
    assert not any(found[kind] for kind in KINDS[1:])
    query = built.shardings['params']['body']['segment_0']['slot_0']['mixer']['query']['kernel']
    assert query.shard_shape((layers, 32, 4, 8)) == (layers, 32, 1, 8)  # heads are sharded


@pytest.mark.mesh
def test_fsdp_gathers_each_parameter_once_and_holds_an_eighth():
    built, mesh, forward = make(2, fsdp=8)
    found = collectives(compiled(forward, built, mesh, lambda params, rows: rows))
    abstract = built.abstract_state['params']
    # The blocks and the norm once each. The table of the embedding is not gathered: XLA sends the
    # token ids to its shards instead. The head is not part of this forward pass.
    gathered = trees.nbytes({k: abstract[k] for k in ('body', 'norm')})
    assert sum(found['all-gather']) == gathered + ROWS * LENGTH * 4
    assert not found['all-reduce']
    held = sum(
        4 * math.prod(s.shard_shape(x.shape))
        for x, s in zip(
            jax.tree.leaves(abstract), jax.tree.leaves(built.shardings['params']), strict=True
        )
    )
    assert held == trees.nbytes(abstract) // 8


@pytest.mark.mesh
def test_data_parallel_sends_each_gradient_once():
    built, mesh, forward = make(2, data=8)

    def grad(params, tokens):
        return jax.grad(lambda p: jnp.sum(jnp.square(forward(p, tokens))))(params)

    forward_only = collectives(compiled(forward, built, mesh, lambda params, rows: rows))
    assert not any(forward_only.values())
    found = collectives(compiled(grad, built, mesh, lambda params, rows: params))
    abstract = built.abstract_state['params']
    # The head has no gradient here: nothing of it is sent.
    sent = trees.nbytes({k: v for k, v in abstract.items() if k != 'head'})
    assert sum(found['all-reduce']) == sent
    assert not any(found[kind] for kind in KINDS[1:])
