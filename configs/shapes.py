"""Published models as configs, for `--dry_run` and for the cost model: nothing here is trained.

    python -m effjax.train --config=configs/shapes.py:gpt3 --dry_run

| variant | model | parameters | also checked in tests |
|---|---|---|---|
| gpt1 | GPT-1 | 116,534,784 | post-norm, no final norm |
| gpt2 | GPT-2 small | 124,439,808 | cache 576 MiB at B8 S1024 float32 |
| gpt2_medium | GPT-2 medium | 354,823,168 | |
| gpt2_xl | GPT-2 XL | 1,557,611,200 | |
| gpt3 | GPT-3 | 174.6e9 | 6 N D = 3.15e23 FLOPs for N = 175e9, D = 300e9 |
| llama_7b | LLaMA-7B | 6,738,415,616 | cache 1.0 GiB at B1 S2048 float16 |
| vit_ti, vit_s, vit_b, vit_l | ViT /16 at 224 | | 1.25, 4.60, 17.56, 61.6 GMACs |
| vit_h | ViT-H/14 at 224 | | 167.3 GMACs |

GPT-3's paper says that its layers alternate between dense and locally banded attention, but not
how wide the band is; 128 here. Rates and batches are nominal.
"""

from typing import Any

from effjax.core.config import defaults

LAYERNORM = {'kind': 'layernorm', 'eps': 1e-5}


def gpt(width: int, layers: int, heads: int, vocab_size: int, max_len: int) -> dict[str, Any]:
    """Returns a model of the GPT family: learned positions, biases, GELU, tied head."""
    return {
        'kind': 'decoder',
        'vocab_size': vocab_size,
        'width': width,
        'layers': layers,
        'mixer': {'kind': 'attention', 'heads': heads},
        'ffn': {'kind': 'gelu', 'hidden': 4 * width},
        'norm': LAYERNORM,
        'positions': {'kind': 'learned'},
        'bias': True,
        'tied': True,
        'max_len': max_len,
    }


def gpt1() -> dict[str, Any]:
    """Radford et al. 2018: post-norm blocks and no norm before the head."""
    model = gpt(768, 12, 12, 40478, 512)
    return {**model, 'block': 'postnorm', 'final_norm': False}


def gpt3() -> dict[str, Any]:
    """Brown et al., arXiv 2005.14165: dense and banded layers alternate."""
    model = gpt(12288, 96, 96, 50257, 2048)
    dense = model['mixer']
    banded = {**dense, 'window': 128}
    period = ({'mixer': dense}, {'mixer': banded})
    return {**model, 'layers': 0, 'segments': ({'pattern': period, 'repeat': 48},)}


def llama_7b() -> dict[str, Any]:
    """Touvron et al., arXiv 2302.13971."""
    return {
        'kind': 'decoder',
        'vocab_size': 32000,
        'width': 4096,
        'layers': 32,
        'mixer': {'kind': 'attention', 'heads': 32},
        'ffn': {'kind': 'swiglu', 'hidden': 11008},
        'norm': {'kind': 'rmsnorm', 'eps': 1e-6},
        'positions': {'kind': 'rope', 'base': 10000.0},
        'tied': False,
        'max_len': 2048,
    }


def vit(width: int, layers: int, heads: int, patch: int = 16) -> dict[str, Any]:
    """Dosovitskiy et al., arXiv 2010.11929 and 2012.12877 (Ti, S): 224 pixels, 1000 classes."""
    return {
        'kind': 'vit',
        'image_size': 224,
        'channels': 3,
        'classes': 1000,
        'patch': patch,
        'width': width,
        'layers': layers,
        'mixer': {'kind': 'attention', 'heads': heads},
        'ffn': {'kind': 'gelu', 'hidden': 4 * width},
        'norm': {'kind': 'layernorm', 'eps': 1e-6},
        'bias': True,
    }


VARIANTS = {
    'gpt1': gpt1,
    'gpt2': lambda: gpt(768, 12, 12, 50257, 1024),
    'gpt2_medium': lambda: gpt(1024, 24, 16, 50257, 1024),
    'gpt2_xl': lambda: gpt(1600, 48, 25, 50257, 1024),
    'gpt3': gpt3,
    'llama_7b': llama_7b,
    'vit_ti': lambda: vit(192, 12, 3),
    'vit_s': lambda: vit(384, 12, 6),
    'vit_b': lambda: vit(768, 12, 12),
    'vit_l': lambda: vit(1024, 24, 16),
    'vit_h': lambda: vit(1280, 32, 16, patch=14),
}


def get_config(variant: str = 'gpt2'):
    """Returns the config of one model."""
    if variant not in VARIANTS:
        from effjax.core.errors import ConfigError
        from effjax.core.registry import suggest

        raise ConfigError(
            f'configs/shapes.py has no variant {variant!r}; it has {", ".join(VARIANTS)}.'
            + suggest(variant, VARIANTS)
        )
    config = defaults()
    config.model = VARIANTS[variant]()
    config.data = {'kind': 'none'}
    config.steps = 1
    config.batch_size = 8
    if config.model.kind == 'vit':
        config.task = {'kind': 'classification'}
        config.seq_len = (224 // config.model.patch) ** 2 + 1
    else:
        config.seq_len = config.model.max_len
    return config
