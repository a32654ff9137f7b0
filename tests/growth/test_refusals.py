"""What growth refuses: one sentence each, before any array is touched."""

import re

import jax.numpy as jnp
import optax
import pytest

from effjax.core.errors import ConfigError
from effjax.growth import grow

SLOT = 'body/segment_0/slot_0'


def refused(lab, small, large, operator, **kw):
    """Returns the sentence of the refusal."""
    with pytest.raises(ConfigError) as e:
        lab.plan_of(small, large, lab.make(operator, **kw))
    assert str(e.value).endswith('.')
    return str(e.value)


@pytest.fixture
def sentence(lab):
    """`sentence(sizes, operator, small={}, form='decoder', **kw) -> the refusal`."""

    def run(sizes, operator, small=None, form=None, **kw):
        model = form or lab.decoder
        return refused(
            lab,
            lab.config_of(model, **(small or {})),
            lab.config_of(model, **sizes),
            operator,
            **kw,
        )

    return run


@pytest.mark.parametrize(
    ('operator', 'sizes', 'said'),
    [
        (
            'stack',
            {'layers': 1},
            'growth goes from small to large, but the number of layers goes from 2 to 1',
        ),
        (
            'net2net',
            {'width': 4, 'mixer__heads': 1},
            'growth goes from small to large, but config.model.width goes from 8 to 4',
        ),
        (
            'stack',
            {'layers': 5},
            f"'stack' multiplies layers, but {SLOT} goes from 2 to 5, no multiple; use 4, or "
            "'append', 'midas' or 'identity'.",
        ),
        (
            'append',
            {'layers': 5},
            f"'append' copies each layer at most once, but {SLOT} goes from 2 to 5 layers; grow to "
            "4 first, or use 'stack' or 'identity'.",
        ),
        ('ligo', {'layers': 3}, f"'ligo' starts from a multiple of layers, but {SLOT} goes from"),
        (
            'stack',
            {'width': 16, 'mixer__heads': 4},
            "'stack' grows depth only, but config.model.width goes from 8 to 16; use 'compound' or "
            "'ligo', or grow in two transitions.",
        ),
        (
            'net2net',
            {'layers': 4},
            f"'net2net' grows width only, but {SLOT} goes from 2 to 4 layers; use 'compound' or "
            "'ligo', or grow in two transitions.",
        ),
        (
            'net2net',
            {'width': 12, 'mixer__heads': 3},
            "'net2net' copies every unit that a norm reads equally often, but the width goes from "
            "8 to 12, no multiple, which would change its statistics; use 'lemon', or a width of "
            '16.',
        ),
        (
            'staged',
            {'width': 24, 'mixer__heads': 6},
            "'staged' doubles sizes, but embed goes from 8 to 24; use 16, or 'net2net' or 'lemon'.",
        ),
        (
            'net2net',
            {'width': 16},
            f"mixer 'attention' ({SLOT}/mixer): head_dim goes from 4 to 8, but growth adds heads "
            'of the same size, which keeps the scale of scores; set head_dim to 4 and raise heads.',
        ),
        (
            'lemon',
            {'width': 12, 'mixer__heads': 3},
            "'lemon' to this width needs config.model.norm.eps=6.666666666666666e-07 in the large "
            'config (0.666667 of the small one), but the norm',
        ),
        (
            'stack',
            {'mixer__soft_cap': 3.0},
            'config.model.mixer.soft_cap is None in the small model and 3.0 in the large one: '
            'growth changes sizes (head_dim, heads, hidden, kv_heads, layers, repeat, width) and '
            'nothing else; make them equal.',
        ),
        (
            'stack',
            {'norm': {'kind': 'rmsnorm', 'eps': 1e-3}},
            'has eps 1e-06 in the small model and 0.001 in the large one; set '
            'config.model.norm.eps to 1e-06.',
        ),
        (
            'net2net',
            {'width': 16, 'mixer__heads': 4, 'embed_scale': 4.0},
            'config.model.embed_scale is 1 in the small model and 4 in the large one (0 means the '
            'root of the width); set it to 1 in both.',
        ),
    ],
)
def test_sizes(sentence, operator, sizes, said):
    assert said in sentence(sizes, operator)


def test_another_architecture(lab):
    small = lab.config_of(lab.decoder)
    for other, key in (
        ({**lab.decoder, 'block': 'parallel'}, 'block'),
        ({**lab.decoder, 'kind': 'encoder'}, 'kind'),
        ({**lab.decoder, 'mixer': {'kind': 'retnet', 'heads': 2}}, 'mixer.kind'),
        ({**lab.decoder, 'layers': 0, 'segments': [{'pattern': [{}], 'repeat': 4}]}, 'segments'),
    ):
        assert f'config.model.{key} is ' in refused(lab, small, lab.config_of(other), 'stack')
    # A default that is written out is no difference.
    written = {**lab.decoder, 'block': 'sequential', 'norm': {'kind': 'rmsnorm', 'eps': 1e-6}}
    lab.plan_of(small, lab.config_of(written, layers=4), lab.make('stack'))


