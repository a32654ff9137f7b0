"""The plain Vision Transformer (arXiv 2010.11929): patches, a bidirectional body, a classifier."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops, total
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.core.registry import check_block
from effjax.layers.dropout import dropout as dropout_layer
from effjax.layers.norms import NORMS
from effjax.layers.positions import Learned
from effjax.models import blocks
from effjax.models import body as bodies
from effjax.models.plan import plan_segments
from effjax.models.setup import Setup

LAYERNORM = MappingProxyType({'kind': 'layernorm'})


class ViT(nnx.Module):
    """A classifier of square images.

    Args:
      setup: dtypes and execution; its sequence length is not read.
      image_size: pixels a side; the trainer fills in the data's.
      channels: colour channels; the trainer fills in the data's.
      classes: classes; the trainer fills in the data's.
      patch: pixels a side of a patch.
      width: model width D.
      layers: blocks.
      mixer: block of config of the sequence mixer, which must not need an order.
      ffn: block of config of the feed-forward part, or None.
      norm: block of config of every norm.
      block: how mixer and ffn are wired: see `models.blocks`.
      pool: 'cls' classifies an extra token, 'mean' the mean over patches.
      bias: projections carry a bias.
      dropout: rate on the embedding and on sub-block outputs.
      share: consecutive layers that use one copy of the parameters.
      init: initialiser scheme, see `core.context`.

    Raises:
      ConfigError: values that do not fit together, naming the key.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        image_size: int = 0,
        channels: int = 0,
        classes: int = 0,
        patch: int,
        width: int,
        layers: int,
        mixer: Mapping,
        ffn: Mapping | None,
        norm: Mapping = LAYERNORM,
        block: str = 'sequential',
        pool: Literal['cls', 'mean'] = 'cls',
        bias: bool = True,
        dropout: float = 0.0,
        share: int = 1,
        init: str = 'gpt2',
        rngs: nnx.Rngs,
    ):
        _check(image_size, channels, classes, patch)
        check_block(NORMS, norm, 'norm', 'config.model.norm')
        default = {'mixer': mixer, 'ffn': ffn, 'block': block}
        plan = plan_segments((), layers, share, default, setup.execution.attention)
        self.grid = image_size // patch
        self.patch, self.channels, self.classes, self.width = patch, channels, classes, width
        self.cls = pool == 'cls'
        self.length = self.grid**2 + self.cls
        self.rate = float(dropout)
        self.policy = setup.policy
        ctx = Context(
            width=width,
            policy=setup.policy,
            causal=False,
            depth=sum(s.depth for s in plan),
            max_len=self.length,
            positions={'kind': 'learned'},
            norm=dict(norm),
            bias=bias,
            dropout=dropout,
            init=init,
        )
        self._make_embedding(ctx, branch(rngs, 'embedding'))
        self.body = bodies.Body(ctx, setup.execution, plan, rngs=branch(rngs, 'body'))
        self.norm = blocks.make_part(NORMS, norm, 'config.model.norm', ctx, rngs=rngs)
        # A zero head gives equal probabilities at first, as in the paper's fine-tuning.
        dtype = setup.policy.param_dtype
        self.head_kernel = param(
            jnp.zeros((width, classes), dtype), ('embed', 'classes'), role='product', inputs=(0,)
        )
        self.head_bias = param(jnp.zeros(classes, dtype), ('classes',), no_decay=True, role='bias')

    def _make_embedding(self, ctx: Context, rngs: nnx.Rngs) -> None:
        dtype, inner = ctx.policy.param_dtype, self.patch**2 * self.channels
        kernel = inner**-0.5 * jax.random.normal(rngs.params(), (inner, ctx.width), dtype)
        self.patch_kernel = param(kernel, ('patch', 'embed'), role='product', inputs=(0,))
        zero = jnp.zeros(ctx.width, dtype)
        self.patch_bias = param(zero, ('embed',), no_decay=True, role='bias')
        self.positions = Learned(ctx, rngs=branch(rngs, 'positions'))
        self.cls_token = param(zero, ('embed',), no_decay=True, role='table') if self.cls else None

    def __call__(
        self, images_BHWC: jax.Array, info: SeqInfo
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """Returns (logits [B, classes], aux).

        Args:
          images_BHWC: float, or uint8 in 0..255, which is scaled to -1..1.
          info: only its key and `train` are read.
        """
        chex.assert_rank(images_BHWC, 4)
        side = self.grid * self.patch
        chex.assert_shape(images_BHWC, (None, side, side, self.channels))
        batch = images_BHWC.shape[0]
        inner = SeqInfo.of(batch, self.length, rng=info.rng, train=info.train)
        with jax.named_scope('embedding'):
            x_BTD = self.embed(images_BHWC)
            x_BTD = dropout_layer(x_BTD, self.rate, inner.fold(blocks.EMBEDDING))
        x_BTD, _, aux = self.body(x_BTD, inner)
        with jax.named_scope('head'):
            x_BD = self.norm(x_BTD[:, 0]) if self.cls else jnp.mean(self.norm(x_BTD), 1)
            kernel = self.policy.cast(self.head_kernel[...])
            logits = x_BD @ kernel + self.policy.cast(self.head_bias[...])
        return logits, bodies.metrics(aux)

    def embed(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns patch embeddings with positions [B, T, D]: one product over cut-out patches."""
        cast = self.policy.cast
        if images_BHWC.dtype == jnp.uint8:
            images_BHWC = images_BHWC.astype(jnp.float32) / 127.5 - 1.0
        batch, (g, p) = images_BHWC.shape[0], (self.grid, self.patch)
        cut = cast(images_BHWC).reshape(batch, g, p, g, p, self.channels)
        patches = cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, g * g, p * p * self.channels)
        x_BTD = patches @ cast(self.patch_kernel[...]) + cast(self.patch_bias[...])
        if self.cls_token is not None:
            cls = jnp.broadcast_to(cast(self.cls_token[...]), (batch, 1, self.width))
            x_BTD = jnp.concatenate([cls, x_BTD], 1)
        return x_BTD + self.positions(jnp.arange(self.length))

    def cost(self, batch: int, seq_len: int = 0) -> dict[str, Cost]:
        """Returns the cost by part for a batch of images; `seq_len` is not read."""
        del seq_len
        tokens, itemsize = batch * self.length, self.policy.compute_dtype.itemsize
        inner = self.patch**2 * self.channels
        embedding = inner * self.width + self.width * (1 + self.length + self.cls)
        head = self.width * self.classes + self.classes
        out = self.body.cost(batch, self.length)
        out['norm'] = out.get('norm', Cost()) + blocks.norm_cost(
            self.norm, self.width, batch, itemsize
        )
        return {
            'embedding': Cost(
                matmul=matmul_flops(batch * self.grid**2, inner, self.width),
                params=embedding,
                params_used=embedding,
                activation_bytes=(batch * self.grid**2 * inner + tokens * self.width) * itemsize,
            ),
            **out,
            'head': Cost(
                matmul=matmul_flops(batch, self.width, self.classes),
                params=head,
                params_used=head,
                activation_bytes=batch * (self.width + self.classes) * itemsize,
            ),
        }

    def param_count(self) -> int:
        """Returns the number of parameters."""
        return total(self.cost(1).values()).params


def _check(image_size: int, channels: int, classes: int, patch: int) -> None:
    for key, value in (('image_size', image_size), ('channels', channels), ('classes', classes)):
        if value < 1:
            raise ConfigError(f'config.model.{key} must be at least 1, got {value}.')
    if patch < 1 or image_size % patch:
        near = math.gcd(image_size, patch) if patch > 0 else 1
        raise ConfigError(
            f'config.model.patch {patch} does not divide the image size {image_size}; {near} would.'
        )
