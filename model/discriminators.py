"""Frozen feature backbones `F_k` and the trained heads `h_k` of the discriminators.

A backbone serves three uses in one pass: pooled features for its head, projected embeddings for
the identity loss, hidden states for LPIPS.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModelWithProjection, Dinov2Model, ViTModel

from model.base_pair import freeze, load_part
from model.errors import InputError
from model.packing import grouped_linear
from model.randomness import generator

HIDDEN = 512
_LAYERS = 4
_BICUBIC = 3
_MODES = {0: "nearest", 2: "bilinear"}


@dataclass(frozen=True, eq=False)
class Features:
    """What one pass of a backbone gives, all float32.

    Attributes:
        pooled: [R, d], the pooled or CLS feature.
        projected: [R, e] in the space shared with text (CLIP only), else None.
        layers: hidden states [R, places, d] at four depths, spread evenly.
    """

    pooled: torch.Tensor
    projected: torch.Tensor | None
    layers: tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen image network with its preprocessing, differentiable to the pixels.

    Attributes:
        name: the directory's name, for reports.
        network: CLIPVisionModelWithProjection, Dinov2Model or ViTModel.
        dim: d of the pooled feature.
        side: input size in pixels.
        mode: interpolation, `bicubic`, `bilinear` or `nearest`.
        mean: [3] of the input's normalisation, in parts of 1.
        std: [3].
        recomputed: in the backward pass, so that no activations are kept until then.
    """

    name: str
    network: nn.Module
    dim: int
    side: int
    mode: str
    mean: torch.Tensor
    std: torch.Tensor
    recomputed: bool = False

    def __call__(self, images: torch.Tensor) -> Features:
        """Compute all features of images [R, 3, H, W] in [-1, 1], of any size."""
        if self.recomputed and images.requires_grad:
            return checkpoint(self._features, images, use_reentrant=False)
        return self._features(images)

    def _features(self, images: torch.Tensor) -> Features:
        pixels = self.preprocess(images)
        options: dict[str, Any] = {"output_hidden_states": True}
        own = self.network.config.image_size  # type: ignore[union-attr]
        if self.side != own and not isinstance(self.network, Dinov2Model):
            options["interpolate_pos_encoding"] = True
        parameter = next(self.network.parameters())
        out = self.network(pixels.to(parameter.dtype), **options)
        projected = getattr(out, "image_embeds", None)
        if projected is None:
            pooled = out.last_hidden_state[:, 0]
        else:  # the projection's input: CLS after the last layer norm
            vision: Any = getattr(self.network, "vision_model")  # noqa: B009
            pooled = vision.post_layernorm(out.last_hidden_state[:, 0])
        states = out.hidden_states
        depths = [(i + 1) * (len(states) - 1) // _LAYERS for i in range(_LAYERS)]
        return Features(
            pooled=pooled.float(),
            projected=None if projected is None else projected.float(),
            layers=tuple(states[d].float() for d in dict.fromkeys(depths)),
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute pooled features [R, d] of images [R, 3, H, W] in [-1, 1]."""
        return self(images).pooled

    def projected(self, images: torch.Tensor) -> torch.Tensor:
        """Compute CLIP image embeddings [R, e] of images [R, 3, H, W] in [-1, 1].

        Raises:
            InputError: for a backbone that is not CLIP.
        """
        embedding = self(images).projected
        if embedding is None:
            raise InputError(f"Backbone {self.name} has no image projection; give a CLIP model.")
        return embedding

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Resize the shorter side, crop the centre and normalise: [R, 3, side, side] float32."""
        x = (images.float().contiguous() + 1) / 2
        height, width = x.shape[-2:]
        shorter = min(height, width)
        size = [self.side * length // shorter for length in (height, width)]
        if size != [height, width]:
            smooth = self.mode != "nearest"
            x = F.interpolate(x, size=size, mode=self.mode, antialias=smooth)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        x = x[..., top : top + self.side, left : left + self.side]
        mean, std = (value.to(x.device).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return ((x - mean) / std).contiguous()


def load_backbone(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    side: int | None = None,
) -> Backbone:
    """Load a frozen backbone from a local transformers directory.

    Args:
        directory: a CLIP (whole or vision only), Dinov2 or ViT directory with
            `preprocessor_config.json`.
        dtype: type of the weights.
        device: where to put it.
        side: input size in pixels; by default what the network was made for.

    Raises:
        InputError: when the directory is not whole or of another kind.
    """
    directory = Path(directory)
    kinds: dict[str, Any] = {
        "clip": CLIPVisionModelWithProjection,
        "clip_vision_model": CLIPVisionModelWithProjection,
        "dinov2": Dinov2Model,
        "vit": ViTModel,
    }
    kind = _read_json(directory / "config.json").get("model_type")
    if kind not in kinds:
        raise InputError(
            f"{directory} holds a {kind!r} model; give a CLIP, Dinov2 or ViT directory."
        )
    options = {"add_pooling_layer": False} if kind == "vit" else {}
    network = freeze(load_part(kinds[kind], directory, **options)).to(device, dtype)
    config: Any = network.config
    preprocessor = _read_json(directory / "preprocessor_config.json")
    resample = preprocessor.get("resample", _BICUBIC)
    return Backbone(
        name=directory.name,
        network=network,
        dim=config.hidden_size,
        side=side or config.image_size,
        mode=_MODES.get(resample, "bicubic"),
        mean=torch.tensor(preprocessor.get("image_mean", [0.5] * 3), device=device),
        std=torch.tensor(preprocessor.get("image_std", [0.5] * 3), device=device),
    )


class Head(nn.Module):
    """One discriminator head a concept: Linear(d, 512), ReLU, Linear(512, 2), stacked over N."""

    def __init__(self, dim: int, concept_ids: Sequence[str], seed: int, place: int) -> None:
        """Start as `nn.Linear` does, each concept from its own draws."""
        super().__init__()
        starts = [_start(dim, generator(seed, c, 0, "head", place)) for c in concept_ids]
        w1, b1, w2, b2 = (torch.stack(part) for part in zip(*starts, strict=True))
        self.w1 = nn.Parameter(w1)  # [N, 512, d]
        self.b1 = nn.Parameter(b1)  # [N, 512]
        self.w2 = nn.Parameter(w2)  # [N, 2, 512]
        self.b2 = nn.Parameter(b2)  # [N, 2]

    def forward(self, features: torch.Tensor, concept: torch.Tensor) -> torch.Tensor:
        """Judge features [R, d]: logits [R, 2], fake and real."""
        hidden = F.relu(grouped_linear(features, self.w1, concept, self.b1))
        return grouped_linear(hidden, self.w2, concept, self.b2)


class DiscriminatorHeads(nn.Module):
    """The heads `h_k` of all backbones for N concepts; float32.

    While the student steps, the heads must be frozen (`requires_grad_(False)`): the student's loss
    runs through them, and a training engine would take what reaches them for their own gradient.
    """

    def __init__(self, dims: Sequence[int], concept_ids: Sequence[str], seed: int) -> None:
        """Make the heads.

        Args:
            dims: feature size d_k of each backbone.
            concept_ids: the N concepts, in pack order.
            seed: the run's seed; a concept's start does not depend on the rest of the pack.
        """
        super().__init__()
        self.heads = nn.ModuleList(
            Head(dim, concept_ids, seed, place) for place, dim in enumerate(dims)
        )

    def forward(
        self, features: Sequence[torch.Tensor], concept: torch.Tensor
    ) -> list[torch.Tensor]:
        """Judge features [R, d_k], one tensor a backbone: logits [R, 2] each."""
        return [head(f, concept) for head, f in zip(self.heads, features, strict=True)]


def _start(dim: int, gen: torch.Generator) -> tuple[torch.Tensor, ...]:
    shapes = ((HIDDEN, dim), (HIDDEN,), (2, HIDDEN), (2,))
    bounds = (dim**-0.5, dim**-0.5, HIDDEN**-0.5, HIDDEN**-0.5)
    return tuple(
        (torch.rand(shape, generator=gen) * 2 - 1) * bound
        for shape, bound in zip(shapes, bounds, strict=True)
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); give a whole transformers directory."
        ) from None
