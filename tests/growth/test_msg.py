"""Masked structural growth: nothing changes at mask 0, nothing is hidden at mask 1, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import trees
from effjax.core.errors import ConfigError
from effjax.growth import transform
from effjax.layers.norms import rms_norm
from effjax.training import optimizers

pytestmark = pytest.mark.usefixtures('x64')

# float64 sums of some dozens of terms near 1: measured below 1e-14.
EXACT = 1e-12
SLOT = 'body/segment_0/slot_0'
ci = pytest.mark.ci


def configs(lab, form, norm, width=8, **sizes):
    """A small and a large config, with an eps that counts and that keeps norms exact."""
    model, copied = lab.forms[form], norm == 'layernorm' and form in ('bert', 'albert')
    eps = 1e-2 if copied else 1e-2 * 8 / width
    return [
        lab.config_of({**model, 'norm': {'kind': norm, 'eps': e}}, **s)
        for e, s in ((1e-2, {}), (eps, {'width': width, **sizes}))
    ]


class Grown:
    """Small parameters, large ones, and the latter with all that is new put at noise."""

    def __init__(self, lab, small, large, **kw):
        self.operator = lab.make('msg', **kw)
        self.change = lab.plan_of(small, large, self.operator)
        self.small, self.large = lab.model_of(small), lab.model_of(large)
        self.old = lab.noise(self.small.abstract)
        self.rule = self.operator.bind(self.change, 0)
        self.view = self.operator.view(self.change)
        noise = lab.noise(self.large.abstract, seed=1)

        @jax.jit  # leaf by leaf, each operation would be compiled by itself
        def run(old, noise):
            new = transform(lab.state_of(old), self.change, self.operator)['params']
            is_old = self.first(jax.tree.map(jnp.ones_like, old))
            put = lambda old, x, z: jnp.where(old == 1, x, 7 * z)  # noqa: E731
            return new, is_old, jax.tree.map(put, is_old, new, noise)

        self.new, self.is_old, self.wild = run(self.old, noise)
        self.shown = self.at(self.large.raw_logits)
        expected = trees.flatten(self.large.abstract)
        assert trees.differences(expected, trees.flatten(self.new)) == []

    def first(self, grads):
        """Grown gradients: those of old entries, and zeros."""
        return trees.map_named(lambda n, g: self.rule(self.change.leaves[n], g, 'first'), grads)

    def at(self, f):
        """`run(params, mask)`, jitted: f of what the view shows, and what it shows."""

        def run(params, mask):
            progress = jnp.stack([0.9, mask * self.operator.ramp]).astype(jnp.float32)
            seen = self.view(params, {}, progress)
            return f(seen), seen

        return jax.jit(run)


@pytest.fixture(scope='module')
def grown_to(lab):
    """`run(form, norm, width, sizes) -> Grown`, made once for all tests."""

    @functools.cache
    def make(form, norm, width, sizes):
        return Grown(lab, *configs(lab, form, norm, width, **dict(sizes)))

    return lambda form, norm, width, sizes: make(form, norm, width, tuple(sizes.items()))


LLAMA = {'mixer__heads': 9, 'mixer__kv_heads': 3, 'ffn__hidden': 7}
# Everything at once: width, heads, hidden units and layers.
PLAIN = ('plain', 'rmsnorm', 12, {'mixer__heads': 3, 'ffn__hidden': 13, 'layers': 3})
GPT = ('gpt', 'layernorm', 13, {'mixer__heads': 5, 'ffn__hidden': 25, 'layers': 3})
FORMS = [
    PLAIN,
    GPT,
    pytest.param('llama', 'rmsnorm', 13, {**LLAMA, 'layers': 4}, marks=ci),
    pytest.param('vit', 'layernorm', 11, {'mixer__heads': 3, 'layers': 3}, marks=ci),
    pytest.param('bert', 'rmsnorm', 11, {'mixer__heads': 3}, marks=ci),
    # Norms write to the stream: new units start as copies.
    pytest.param('bert', 'layernorm', 16, {'mixer__heads': 3, 'ffn__hidden': 13}, marks=ci),
    pytest.param('albert', 'layernorm', 24, {'mixer__heads': 4}, marks=ci),
    pytest.param('reversible', 'rmsnorm', 11, {'ffn__hidden': 15, 'layers': 3}, marks=ci),
    # One size alone, the others as they were.
    pytest.param('llama', 'rmsnorm', 8, {'mixer__heads': 6}, marks=ci),
    pytest.param('llama', 'layernorm', 8, {'mixer__heads': 12, 'mixer__kv_heads': 4}, marks=ci),
]


@pytest.mark.parametrize(('form', 'norm', 'width', 'sizes'), FORMS)
def test_nothing_changes_at_mask_0_whatever_is_new(grown_to, form, norm, width, sizes):
    grown = grown_to(form, norm, width, sizes)
    run, wanted = grown.shown, np.asarray(grown.small.logits(grown.old))
    assert np.std(wanted) > 0.1  # it is no constant that was kept
    for params in (grown.new, grown.wild):
        for mask, low, high in ((0.0, 0, EXACT), (0.1, 1e-3, np.inf)):
            assert low <= np.max(np.abs(run(params, mask)[0] - wanted)) < high
    # At mask 1 and after, the model has the parameters as they are.
    for mask in (1.0, 2.5):
        jax.tree.map(np.testing.assert_array_equal, run(grown.wild, mask)[1], grown.wild)


@pytest.mark.parametrize('placement', ['alternate', pytest.param('start', marks=ci)])
def test_new_blocks_anywhere(lab, placement):
    small, large = configs(lab, 'gpt', 'layernorm', layers=5)
    grown = Grown(lab, small, large, placement=placement, layers='random')
    logits = grown.shown(grown.new, 0.0)[0]
    assert np.max(np.abs(logits - np.asarray(grown.small.logits(grown.old)))) < EXACT
    kernel = trees.flatten(grown.new)[f'{SLOT}/ffn/up/kernel']
    assert len({float(layer[0, 0]) for layer in kernel}) == 5  # new ones are drawn, not copied


def test_gradients(grown_to):
    """At mask 0 those of the small model, and none of what is new; above it, all have some."""
    grown = grown_to(*GPT)
    run = jax.jit(jax.grad(lambda params, mask: grown.at(grown.large.loss)(params, mask)[0]))
    wanted = jax.jit(lambda p: grown.first(jax.grad(grown.small.loss)(p)))(grown.old)
    wanted, is_old = trees.flatten(wanted), trees.flatten(grown.is_old)
    for name, g in trees.flatten(run(grown.wild, 0.0)).items():
        np.testing.assert_allclose(g, wanted[name], atol=EXACT, rtol=0, err_msg=name)
    for name, g in trees.flatten(run(grown.wild, 0.5)).items():
        fresh = np.asarray(is_old[name]) == 0
        assert not np.any(fresh) or np.any(np.asarray(g)[fresh]), name


def test_masked_statistics_are_the_papers(grown_to):
    """`RMS(x m) sqrt(sum m / D') m`, and what a part reads is multiplied by the mask."""
    grown = grown_to(*PLAIN)
    seen = trees.flatten(grown.shown(grown.new, 0.25)[1])
    new, m = trees.flatten(grown.new), np.where(np.arange(12) < 8, 1, 0.25)
    x = np.random.default_rng(0).normal(size=12)
    masked = x * m / np.sqrt(np.mean((x * m) ** 2) + 1e-2) * np.sqrt(m.sum() / 12) * m
    found = rms_norm(1e-2, jnp.asarray(x * m), seen['norm/scale'])
    np.testing.assert_allclose(found, masked * new['norm/scale'], atol=EXACT)
    for name, count in (('ffn/down', 12), ('mixer/out', 2)):
        name = f'{SLOT}/{name}/kernel'
        rows = np.asarray(seen[name] / new[name])[:2, ..., :8]  # of old layers
        np.testing.assert_allclose(rows[:, :count], 1, atol=EXACT)
        np.testing.assert_allclose(rows[:, count:], 0.25, atol=EXACT)


def test_new_units_and_their_moments(grown_to):
    grown, name = grown_to(*PLAIN), f'{SLOT}/ffn/up/kernel'
    leaf, up = grown.change.leaves[name], np.asarray(trees.flatten(grown.new)[name])
    units = up[0].T
    assert min(np.abs(a - b).max() for i, a in enumerate(units) for b in units[:i]) > 1e-3
    old = np.asarray(trees.flatten(grown.old)[name])
    np.testing.assert_allclose(up[:2, 8:].std(), np.std(old), rtol=0.3)
    np.testing.assert_array_equal(up[2, :8, :12], old[1])  # the last layer again
    v, *means = jax.jit(lambda x: [grown.rule(leaf, x, k) for k in ('second', 'first', 'step')])(
        old**2
    )
    np.testing.assert_allclose(v[0, 8:, 12:], np.mean(old[0] ** 2))
    np.testing.assert_array_equal(v[2, :8, :12], old[1] ** 2)
    for moment in map(np.array, means):
        np.testing.assert_array_equal(moment[:2, :8, :12], old**2)
        moment[:2, :8, :12] = 0
        assert not np.any(moment)


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'muon'])
def test_the_optimizers_state_has_its_form(lab, grown_to, name):
    grown, options = grown_to(*PLAIN), {'min_factored': 10} if name == 'adafactor' else {}
    before, after = (
        optimizers.build({'kind': name, **options}, meta=lab.built_of(config).meta['params'])
        for config in configs(lab, *PLAIN[:3], **PLAIN[3])
    )

    def run(params):  # shapes will do, nothing is compiled
        state = lab.state_of(params, before.init(params))
        return transform(state, grown.change, grown.operator, optimizer=after)

    out = jax.eval_shape(run, grown.old)
    expected = after.abstract_state(out['params'])
    assert jax.tree.structure(out['optimizer']) == jax.tree.structure(expected)
    assert trees.differences(trees.flatten(expected), trees.flatten(out['optimizer'])) == []


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('kw', 'said'),
    [
        ({'ramp': 0.0}, r"'msg': ramp is a share of the stage in \(0, 1\], got 0.0\."),
        ({'ramp': 1.5}, r'in \(0, 1\], got 1\.5\.'),
        ({'placement': 'top'}, "'msg' places new blocks by 'alternate', 'end' or 'start', not"),
        ({'layers': 'zero'}, "layers must be 'copy' or 'random', got 'zero'"),
    ],
)
def test_arguments(lab, kw, said):
    with pytest.raises(ConfigError, match=said):
        lab.make('msg', **kw)


def test_changes_that_it_cannot_make(lab):
    retnet = {**lab.decoder, 'mixer': {'kind': 'retnet', 'heads': 2}}
    mega = {**lab.decoder, 'mixer': {'kind': 'mega'}}
    wide = {'width': 12, 'mixer__heads': 3}
    for form, sizes, said in (
        (retnet, {'width': 16, 'mixer__heads': 4}, "mixer 'retnet' .* cannot be widened"),
        (mega, {'layers': 3}, f"'msg' cannot silence the mixer 'mega' \\({SLOT}/mixer\\)"),
        (lab.forms['bert'], {'layers': 3}, "'msg' needs blocks that add .* 'postnorm' ones"),
        (lab.forms['bert'], wide, 'the mean .* would not keep; use a width of 16, where'),
        (lab.decoder, wide, r"'msg' to this width needs config\.model\.norm\.eps=6\.66.*e-07 in"),
        (lab.forms['llama'], {'mixer__kv_heads': 4}, 'from 2 to 1 queries a key-value head'),
    ):
        configs = [lab.config_of(form, **s) for s in ({}, sizes)]
        with pytest.raises(ConfigError, match=said):
            lab.plan_of(*configs, lab.make('msg'))
