"""Distillation: its formula, its schedule, what stays still, and microbatches."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effjax import models
from effjax.core import config as config_lib
from effjax.core.axes import Buffer, param
from effjax.core.errors import ConfigError
from effjax.tasks import TASKS
from effjax.tasks.distillation import Distillation
from effjax.training import step

EXECUTION = {'loss_chunks': 2}
VOCAB, RUN = 11, {'run': 'runs/teacher', 'charge': False}


class Table(nnx.Module):
    """Hidden vectors from a table; a head of its own."""

    soft_cap, vocab_size = None, VOCAB

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.embed_width = width
        self.table = param(jax.random.normal(rngs.params(), (VOCAB, width)), ('vocab', 'embed'))
        self.head = param(jax.random.normal(rngs.params(), (width, VOCAB)), ('embed', 'vocab'))

    def __call__(self, tokens, info):
        return self.table[...][tokens], {}

    def head_weight(self):
        return self.head[...]


class Sgd:
    def init(self, params):
        return optax.EmptyState()

    def update(self, grads, state, params, lr):
        return jax.tree.map(lambda g: -lr * g, grads), state


def parts(width: int, seed: int):
    """Returns (module, graphdef, its arrays)."""
    model = Table(width, nnx.Rngs(seed))
    graphdef, params, buffers = nnx.split(model, nnx.Param, Buffer)
    arrays = {'params': nnx.to_pure_dict(params), 'buffers': nnx.to_pure_dict(buffers)}
    return model, graphdef, arrays


def batch_of(rows=4, length=5):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (rows, length + 1))
    return {
        'tokens': jnp.asarray(tokens[:, :-1]),
        'targets': jnp.asarray(tokens[:, 1:]),
        'weights': jnp.asarray(rng.integers(0, 2, (rows, length)), jnp.float32),
        'positions': jnp.zeros((rows, length), jnp.int32),
    }


def setting(width=4, teacher_width=6, **options):
    """Returns (student's graphdef, task with its teacher, train state)."""
    student, graphdef, arrays = parts(width, 0)
    teacher, teacher_graphdef, frozen = parts(teacher_width, 1)
    task = Distillation(EXECUTION, teacher=RUN, **options)
    task = task.taught(student, types.SimpleNamespace(graphdef=teacher_graphdef, model=teacher))
    state = {
        **arrays,
        'frozen': {'teacher': frozen},
        'optimizer': Sgd().init(None),
        'ema': {},
        'loss_scale': {},
        'step': jnp.int32(0),
        'stage': jnp.int32(0),
    }
    return graphdef, task, state


def loss_of(task, graphdef, state, progress):
    batch = batch_of()
    objective = task.given(state['frozen'], jnp.asarray(progress))
    model = nnx.merge(graphdef, state['params'], state['buffers'])
    return objective.loss(model, batch, objective.info(batch, None, True))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_formula():
    """Against NumPy in float64: targets, softened divergence, hidden states, at half of `until`."""
    options = {'alpha': 0.8, 'temperature': 2.0, 'until': 0.5, 'hidden': 0.3}
    graphdef, task, state = setting(6, 6, **options)
    loss, weight, aux = loss_of(task, graphdef, state, (0.25, 1.0))
    batch, weights = batch_of(), np.asarray(batch_of()['weights'], np.float64)

    def outputs(arrays):
        table, head = (np.asarray(arrays['params'][k], np.float64) for k in ('table', 'head'))
        hidden = table[batch['tokens']]
        return hidden, hidden @ head

    (hidden, logits), (theirs, teachers) = outputs(state), outputs(state['frozen']['teacher'])
    p = np.take_along_axis(softmax(logits), np.asarray(batch['targets'])[..., None], -1)[..., 0]
    hard = np.sum(-np.log(p) * weights)
    q, p = softmax(teachers / 2.0), softmax(logits / 2.0)
    soft = np.sum(np.sum(q * (np.log(q) - np.log(p)), -1) * weights)
    apart = np.sum(np.mean((hidden - theirs) ** 2, -1) * weights)
    np.testing.assert_allclose(loss, 0.6 * hard + 0.4 * (4 * soft + 0.3 * apart), rtol=1e-5)
    assert weight == weights.sum()
    for name, value in (('task_loss', hard), ('divergence', soft), ('hidden_distance', apart)):
        np.testing.assert_allclose(aux[name][0], value, rtol=1e-5)


@pytest.mark.parametrize(
    ('until', 'done', 'alpha'),
    [(0.0, 0.9, 0.8), (1.0, 0.25, 0.6), (0.5, 0.25, 0.4), (0.5, 0.5, 0.0), (0.5, 0.7, 0.0)],
)
def test_alpha_falls_linearly_over_its_share_of_the_run(until, done, alpha):
    graphdef, task, state = setting(alpha=0.8, until=until)
    _, weight, aux = loss_of(task, graphdef, state, (done, 0.0))
    np.testing.assert_allclose(aux['alpha'][0] / weight, alpha, rtol=1e-6)
    # On the host: a teacher that is of no use is not asked again.
    assert (task.at((done, 0.0)) is task.inner) == (alpha == 0)


def test_without_alpha_there_is_the_task():
    _, task, _ = setting(alpha=0.0)
    assert task.at((0.0, 0.0)) is task.inner
    _, task, _ = setting(alpha=0.5)
    assert task.at((1.0, 1.0)) is task


def test_the_teacher_stays_as_it_is_and_moves_the_student():
    graphdef, task, state = setting(alpha=1.0)
    update = jax.jit(step.make_train_step(graphdef, task, Sgd()))
    new, metrics = update(state, batch_of(), jnp.float32(0.5), jnp.uint32(0), jnp.ones(2))
    chex.assert_trees_all_equal(new['frozen'], state['frozen'])
    for _ in range(50):
        new, last = update(new, batch_of(), jnp.float32(0.5), jnp.uint32(0), jnp.ones(2))
    assert last['divergence'] < 0.5 * metrics['divergence'] and metrics['alpha'] == 1.0
    chex.assert_trees_all_equal(new['frozen'], state['frozen'])

    def of_teacher(frozen):
        return loss_of(task, graphdef, {**state, 'frozen': frozen}, (0.0, 0.0))[0]

    for gradient in jax.tree.leaves(jax.grad(of_teacher)(state['frozen'])):
        assert not np.any(gradient)


def test_microbatches_equal_one_batch():
    """Their weights are unequal."""
    graphdef, task, state = setting(alpha=0.5, temperature=3.0, until=1.0)
    args = (state, batch_of(), jnp.float32(0.1), jnp.uint32(0), jnp.full(2, 0.4))
    one, two = (
        jax.jit(step.make_train_step(graphdef, task, Sgd(), accumulate=n))(*args) for n in (1, 2)
    )
    chex.assert_trees_all_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['masked_lm', 'classification'])
