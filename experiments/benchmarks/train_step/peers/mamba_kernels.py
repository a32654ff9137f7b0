"""Mamba-2's Triton kernels for `fla`, where mamba-ssm's CUDA extensions are not built.

`fla.layers.mamba2` takes its recurrence from mamba-ssm; without that package it falls back to whole
chunks in PyTorch, which ran out of 140 GiB at 32768 tokens a step. The recurrence is in Triton
alone, but `import mamba_ssm` asks for an extension in CUDA (for Mamba-1), and its fused training
path for another (causal-conv1d). Where both are installed, nothing is changed here. Where not,
mamba-ssm's kernels are imported past its `__init__`, and the fused path is put together from parts:
fla's Triton convolution, mamba-ssm's recurrence and gated norm. It keeps the convolution's output
for the backward pass, which the fused path computes again.

A wheel without extensions (read at 2.3.2.post1):

    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip wheel --no-deps --no-build-isolation \\
        --no-binary=:all: mamba-ssm
"""

import importlib.util
import sys
import types


def install() -> None:
    """Makes `fla.layers.mamba2` find mamba-ssm's kernels; call it before anything imports `fla`.

    Raises:
      ImportError: mamba-ssm is not installed, or one of its Triton files cannot be imported.
    """
    if all(map(importlib.util.find_spec, ('mamba_ssm', 'selective_scan_cuda', 'causal_conv1d'))):
        return
    spec = importlib.util.find_spec('mamba_ssm')
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError('mamba-ssm is not installed')
    package = types.ModuleType('mamba_ssm')  # in place of the one whose __init__ needs extensions
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules['mamba_ssm'] = package
    import fla.layers.mamba2 as layer

    if not layer.is_fast_path_available:
        raise ImportError("mamba-ssm's Triton kernels cannot be imported")
    layer.mamba_split_conv1d_scan_combined = split_conv1d_scan


def split_conv1d_scan(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    *,
    D,
    chunk_size,
    activation,
    rmsnorm_weight,
    rmsnorm_eps,
    outproj_weight,
    outproj_bias,
    headdim,
    ngroups,
    norm_before_gate,
    **unused,
):
    """mamba-ssm's `mamba_split_conv1d_scan_combined` from parts.

    Args:
      zxbcdt: gate, values, B, C and steps `[B, T, 2 H P + 2 G N + H]`, bf16.
      conv1d_weight, conv1d_bias: `[H P + 2 G N, taps]` and `[H P + 2 G N]`.
      dt_bias, A, D: `[H]`.
      chunk_size, activation, headdim, ngroups: ints, and the convolution's activation.
      rmsnorm_weight, rmsnorm_eps, norm_before_gate: of the gated norm; weight `[H P]`.
      outproj_weight, outproj_bias: `[width, H P]`, and None or `[width]`.

    Returns:
      `[B, T, width]`.
    """
    import torch.nn.functional as F
    from fla.modules.convolution import causal_conv1d
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inner, rows = len(A) * headdim, conv1d_weight.shape[0]
    z, xbc, dt = zxbcdt.split([inner, rows, len(A)], dim=-1)
    dtype = zxbcdt.dtype
    xbc, _ = causal_conv1d(
        x=xbc.contiguous(),
        weight=conv1d_weight.to(dtype),
        bias=conv1d_bias.to(dtype),
        activation=activation,
    )
    x, b, c = xbc.split([inner, (rows - inner) // 2, (rows - inner) // 2], dim=-1)
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (len(A), headdim)),
        dt,
        A,
        b.unflatten(-1, (ngroups, -1)),
        c.unflatten(-1, (ngroups, -1)),
        chunk_size=chunk_size,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
    )
    y = rmsnorm_fn(
        y.flatten(-2),
        rmsnorm_weight,
        None,
        z=z,
        eps=rmsnorm_eps,
        group_size=inner // ngroups,
        norm_before_gate=norm_before_gate,
    )
    return F.linear(y, outproj_weight, outproj_bias)
