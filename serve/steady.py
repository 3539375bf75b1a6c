"""Convolutions whose rows do not depend on their place in the batch.

Within one padded size a picture must be the same to the last bit wherever its row stands. Some
kernels of cuDNN break that: they deal one sum out to several blocks of the GPU, in pieces that
depend on where in the batch the sum lies, and no setting forbids it. Which ones do differs by card,
type and shape, so each layer tries its own out, once for each shape, and takes another way where
the rows differ.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Way = Literal["whole", "patches", "rows"]
Key = tuple[tuple[int, ...], torch.dtype, bool, bool]
_DRAWS = 3  # rows that a way is tried with
_SEED = 0


class SteadyConv2d(nn.Conv2d):
    """A Conv2d that `steady` has changed; the same weights and, but for round-off, values.

    Attributes:
        choices: the way taken for each shape, type and layout.
    """

    choices: dict[Key, Way]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution, in the way that was found for such an input.

        Nothing can be tried while torch traces or captures: call it once before. An input that is
        new then is convolved as torch does.
        """
        if x.dim() != 4 or x.shape[0] < 2:
            return whole(self, x)
        key = (tuple(x.shape), x.dtype, _channels_last(x), _channels_last(self.weight))
        way = self.choices.get(key)
        if way is None:
            if torch.compiler.is_compiling():
                return whole(self, x)
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return whole(self, x)
            way = self.choices[key] = _choose(self, x)
        return _go(way, self, x)


def steady(network: nn.Module) -> None:
    """Makes the network's Conv2d layers steady, in place. A second call changes nothing."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d:  # what a subclass computes is its own affair
            layer.__class__ = SteadyConv2d
            layer.choices = {}  # type: ignore[assignment]  # a module's types know tensors only


def ways_taken(network: nn.Module) -> dict[Way, int]:
    """How often each way was chosen, once for each layer and shape; single rows need no choice."""
    layers = [layer for layer in network.modules() if isinstance(layer, SteadyConv2d)]
    return dict(Counter(way for layer in layers for way in layer.choices.values()))


def whole(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The convolution as torch does it: the fastest way."""
    values: torch.Tensor = layer._conv_forward(x, layer.weight, layer.bias)
    return values


def patches(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The convolution as one product of matrices, which are dealt out in another manner.

    Channels are the innermost, so that with channels last the patches are copied in long pieces
    and the weight's matrix is a view of the weight.
    """
    (high, wide), (down, right) = layer.kernel_size, layer.stride
    padded = F.pad(x, layer._reversed_padding_repeated_twice) if any(layer.padding) else x
    found = padded.permute(0, 2, 3, 1).unfold(1, high, down).unfold(2, wide, right)
    n, h, w = found.shape[:3]
    matrix = layer.weight.permute(0, 2, 3, 1).reshape(layer.out_channels, -1)
    lines = found.permute(0, 1, 2, 4, 5, 3).reshape(n * h * w, matrix.shape[1])
    values = F.linear(lines, matrix, layer.bias).view(n, h, w, layer.out_channels)
    values = values.permute(0, 3, 1, 2)
    # Laid out as torch's convolution would: the next layers choose their kernels by that.
    last = _channels_last(x) or _channels_last(layer.weight)
    return values if last else values.contiguous()


def rows(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """One row after the other: slow, and steady whatever the kernels do."""
    return torch.cat([whole(layer, x[row : row + 1]) for row in range(x.shape[0])])


def _go(way: Way, layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    if way == "whole":
        return whole(layer, x)
    return patches(layer, x) if way == "patches" else rows(layer, x)


@torch.no_grad()
def _choose(layer: nn.Conv2d, x: torch.Tensor) -> Way:
    if _holds("whole", layer, x):
        return "whole"
    if _has_patches(layer) and _holds("patches", layer, x):
        return "patches"
    return "rows"


def _has_patches(layer: nn.Conv2d) -> bool:
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str)


def _holds(way: Way, layer: nn.Conv2d, like: torch.Tensor) -> bool:
    """Tells whether a row has the same values at every place of a batch.

    The values are drawn, for a picture's own may be too plain to show a difference in round-off.
    They are the same in all rows: so every place is compared with the first. Turning a batch
    around would compare pairs of places only, and leave out what is alike in both of a pair.
    """
    draws = torch.Generator(like.device).manual_seed(_SEED)
    size = like.shape[1:]
    for _ in range(_DRAWS):
        row = torch.randn(size, generator=draws, device=like.device, dtype=like.dtype)
        try:
            # In the input's own layout, for another one is another kernel.
            values = _go(way, layer, torch.empty_like(like).copy_(row.expand_as(like)))
        except torch.OutOfMemoryError:  # patches take many times a convolution's memory
            return False
        if not torch.equal(values, values[:1].expand_as(values)):
            return False
    return True


def _channels_last(x: torch.Tensor) -> bool:
    """Whether it is laid out as NHWC and not, as where there is one pixel or channel, both ways."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
