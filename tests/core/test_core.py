"""Axis names, costs, infos, trees and one-line errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core import axes, command, trees
from effjax.core.cost import Cost, matmul_flops, total
from effjax.core.errors import CheckpointError, ConfigError
from effjax.core.info import SeqInfo


def test_a_parameter_has_a_name_for_each_dimension():
    with pytest.raises(ValueError, match='1 axis names'):
        axes.param(jnp.zeros((2, 3)), ('embed',))
    with pytest.raises(ValueError, match="unknown axis name 'emmbed'"):
        axes.param(jnp.zeros(2), ('emmbed',))


def test_metadata_follows_the_tree():
    class Part(nnx.Module):
        def __init__(self):
            self.w = axes.param(jnp.zeros((2, 3)), ('embed', 'mlp'), lr_scale=0.5)
            self.b = axes.param(jnp.zeros(3), ('mlp',), no_decay=True)

    meta = axes.metadata(nnx.state(Part(), nnx.Param))
    assert meta['w'].axes == ('embed', 'mlp') and meta['w'].lr_scale == 0.5
    assert meta['b'].no_decay and not meta['b'].stacked


def test_costs_add_up_and_repeat():
    one = Cost(matmul=10.0, scan=1.0, params=4, params_used=4, state_bytes=8)
    three = one.times(3)
    assert three.model_flops == 33.0 and three.train_flops == 99.0
    assert (three.params, three.params_used, three.state_bytes) == (12, 12, 24)
    # Shared layers have one copy, but a token still passes each of them.
    assert (one.times(3, shared=True).params, one.times(3, shared=True).params_used) == (4, 12)
    assert total([one, three]).matmul == 40.0
    assert matmul_flops(2, 3, 4) == 48.0


def test_info_folds_its_key_only_where_there_is_one():
    info = SeqInfo.of(2, 3)
    assert info.fold(1) is info
    keyed = SeqInfo.of(2, 3, rng=jax.random.key(0))
    a, b = keyed.fold(1).rng, keyed.fold(2).rng
    assert not jnp.array_equal(jax.random.key_data(a), jax.random.key_data(b))
    assert info.positions.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_strict_names_what_differs():
    want = {'a': jnp.zeros((2, 3)), 'b': {'c': jnp.zeros(4)}}
    assert trees.strict(want, want) is want
    with pytest.raises(CheckpointError) as error:
        trees.strict(want, {'a': jnp.zeros((2, 2)), 'b': {'d': jnp.zeros(4)}})
    text = str(error.value)
    assert 'a is (2, 2), expected (2, 3)' in text
    assert 'b/c (4,) is missing' in text and 'b/d is not expected' in text
    assert trees.count(want) == 10 and trees.nbytes(want) == 40


def test_commands_print_one_line_and_no_traceback(capsys):
    def fail(argv):
        raise ConfigError('line one\nline two.')

    assert command.run_command(fail, []) == 1
    assert capsys.readouterr().err == 'error: line one line two.\n'
    with pytest.raises(ConfigError):
        command.run_command(fail, ['--traceback'])


def test_documents_are_numbered_upwards():
    """Ids that decrease are refused where their values are known, and where they stand is said."""
    place = np.zeros((2, 5), np.int32)
    fine = np.array([[1, 1, 0, 2, 2], [0, 3, 3, 7, 0]])
    for ids in (fine, jnp.asarray(fine), None):
        SeqInfo(place, ids)
    back = np.array([[1, 1, 0, 2, 2], [1, 2, 0, 1, 1]])
    message = (
        'segment_ids decrease along row 1: token 3 is of document 1 behind one of 2; number the '
        'documents of a row upwards from 1'
    )
    for ids in (back, jnp.asarray(back)):
        with pytest.raises(ValueError, match=message):
            SeqInfo(place, ids)
        with pytest.raises(ValueError, match=message):
            SeqInfo.of(2, 5, segment_ids=ids)
    # A compiled function does not know them: there a document's number is all that is compared.
    assert jax.jit(lambda ids: SeqInfo(place, ids).segment_ids)(back).shape == (2, 5)
