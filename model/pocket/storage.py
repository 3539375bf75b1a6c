"""The pocket pair's file format: 8 bits a weight with one scale an output channel, in safetensors.

A matrix or convolution W [out, ...] is stored as int8 round(W / s) with s [out] = max |W| / 127
(fp16); vectors and small tensors are stored as fp16. Unpacked, every tensor is fp16. The error of a
value is half a step s at most where a row's max |W| is between 0.008 and fp16's 65504; below, s
itself is a subnormal fp16 number and coarser.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1024  # tensors with fewer values stay fp16
SCALE = ".__scale__"


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point state dict -> stored tensors; other dtypes pass unchanged."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if not value.is_floating_point():
            out[name] = value.contiguous()
        elif value.ndim < 2 or value.numel() < SMALLEST:
            out[name] = value.half().contiguous()
        else:
            flat = value.float().flatten(1)
            scale = (flat.abs().amax(1) / 127).clamp(min=1e-8).half()
            scale = torch.where(scale == 0, scale.new_tensor(6e-8), scale)
            levels = (flat / scale.float()[:, None]).round().clamp(-127, 127)
            out[name] = levels.to(torch.int8).reshape(value.shape).contiguous()
            out[name + SCALE] = scale
    return out


def unpack(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors -> fp16 state dict."""
    out: dict[str, Tensor] = {}
    for name, value in stored.items():
        if name.endswith(SCALE):
            continue
        scale = stored.get(name + SCALE)
        if scale is not None:
            shape = (-1,) + (1,) * (value.ndim - 1)
            value = (value.float() * scale.float().view(shape)).half()
        out[name] = value
    return out
