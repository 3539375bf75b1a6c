"""EfficientNet-Lite0's feature network, with batch normalisation folded into the convolutions.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv
1905.11946; the Lite variant leaves squeeze-and-excitation out and uses ReLU6.
"""

import torch
from torch import nn
from torch.nn import functional as F

# kernel, stride, expansion, channels, repeats
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM, FEATURES = 32, 1280


class _Convolution(nn.Conv2d):
    """A convolution whose output has ceil(side / stride) places, as TensorFlow's "SAME" pads."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        before = (kernel - stride) // 2
        self._pad = (before, kernel - stride - before) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, self._pad) if any(self._pad) else x)


class _Block(nn.Module):
    """Expand, filter each channel, project; with a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Convolution(inputs, wide) if expansion > 1 else None
        self.filter = _Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _Convolution(wide, outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.filter(y)))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Pictures [R, 3, 224, 224], normalised, to pooled features [R, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, STEM, 3, 2)
        blocks, inputs = [], STEM
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for place in range(repeats):
                step = stride if place == 0 else 1
                blocks.append(_Block(inputs, outputs, kernel, step, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _Convolution(inputs, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the features before the classifier."""
        x = F.relu6(self.head(self.blocks(F.relu6(self.stem(x)))))
        return x.mean(dim=(2, 3))
