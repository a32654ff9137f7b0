"""The peer for recurrent models in JAX: jax-linear-attention's models and Mosaic GPU kernels.

GLA and Mamba-2 are its own `jla.models`, unrolled, without rematerialisation and with its lean
gradients. Its kernels take heads of at most 128 by 128, so GLA's values of 256 channels are two
heads that share queries, keys and decays (their norms then are over 128 channels, not 256). It has
no RetNet: that one is its decoder with the mixer of `jla_retention`, made of its parts.

    python -m experiments.benchmarks.train_step.peers.jla --shape=retnet_380m --steps=10

Needs one Hopper GPU and the packages jax-linear-attention (read at 0.1.0, which wants jax 0.11.2)
and equinox. AdamW from optax, timed as `plain_jax` is.
"""

import argparse
import json
import math
import sys

import jax

from experiments.benchmarks.train_step.peers.plain_jax import time_steps
from experiments.benchmarks.train_step.shapes import CONV, RANK, SHAPES, STATE, Shape, having

MIXERS = ('retnet', 'gla', 'mamba2')


def config_of(shape: Shape):
    """Returns jla's config of a shape; a RetNet's mixers are placeholders, see `build`."""
    from jla.models.config import AttentionConfig, LinearAttentionConfig, ModelConfig, SSMConfig

    from experiments.benchmarks.train_step.peers.jla_retention import TILE, implementation

    mixers = {}
    if shape.mixer == 'mamba2':
        expand = shape.heads * shape.head_dim // shape.width
        sizes = {'d_state': STATE, 'head_dim': shape.head_dim, 'conv_size': CONV}
        mixers['ssm'] = SSMConfig(expand=expand, implementation=implementation(), **sizes)
    elif shape.mixer == 'gla':
        value = min(TILE, shape.head_dim)
        mixers['linear_attention'] = LinearAttentionConfig(
            shape.heads, shape.heads * shape.head_dim // value, shape.head_dim // 2, value,
            conv_size=0, qk_l2norm=False, gate_low_rank_dim=RANK, implementation=implementation(),
        )  # fmt: skip
    else:
        mixers['linear_attention'] = LinearAttentionConfig(1, 1, 16, 16, conv_size=0)
    layer = 'simple_gla' if shape.mixer == 'retnet' else shape.mixer
    return ModelConfig(
        vocab_size=shape.vocab,
        d_model=shape.width,
        n_layers=shape.layers,
        d_ff=shape.hidden,
        attention=AttentionConfig(1, 1, 16),  # of no layer
        layer_types=(layer,) * shape.layers,
        mlp_types=('dense' if shape.hidden else 'none',) * shape.layers,
        tie_embeddings=False,
        remat='none',
        scan_layers=False,
        lean_vjp=True,
        **mixers,
    )


def build(shape: Shape, key: jax.Array):
    """Returns jla's model, fp32 weights and bf16 products; its RetNet has retentions for mixers."""
    import equinox as eqx
    from jla.models.lm import build_model

    model = build_model(config_of(shape), key=key)
    if shape.mixer != 'retnet':
        return model
    from experiments.benchmarks.train_step.peers.jla_retention import Retention

    mixers = [Retention(shape, k) for k in jax.random.split(key, shape.layers)]
    return eqx.tree_at(lambda m: [b.mixer for b in m.blocks], model, mixers)


def bench(shape: Shape, steps: int, rounds: int = 5) -> dict:
    """Times the training step on random tokens; see `plain_jax.time_steps`."""
    import equinox as eqx
    from jla.ops.cross_entropy import linear_cross_entropy_objective

    def arrays(key):
        return eqx.filter(build(shape, key), eqx.is_array)

    made = eqx.filter_eval_shape(build, shape, jax.random.key(0))
    _, static = eqx.partition(made, lambda a: isinstance(a, jax.ShapeDtypeStruct))

    def loss(params, tokens_BT):
        model = eqx.combine(params, static)
        hidden = model(tokens_BT[:, :-1]).hidden
        found = linear_cross_entropy_objective(
            hidden.reshape(-1, shape.width), model.lm_head_weight(), tokens_BT[:, 1:].reshape(-1)
        )
        return found.objective_sum / math.prod(hidden.shape[:2])

    params = jax.jit(arrays)(jax.random.key(0))
    return time_steps(loss, params, shape, steps, rounds)


def check() -> None:
    """Ends the program with a word on what is missing, if something is."""
    try:
        import jla.models.lm  # noqa: F401
    except ImportError as e:
        sys.exit(f'jla: needs jax-linear-attention and equinox; {e}.')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', choices=having(*MIXERS), default='retnet_380m')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    check()
    result = bench(SHAPES[args.shape], args.steps, args.rounds)
    print(json.dumps({'program': 'jla', 'shape': args.shape, **result}))


if __name__ == '__main__':
    main()
