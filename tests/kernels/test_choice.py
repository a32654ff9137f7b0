"""Which implementation ran, and why the others did not."""

import jax
import jax.numpy as jnp
import pytest

from effjax import kernels
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


def test_short_rows_are_no_work_for_kernels():
    """Decoding steps through one token at a time; asked for by name a kernel still takes it."""
    x, a = jnp.ones((64, 1, 256)), jnp.zeros((256, 4))
    k, n = jnp.ones((2, 1, 2, 64), jnp.bfloat16), jnp.ones((64, 1, 4))
    calls = {
        'linear_recurrence': lambda **kw: kernels.linear_recurrence(k, k, k, **kw),
        'diagonal_scan': lambda **kw: kernels.diagonal_scan(x, -x, **kw),
        'selective_scan': lambda **kw: kernels.selective_scan(x, x, a, n, n, **kw),
    }
    for platform in ('gpu', 'tpu'):
        with kernels.target(platform):
            for op, call in calls.items():
                jax.eval_shape(lambda call=call: call())
                chosen = kernels.last_choice(op)
                assert chosen['implementation'] == 'xla'
                assert 'fewer than 16 tokens' in chosen['refused'][f'pallas_{platform}']
                jax.eval_shape(lambda call=call: call(implementation=f'pallas_{platform}'))  # noqa: B023
                assert kernels.last_choice(op)['implementation'] == f'pallas_{platform}'