def test_parts_that_cannot_be_widened(lab, sentence):
    retnet = {**lab.decoder, 'mixer': {'kind': 'retnet', 'heads': 2}}
    wide = {'width': 16, 'mixer__heads': 4, 'ffn__hidden': 24}
    said = sentence(wide, 'net2net', form=retnet)
    assert said.startswith(f"mixer 'retnet' ({SLOT}/mixer) cannot be widened: its growth_spec does")
    assert said.endswith("grow its depth instead ('stack', 'identity'), which every part can.")
    # Its feed-forward part can, and its depth.
    configs = [lab.config_of(retnet, **sizes) for sizes in ({}, {'ffn__hidden': 24, 'layers': 4})]
    lab.plan_of(*configs, lab.make('compound', depth='identity'))
    sinusoidal = {**lab.decoder, 'positions': {'kind': 'sinusoidal'}}
    wide = {'width': 16, 'mixer__heads': 4}
    assert "positions 'sinusoidal' cannot be widened" in sentence(wide, 'lemon', form=sinusoidal)
    said = sentence(wide, 'staged', form={**lab.decoder, 'final_norm': False})
    assert 'a tied head without a norm before it cannot be widened' in said
    globals_ = {
        **lab.decoder, 'kind': 'encoder', 'globals': {'tokens': 2},
        'mixer': {'kind': 'etc', 'heads': 2, 'radius': 1},
    }  # fmt: skip
    assert "mixer 'etc'" in sentence(wide, 'net2net', form=globals_)


def test_blocks_that_cannot_be_silent(lab, sentence):
    bert = lab.forms['bert']
    assert "'postnorm' ones (body/segment_0/slot_0) do not pass it on unchanged" in sentence(
        {'layers': 3}, 'identity', form=bert
    )
    mega = {**lab.decoder, 'mixer': {'kind': 'mega'}}
    assert "'identity' cannot silence the mixer 'mega'" in sentence(
        {'layers': 3}, 'identity', form=mega
    )


def test_means_that_would_not_stay(lab, sentence):
    wide = {'width': 12, 'mixer__heads': 3}
    said = sentence(wide, 'lemon', form=lab.forms['bert'])
    assert said.startswith(
        "'lemon' fills a width that is no multiple (8 to 12) with the mean under"
    )
    assert said.endswith("would not keep; use a width of 16, or norm 'rmsnorm'.")


def test_what_is_no_width(sentence, lab):
    form = {**lab.decoder, 'positions': {'kind': 'learned'}}
    assert sentence({'max_len': 12}, 'net2net', form=form) == (
        "positions/table goes from 6 to 12 along 'position': growth widens embed, heads, kv_heads, "
        'mlp only; keep config.model.max_len or the image size the same.'
    )


def test_grouped_queries_keep_their_keys(lab, sentence):
    form = lab.forms['llama']
    said = sentence({'mixer__kv_heads': 4}, 'net2net', form=form)
    assert 'goes from 2 to 1 queries a key-value head' in said


def test_names_and_arguments(lab):
    config = lab.config_of(lab.decoder)
    state = lab.state_of(lab.noise(lab.built_of(config).abstract_state['params'], jnp.float32))
    for arguments, said in (
        ({'operator': 'stak'}, "unknown growth operator 'stak'; known: .* Did you mean 'stack'?"),
        ({'operator': 'net2net', 'noize': 1.0}, "takes no 'noize'.* Did you mean 'noise'?"),
        ({'operator': 'net2net', 'noise': -1.0}, 'noise must not be negative, got -1.0'),
        ({'operator': 'net2net', 'mapping': 'x'}, "grow.mapping: expected .* got 'x'"),
        ({'operator': 'compound', 'depth': 'stac'}, "unknown operator on depth 'stac'"),
        ({'operator': 'compound', 'width_args': {'x': 1}}, "width_args.x: .* takes no 'x'"),
        ({'operator': 'stack', 'moments': 'x'}, "moments must be 'grow' or 'reset', got 'x'"),
        ({'operator': 'stack', 'counts': 'x'}, "counts must be 'keep' or 'reset', got 'x'"),
    ):
        operator = arguments.pop('operator')
        with pytest.raises(ConfigError, match=said.replace('?', re.escape('?'))):
            grow(state, config, config, operator, **arguments)


def test_states_that_do_not_fit(lab):
    small, large = (lab.config_of(lab.decoder, layers=n) for n in (2, 4))
    params = lab.noise(lab.built_of(large).abstract_state['params'], jnp.float32)
    with pytest.raises(ConfigError, match='the state is not of the small config: .* is .4, 12, 8.'):
        grow(lab.state_of(params), small, large, 'stack')
    params = lab.noise(lab.built_of(small).abstract_state['params'], jnp.float32)
    with pytest.raises(ConfigError, match="give grow the large run's optimizer"):
        grow(lab.state_of(params, {'mu': params}), small, large, 'stack')
    optimizer = optax.adam(1.0)
    with pytest.raises(ConfigError, match="the large run's optimizer keeps another state"):
        grow(lab.state_of(params, {'mu': params}), small, large, 'stack', optimizer=optimizer)
    other = {**large, 'precision': {'kind': 'bf16_params'}}
    with pytest.raises(ConfigError, match='config.precision makes .* float32 in the small model'):
        grow(lab.state_of(params), small, other, 'stack')
