"""The judge of comparisons: networks that took part in no training of a pair, for identity.

`features` are EfficientNet-Lite0's, from ImageNet; `subject` finds the subject of a picture of the
pocket world, so that identity can be measured without the scene around it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from model.base_pair import freeze
from model.judge.network import EfficientNetLite0
from model.judge.subject import SIDE, SubjectNetwork
from model.pocket.storage import unpack

NAME = "EfficientNet-Lite0 (ImageNet)"
_HERE = Path(__file__).parent
_SIDE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LEAST = 0.01  # of the picture: less is no subject
_MARGIN = 0.1  # around the subject, in parts of its longer side


@dataclass(frozen=True, eq=False)
class Judge:
    """Both networks, frozen, in float32."""

    network: nn.Module
    finder: nn.Module

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute features [R, 1280] of pictures [R, 3, S, S] in [-1, 1]."""
        x = F.interpolate(
            images.float(), size=(_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False
        )
        mean, std = (x.new_tensor(each).view(1, 3, 1, 1) for each in (_MEAN, _STD))
        features: torch.Tensor = self.network(((x + 1) / 2 - mean) / std)
        return features

    @torch.no_grad()
    def subjects(self, images: torch.Tensor) -> torch.Tensor:
        """Cut the subjects of pictures [R, 3, S, S] in [-1, 1] out, on grey, to fill the picture.

        A picture in which no subject is found stays as it is.
        """
        side = images.shape[-1]
        small = F.interpolate(images.float(), size=(SIDE, SIDE), mode="area")
        found = F.interpolate(self.finder(small), size=(side, side), mode="bilinear")
        masks = (found > 0).float()
        return torch.stack([_cut(x, m, side) for x, m in zip(images, masks, strict=True)])


def _cut(image: torch.Tensor, mask: torch.Tensor, side: int) -> torch.Tensor:
    if mask.mean() < _LEAST:
        return image
    rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
    (top, bottom), (left, right) = ((int(each[0]), int(each[-1]) + 1) for each in (rows, columns))
    length = max(bottom - top, right - left)
    length += 2 * round(_MARGIN * length)
    # A square around the subject's middle; what lies outside of the picture is grey, that is 0.
    y, x = (top + bottom - length) // 2, (left + right - length) // 2
    pad = (max(0, -x), max(0, x + length - side), max(0, -y), max(0, y + length - side))
    padded = F.pad(image * mask, pad)
    cut = padded[:, y + pad[2] : y + pad[2] + length, x + pad[0] : x + pad[0] + length]
    return F.interpolate(
        cut[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )[0]


def load_judge(device: torch.device | str = "cpu") -> Judge:
    """Load the judge that ships with the project."""
    network, finder = EfficientNetLite0(), SubjectNetwork()
    for module, name in ((network, "weights"), (finder, "subject")):
        stored = unpack(load_file(_HERE / f"{name}.safetensors"))
        module.load_state_dict({key: value.float() for key, value in stored.items()})
    return Judge(freeze(network).to(device), freeze(finder).to(device))
