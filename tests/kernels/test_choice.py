"""Which implementation ran, and why the others did not."""

import jax
import pytest

from effjax.kernels import choice


def test_takes_the_first_that_does_not_refuse_and_says_why():
    refusals = {'fast': 'it needs a GPU', 'plain': None, 'reference': None}
    assert choice.pick('op', None, refusals, {'plain': 'dense'}, shape=(2,)) == 'plain'
    assert choice.last_choice() == {
        'op': 'op',
        'implementation': 'plain',
        'form': 'dense',
        'refused': {'fast': 'it needs a GPU'},
        'shape': (2,),
    }
    assert choice.pick('op', 'reference', refusals) == 'reference'
    assert choice.last_choice('op')['implementation'] == 'reference'
    assert [c['implementation'] for c in choice.choices()['op']] == ['plain', 'reference']
    assert choice.last_choice('never') == {}


def test_naming_one_that_cannot_run_says_why_and_what_can():
    refusals = {'fast': 'it needs a GPU', 'plain': None}
    with pytest.raises(ValueError, match=r"^op cannot run as 'fast': it needs a GPU; use 'plain'"):
        choice.pick('op', 'fast', refusals)
    with pytest.raises(ValueError, match=r"op has no implementation 'fats'; it has fast, plain"):
        choice.pick('op', 'fats', refusals)


def test_a_target_replaces_the_platform():
    assert choice.platform() == jax.default_backend()
    with choice.target('tpu'):
        assert choice.platform() == 'tpu'
    assert choice.platform() == jax.default_backend()
