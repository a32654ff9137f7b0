"""What operators promise of the function and of its gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import trees
from effjax.growth import OPERATORS, transform
from effjax.growth.change import Slot

pytestmark = pytest.mark.usefixtures('x64')

# float64 sums of some dozens of terms near 1: measured below 1e-14.
EXACT = 1e-12
ci = pytest.mark.ci


def grown(lab, small, large, operator, params=None, **kw):
    """Returns (small parameters, large ones), the latter checked to fit the large model."""
    if params is None:
        params = lab.noise(lab.model_of(small).abstract)
    seed = kw.pop('seed', 0)
    instance = lab.make(operator, **kw)
    change = lab.plan_of(small, large, instance)
    out = transform(lab.state_of(params), change, instance, seed=seed)['params']
    expected = trees.flatten(lab.model_of(large).abstract)
    assert trees.differences(expected, trees.flatten(out)) == []
    return params, out


def gap(lab, small, large, operator, **kw):
    """Returns the largest difference that growth makes to a logit."""
    old, new = grown(lab, small, large, operator, **kw)
    a, b = lab.model_of(small).logits(old), lab.model_of(large).logits(new)
    assert float(jnp.std(a)) > 0.1  # it is no constant that was kept
    return float(jnp.max(jnp.abs(a - b)))


WIDTH = [
    ('net2net', {}),
    ('lemon', {}),
    ('lemon', {'mapping': 'random', 'seed': 1}),
    ('staged', {'repair_symmetry': False}),
    ('staged', {}),
    ('net2net', {'mapping': 'random', 'noise': 0.5, 'seed': 3}),
]


@pytest.mark.parametrize(
    ('form', 'operators'),
    [
        ('plain', WIDTH[4:]),
        ('llama', WIDTH[:4]),
        ('gpt', WIDTH[:2]),
        ('bert', WIDTH[:2]),
        ('vit', WIDTH[:2]),
        pytest.param('llama', WIDTH[4:], marks=ci),
        pytest.param('albert', WIDTH, marks=ci),
        pytest.param('reversible', WIDTH, marks=ci),
        pytest.param('gpt', WIDTH[2:], marks=ci),
        pytest.param('bert', WIDTH[2:], marks=ci),
        pytest.param('vit', WIDTH[2:], marks=ci),
    ],
)
def test_twice_the_width(lab, form, operators):
    small, large = lab.config_of(lab.forms[form]), lab.doubled(lab.forms[form])
    for operator, kw in operators:
        assert lab.make(operator).preserves_function
        assert gap(lab, small, large, operator, **kw) < EXACT, (operator, kw)


def with_norm(lab, form, kind, eps, **sizes):
    return lab.config_of({**lab.forms[form], 'norm': {'kind': kind, 'eps': eps}}, **sizes)


LLAMA = {'mixer__heads': 9, 'mixer__kv_heads': 3, 'ffn__hidden': 7}


@pytest.mark.parametrize(
    ('form', 'norm', 'width', 'sizes'),
    [
        ('plain', 'rmsnorm', 12, {'mixer__heads': 3, 'ffn__hidden': 13}),
        ('plain', 'layernorm', 12, {'mixer__heads': 3, 'ffn__hidden': 13}),
        pytest.param('llama', 'rmsnorm', 13, LLAMA, marks=ci),
        pytest.param('gpt', 'layernorm', 19, {'mixer__heads': 5, 'ffn__hidden': 25}, marks=ci),
        pytest.param('vit', 'layernorm', 11, {'mixer__heads': 3}, marks=ci),
        pytest.param('gpt', 'layernorm', 9, {'ffn__hidden': 13}, marks=ci),
        pytest.param('bert', 'rmsnorm', 11, {'mixer__heads': 3}, marks=ci),
        pytest.param('llama', 'rmsnorm', 21, {'mixer__heads': 6}, marks=ci),
    ],
)
def test_lemon_to_a_width_that_is_no_multiple(lab, form, norm, width, sizes):
    # An eps that counts: with the small model's own the logits change by about 0.1.
    small = with_norm(lab, form, norm, 1e-2)
    large = with_norm(lab, form, norm, 1e-2 * (width // 8 * 8 / width), width=width, **sizes)
    assert gap(lab, small, large, 'lemon') < EXACT


@pytest.mark.parametrize(
    ('operator', 'sizes'),
    [
        ('net2net', {'mixer__heads': 6, 'ffn__hidden': 7}),
        pytest.param('lemon', {'mixer__heads': 6, 'ffn__hidden': 7}, marks=ci),
        pytest.param('staged', {'mixer__heads': 8}, marks=ci),
        pytest.param('net2net', {'mixer__heads': 12, 'mixer__kv_heads': 4}, marks=ci),
    ],
)
def test_one_size_alone(lab, operator, sizes):
    form = lab.forms['llama']
    kw = {'mapping': 'random'} if operator != 'staged' else {}
    assert gap(lab, lab.config_of(form), lab.config_of(form, **sizes), operator, **kw) < EXACT


@pytest.mark.parametrize(
    'form', ['gpt', pytest.param('llama', marks=ci), pytest.param('vit', marks=ci)]
)
def test_identity_blocks_change_nothing(lab, form):
    small, large = (lab.config_of(lab.forms[form], layers=n) for n in (2, 4))
    for placement in ('alternate', 'end', 'start'):
        assert gap(lab, small, large, 'identity', placement=placement) == 0.0


SEGMENTS = [
    {'pattern': [{'mixer': {'kind': 'mamba2', 'head_dim': 4, 'state': 3}, 'ffn': None}, {}]},
    {'pattern': [{'block': 'reversible'}]},
]


def segmented(lab, *repeats):
    segments = [{**s, 'repeat': n} for s, n in zip(SEGMENTS, repeats, strict=True)]
    return lab.config_of({**lab.decoder, 'layers': 0, 'segments': segments})


@ci
@pytest.mark.parametrize('operator', ['identity', 'stack'])
def test_segments_grow_by_themselves(lab, operator):
    small, large = segmented(lab, 1, 1), segmented(lab, 2, 3)
    change = gap(lab, small, large, operator)
    # Mamba-2 keeps states in float32 whatever the inputs: nothing but exact copies would be equal.
    assert (change == 0.0) == (operator == 'identity')


def test_compound_is_exact_where_both_are(lab):
    form = lab.forms['gpt']
    small, large = lab.config_of(form), lab.doubled(form, layers=4)
    arguments = {'depth': 'identity', 'width': 'net2net', 'depth_args': {'placement': 'end'}}
    assert gap(lab, small, large, 'compound', **arguments) < EXACT
    assert lab.make('compound', **arguments).preserves_function
    assert not lab.make('compound').preserves_function


@ci
def test_what_preserves_nothing_says_so(lab):
    form = lab.forms['gpt']
    deep, wide = lab.config_of(form, layers=4), lab.doubled(form)
    wide_and_deep = lab.doubled(form, layers=4)
    for operator, large in (
        *((name, deep) for name in ('stack', 'interpolate', 'append', 'midas', 'ligo')),
        ('aki', wide),
        ('ligo', wide),
        ('compound', wide_and_deep),
    ):
        assert not lab.make(operator).preserves_function
        assert gap(lab, lab.config_of(form), large, operator) > 0.1, operator


ALL = sorted(OPERATORS)


@pytest.mark.parametrize('operator', ALL)
def test_equal_sizes_are_the_identity(lab, operator):
    config = lab.config_of(lab.forms['llama'])
    old, new = grown(lab, config, config, operator)
    jax.tree.map(np.testing.assert_array_equal, old, new)


@pytest.mark.parametrize(
    'operator',
    [name if name in ('net2net', 'stack') else pytest.param(name, marks=ci) for name in ALL],
)
def test_deterministic_in_the_seed(lab, operator):
    form = lab.decoder
    large = {
        **dict.fromkeys(ALL, lab.doubled(form)),
        **dict.fromkeys(
            ('stack', 'interpolate', 'append', 'midas', 'identity'), lab.config_of(form, layers=4)
        ),
        'msg': lab.config_of(form, ffn__hidden=24),
    }[operator]
    kw = {'noise': 0.1} if operator == 'net2net' else {}
    a, b, c = (
        grown(lab, lab.config_of(form), large, operator, seed=seed, **kw)[1] for seed in (1, 1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    same = all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, c)))
    assert same == (operator not in ('net2net', 'staged', 'lemon', 'ligo', 'msg'))


# ---- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('operator', 'old', 'new', 'expected'),
    [
        ('stack', 2, 6, [0, 1, 0, 1, 0, 1]),
        ('interpolate', 2, 6, [0, 0, 0, 1, 1, 1]),
        ('append', 4, 6, [0, 1, 2, 3, 2, 3]),
        ('append', 3, 6, [0, 1, 2, 0, 1, 2]),
        ('midas', 4, 6, [0, 1, 2, 1, 2, 3]),
        ('midas', 5, 7, [0, 1, 2, 1, 2, 3, 4]),
        ('midas', 3, 4, [0, 1, 1, 2]),
        ('identity', 2, 5, [0, 0, 0, 1, 1]),
    ],
)
def test_which_layers_are_copied(lab, operator, old, new, expected):
    slot = Slot('body/segment_0/slot_0', None, old, new)
    np.testing.assert_array_equal(lab.make(operator).sources(slot), expected)


def test_stacking_does_not_preserve_the_function(lab):
    form = lab.forms['gpt']
    assert not lab.make('stack').preserves_function
    assert gap(lab, lab.config_of(form), lab.config_of(form, layers=4), 'stack') > 0.1


def test_a_gradient_reaches_new_blocks_in_the_first_step(lab):
    """A block that is silent because its norms are zero would get none on any matrix."""
    form = lab.forms['gpt']
    large = lab.config_of(form, layers=4)
    _, params = grown(lab, lab.config_of(form), large, 'identity', placement='end')
    grads = trees.flatten(jax.jit(jax.grad(lab.model_of(large).loss))(params))
    values = trees.flatten(params)
    for part in ('mixer/out', 'ffn/down'):
        for leaf in ('kernel', 'bias'):
            name = f'body/segment_0/slot_0/{part}/{leaf}'
            assert not np.any(values[name][2:]) and np.all(np.any(grads[name][2:], axis=-1))


# ---- gradients ---------------------------------------------------------------------------------

TWICE = [
    ('net2net', {}),
    ('net2net', {'mapping': 'random'}),
    ('staged', {'repair_symmetry': False}),
]


@pytest.mark.parametrize(
    'form', ['llama', pytest.param('bert', marks=ci), pytest.param('gpt', marks=ci)]
)
def test_gradients_are_what_first_moments_are_multiplied_by(lab, form):
    small, large = lab.config_of(lab.forms[form]), lab.doubled(lab.forms[form])
    a, b = lab.model_of(small), lab.model_of(large)
    gradients = [jax.jit(jax.grad(m.loss)) for m in (a, b)]
    old = lab.noise(a.abstract)
    grads = gradients[0](old)
    for operator, kw in TWICE:
        _, new = grown(lab, small, large, operator, params=old, **kw)
        instance = lab.make(operator, **kw)
        change = lab.plan_of(small, large, instance)
        rule = instance.bind(change, 0)
        found = trees.flatten(gradients[1](new))
        for name, g in trees.flatten(grads).items():
            leaf = change.leaves[name]
            np.testing.assert_allclose(found[name], rule(leaf, g, 'first'), atol=EXACT, rtol=0)
            np.testing.assert_allclose(
                found[name] ** 2, rule(leaf, g**2, 'second'), atol=EXACT, rtol=0
            )


def test_shares_of_the_gradient_are_those_of_the_published_table(lab):
    """Twice the width: half of the gradient everywhere, the whole of it in the last norm."""
    small, large = lab.config_of(lab.forms['llama']), lab.doubled(lab.forms['llama'])
    instance = lab.make('staged')
    change = lab.plan_of(small, large, instance)
    rule = instance.bind(change, 0)
    for name, leaf in change.leaves.items():
        of_heads = name.endswith(('query_norm/scale', 'key_norm/scale'))
        expected = 1.0 if name == 'norm/scale' or of_heads else 0.5
        for kind, power in (('first', 1), ('second', 2)):
            factor = rule(leaf, jnp.ones(leaf.old), kind)
            np.testing.assert_array_equal(factor, np.full(leaf.new, expected**power))


def test_moments_off_the_diagonal_as_published(lab):
    small, large = lab.config_of(lab.forms['gpt']), lab.doubled(lab.forms['gpt'])
    instance = lab.make('staged', repair_moments=False)
    change = lab.plan_of(small, large, instance)
    leaf = change.leaves['body/segment_0/slot_0/ffn/up/kernel']
    v = np.asarray(instance.bind(change, 0)(leaf, jnp.ones(leaf.old), 'second'))
    np.testing.assert_array_equal(v[0], 0.25 * np.kron(np.eye(2), np.ones((8, 12))))


@ci
def test_unequal_shares_scale_gradients_where_no_norm_is_between(lab):
    form = lab.forms['gpt']
    small, large = lab.config_of(form), lab.config_of(form, mixer__heads=5, ffn__hidden=31)
    a, b = lab.model_of(small), lab.model_of(large)
    old, new = grown(lab, small, large, 'lemon')
    instance = lab.make('lemon')
    change = lab.plan_of(small, large, instance)
    rule = instance.bind(change, 0)
    grads, found = (trees.flatten(jax.jit(jax.grad(m.loss))(p)) for m, p in ((a, old), (b, new)))
    for name, g in grads.items():
        expected = rule(change.leaves[name], g, 'first')
        np.testing.assert_allclose(found[name], expected, atol=EXACT, rtol=0)