def test_a_teacher_that_is_the_student_agrees_with_it(kind):
    """Of hidden tokens: both sides see the same ones hidden."""
    config = config_lib.defaults()
    config.steps, config.seq_len, config.precision.kind = 1, 16, 'fp32'
    common = {
        'width': 8, 'layers': 1, 'mixer': {'kind': 'attention', 'heads': 1},
        'ffn': {'kind': 'gelu', 'hidden': 8},
    }  # fmt: skip
    draw = np.random.default_rng(0)
    if kind == 'masked_lm':
        config.model = {'kind': 'encoder', 'vocab_size': VOCAB, **common}
        batch = {
            'tokens': jnp.asarray(draw.integers(0, VOCAB, (2, 16)), jnp.int32),
            'weights': jnp.ones((2, 16)),
            'positions': jnp.tile(jnp.arange(16), (2, 1)),
        }
    else:
        image = {'image_size': 4, 'channels': 1, 'classes': 3, 'patch': 2}
        config.model = {'kind': 'vit', **image, **common}
        batch = {
            'image': jnp.asarray(draw.normal(size=(2, 4, 4, 1)), jnp.float32),
            'label': jnp.asarray([0, 2]),
            'weights': jnp.ones(2),
        }
    built = models.build(config)
    arrays = models.init_params(built, jax.random.key(0))
    arrays = jax.tree.map(lambda x: x + 0.1, arrays)  # a classifier's head starts at zero
    task = Distillation(EXECUTION, task={'kind': kind}, teacher=RUN).taught(built.model, built)
    objective = task.given({'teacher': arrays}, jnp.zeros(2))

    def loss(arrays):
        model = models.merge(built.graphdef, arrays)
        info = objective.info(batch, jax.random.key(1), True)
        loss, weight, aux = objective.loss(model, batch, info)
        return loss / weight, aux

    found, aux = jax.jit(loss)(arrays)
    assert abs(aux['divergence'][0]) < 1e-5
    np.testing.assert_allclose(found, 0.5 * aux['task_loss'][0] / aux['task_loss'][1], rtol=1e-4)
    cost = task.frozen_cost(2, 16)['teacher'].model_flops
    assert cost == sum(c.model_flops for c in task.cost(built.model, 2, 16).values())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'alpha': 1.5}, r'config\.task\.alpha must be in \[0, 1\], got 1\.5'),
        ({'until': -0.1}, r'config\.task\.until must be in \[0, 1\]'),
        ({'temperature': 0.0}, 'temperature must be above 0, got 0'),
        ({'hidden': -1.0}, 'hidden must not be negative'),
        ({'teacher': {'run': 'x'}}, 'charge must say whether the training of the teacher counts'),
        ({'teacher': {'charge': True}}, 'run must name the folder of a finished run'),
        ({'teacher': {**RUN, 'charged': 1}}, "not 'charged'. Did you mean 'charge'"),
        ({'task': {'kind': 'recall'}}, "kind 'recall' does not give the predictions"),
        ({'task': {'kind': 'distillation'}}, "kind 'distillation' does not give the predictions"),
        ({'task': {'kind': 'next'}}, "unknown task 'next' at config.task.task.kind"),
        ({'task': {'kind': 'classification'}, 'hidden': 1.0}, 'gives its logits only'),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(EXECUTION, **{'teacher': RUN, **options})


def test_hidden_states_need_one_width():
    with pytest.raises(ConfigError, match='the student has 4 and the teacher 6; set it to 0'):
        setting(4, 6, hidden=1.0)
    assert 'distillation' in TASKS
