"""The identity encoder `G`: CLIP image features, with IP-Adapter's projection where it is given."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from model.discriminators import Features
from model.errors import InputError

_PREFIX = "image_proj."
_PARTS = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")


@dataclass(frozen=True, eq=False)
class ImageProjection:
    """IP-Adapter's image projection: an embedding becomes a few tokens of the text's width.

    Attributes:
        weight: [tokens * d, e].
        bias: [tokens * d].
        norm_weight: [d], of the layer norm over each token.
        norm_bias: [d].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor

    def __call__(self, embedding: torch.Tensor) -> torch.Tensor:
        """Project embeddings [R, e] to tokens [R, tokens, d]."""
        d = self.norm_weight.shape[0]
        tokens = F.linear(embedding, self.weight, self.bias).unflatten(-1, (-1, d))
        return F.layer_norm(tokens, (d,), self.norm_weight, self.norm_bias)


def load_image_projection(path: str | Path, device: torch.device | str = "cpu") -> ImageProjection:
    """Read the image projection of an IP-Adapter safetensors file, in float32.

    Raises:
        InputError: when the file cannot be read or has no linear image projection.
    """
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a safetensors file.") from None
    absent = [part for part in _PARTS if _PREFIX + part not in tensors]
    if absent:
        raise InputError(f"{path} lacks {_PREFIX + absent[0]!r}; give the plain IP-Adapter's file.")
    parts = [tensors[_PREFIX + part].to(device, torch.float32) for part in _PARTS]
    return ImageProjection(*parts)


def identity_features(features: Features, projection: ImageProjection | None) -> torch.Tensor:
    """Give `G`'s features of a backbone's pass: [R, tokens, d] with a projection, else [R, e].

    A backbone without an image projection of its own gives its pooled features.
    """
    embedding = features.pooled if features.projected is None else features.projected
    return embedding if projection is None else projection(embedding)
