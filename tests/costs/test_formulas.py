"""Closed forms against published numbers."""

import pytest

from effjax.costs import formulas

GIB, MIB = 2**30, 2**20


def test_gpt3_pretraining_compute():
    # Brown et al. 2020, table D.1: 3.14e23 FLOPs for 174.6B parameters and 300B tokens.
    assert formulas.pretrain_flops(174.6e9, 300e9) == pytest.approx(3.14e23, rel=0.005)


def test_llama_2_70b_device_hours():
    # Touvron et al. 2023: 1,720,320 A100 hours, 2.0T tokens, 68.98B parameters.
    flops = formulas.pretrain_flops(70e9, 2.0e12)
    used = formulas.implied_mfu(flops, hours=1_720_320, peak=312e12)
    assert used == pytest.approx(0.435, abs=0.0005)
    assert formulas.device_hours(flops, peak=312e12, mfu=used) == pytest.approx(1_720_320)


@pytest.mark.parametrize(
    ('shape', 'expected'),
    [
        (dict(batch=1, length=2048, layers=32, kv_heads=32, head_dim=128, itemsize=4), 2 * GIB),
        (dict(batch=1, length=2048, layers=32, kv_heads=32, head_dim=128, itemsize=2), 1 * GIB),
        (dict(batch=1, length=2048, layers=96, kv_heads=96, head_dim=128, itemsize=4), 18 * GIB),
        (dict(batch=8, length=1024, layers=12, kv_heads=12, head_dim=64, itemsize=4), 576 * MIB),
        (dict(batch=8, length=1024, layers=12, kv_heads=1, head_dim=64, itemsize=4), 48 * MIB),
    ],
    ids=['llama-7b-fp32', 'llama-7b-fp16', 'gpt3-fp32', 'gpt2-small-fp32', 'gpt2-small-mqa'],
)
def test_kv_cache(shape, expected):
    assert formulas.kv_cache_bytes(**shape) == expected
