"""What a benchmark trains: a run spec's own base, or one of random weights, and made-up concepts.

Speed depends on shapes, not on values: networks built by configuration need no file and no hub.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from components.ingest.concept_folder import Concept, check_prefix
from components.ingest.pictures import MIN_SIDE
from components.spec import RunSpec, resolve_spec
from components.train.job import BasePaths
from components.train.worker import load_frozen
from model.base_pair import BasePair, freeze
from model.checkpointing import save_memory
from model.cross_attention import base_weight, expose_keys_values
from model.discriminators import Backbone
from model.iteration import Frozen
from model.randomness import generator
from model.sampler import to_uint8
from model.schedule import NoiseSchedule
from pipeline.base import base_settings

PRESET = "sd-turbo"
MINI = "sd-turbo-mini"
LENGTH = 77
PHOTOS = 4


@dataclass(frozen=True)
class Shapes:
    """The configurations that a base of random weights is built from.

    Attributes:
        unet: of teacher and student.
        vae: of the autoencoder.
        text: of the text encoder.
        vit: of the first backbone.
        dinov2: of the second one.
        clip: of the third one, which is the identity encoder too.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    vit: dict[str, Any]
    dinov2: dict[str, Any]
    clip: dict[str, Any]


# The published configurations of Stable Diffusion 2.1 and SD-Turbo, which have the same shapes;
# DINO ViT-S/16, DINOv2 ViT-L/14 and CLIP ViT-H/14.
_FULL = Shapes(
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    text={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,  # of 24: the states before the last layer are read
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    vit={"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6},
    dinov2={
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 518,
    },
    clip={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
)

# The same networks, narrow and shallow: to try the benchmark itself where there is no GPU.
_MINI = Shapes(
    unet=_FULL.unet
    | {
        "block_out_channels": (32, 64, 64, 64),
        "attention_head_dim": (2, 4, 4, 4),
        "cross_attention_dim": 64,
        "layers_per_block": 1,
    },
    vae=_FULL.vae | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
    text=_FULL.text
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    vit={
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    },
    dinov2={
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "patch_size": 14,
        "image_size": 70,
    },
    clip=_FULL.clip
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
    },
)

RANDOM_BASES = {PRESET: _FULL, MINI: _MINI}
"""Bases that are built with random weights; every other one is loaded."""

_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TEACHER_SCHEDULE = _BETAS | {
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
STUDENT_SCHEDULE = _BETAS | {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}


def bench_spec(
    base: str, resolution: int | None, precision: str | None, more: Sequence[str] = ()
) -> RunSpec:
    """Give the run spec of a base, with its preset's settings.

    Args:
        base: `sd-turbo` or `sd-turbo-mini` (random weights), another preset, or a base's folder.
        resolution: in place of the preset's.
        precision: in place of the preset's.
        more: settings `a.b=value`, which win.

    Raises:
        InputError: for a base or setting that there is none of.
    """
    preset, sets = (PRESET, []) if base in RANDOM_BASES else base_settings(base)
    if base == MINI:
        sets = ["base.name=sd-turbo-mini", "resolution=64"]
    for key, value in (("resolution", resolution), ("train.precision", precision)):
        if value is not None:
            sets.append(f"{key}={value}")
    return resolve_spec(preset, None, [*sets, *more])


def build_frozen(base: str, spec: RunSpec, precision: str, device: torch.device) -> Frozen:
    """Build or load a base's frozen networks.

    Raises:
        InputError: when a base can't be loaded.
        ServiceError: when a base can't be fetched.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if base not in RANDOM_BASES:
        bases, sparing = BasePaths.from_spec(spec), spec.train.checkpointing
        return load_frozen(bases, dtype, device, spec.resolution, sparing)
    shapes = RANDOM_BASES[base]
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (ViTModel, {"config": ViTConfig(**shapes.vit), "add_pooling_layer": False}),
        (Dinov2Model, {"config": Dinov2Config(**shapes.dinov2)}),
        (CLIPVisionModelWithProjection, {"config": CLIPVisionConfig(**shapes.clip)}),
        (CLIPTextModel, {"config": CLIPTextConfig(**shapes.text, max_position_embeddings=LENGTH)}),
        (AutoencoderKL, shapes.vae),
        (UNet2DConditionModel, shapes.unet),
        (UNet2DConditionModel, shapes.unet),
    ]
    vit, dinov2, clip, text_encoder, vae, *unets = random_networks(kinds, spec.seed, device)
    pair = _pair(base, spec.resolution, unets, vae, text_encoder, dtype)
    backbones = [_backbone(*named, dtype) for named in (("dino", vit), ("dinov2", dinov2))]
    identity = _backbone("clip", clip, dtype)
    frozen = Frozen.build(pair, [*backbones, identity], identity)
    return save_memory(frozen) if spec.train.checkpointing else frozen


def random_pair(
    base: str, resolution: int, seed: int, dtype: torch.dtype, device: torch.device
) -> BasePair:
    """Build what draws of a base of random weights; the student stands in for the teacher."""
    shapes = RANDOM_BASES[base]
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (CLIPTextModel, {"config": CLIPTextConfig(**shapes.text, max_position_embeddings=LENGTH)}),
        (AutoencoderKL, shapes.vae),
        (UNet2DConditionModel, shapes.unet),
    ]
    text_encoder, vae, unet = random_networks(kinds, seed, device)
    return _pair(base, resolution, (unet, unet), vae, text_encoder, dtype)


def write_photos(folder: Path, count: int, size: int) -> list[Concept]:
    """Write made-up concepts below `folder`, those that are not there yet; returns `count` of them.

    Args:
        folder: of the concepts; each has a few photos of soft random colours.
        count: how many concepts are wanted.
        size: side of a photo in pixels.
    """
    from PIL import Image

    side = max(size, MIN_SIDE)  # a smaller photo is no valid one
    for n in range(count):
        concept_id = f"concept-{n:03d}"
        place = folder / concept_id
        if place.is_dir():
            continue
        place.mkdir(parents=True)
        for i in range(PHOTOS):
            gen = generator(0, concept_id, 0, "photo", i)
            colours = torch.rand(1, 3, 8, 8, generator=gen) * 2 - 1
            picture = F.interpolate(colours, size=(side, side), mode="bicubic")
            pixels = to_uint8(picture)[0].permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(place / f"{i}.png", compress_level=1)
        (place / "concept.yaml").write_text("class_noun: dog\n")
    checked = check_prefix(str(folder))[:count]
    wrong = [problem for each in checked for problem in each.problems]
    assert not wrong and len(checked) == count, wrong
    return [each.concept for each in checked if each.concept is not None]


def random_networks(
    kinds: Sequence[tuple[Any, dict[str, Any]]], seed: int, device: torch.device
) -> list[Any]:
    """Build networks with random weights, straight on a device: on the CPU it takes minutes."""
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards), torch.device(device):
        torch.manual_seed(seed)
        return [kind(**settings) for kind, settings in kinds]


def _pair(
    name: str,
    resolution: int,
    unets: Sequence[Any],
    vae: Any,
    text_encoder: Any,
    dtype: torch.dtype,
) -> BasePair:
    layouts = [expose_keys_values(unet) for unet in unets]
    kv = [base_weight(unet, layout) for unet, layout in zip(unets, layouts, strict=True)]
    teacher, student, vae, text_encoder = (
        _frozen(network, dtype) for network in (*unets, vae, text_encoder)
    )
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    return BasePair(
        name=name,
        teacher=teacher,
        student=student,
        teacher_layout=layouts[0],
        student_layout=layouts[1],
        teacher_kv=kv[0],
        student_kv=kv[1],
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=letter_tokenizer(),
        teacher_schedule=NoiseSchedule.from_config(TEACHER_SCHEDULE),
        student_schedule=NoiseSchedule.from_config(STUDENT_SCHEDULE),
        resolution=resolution,
        latent_shape=(vae.config.latent_channels, side, side),
        hash=f"random-{name}",
        dtype=dtype,
        device=kv[0].device,
    )


def _frozen(network: nn.Module, dtype: torch.dtype) -> Any:
    return nn.Module.to(freeze(network), dtype)  # diffusers' own `to` only adds a warning


def _backbone(name: str, network: Any, dtype: torch.dtype) -> Backbone:
    """Wrap an image network; how its input is normalised takes the same time for all."""
    half = torch.full((3,), 0.5, device=network.device)
    return Backbone(
        name=name,
        network=_frozen(network, dtype),
        dim=network.config.hidden_size,
        side=network.config.image_size,
        mode="bicubic",
        mean=half,
        std=half,
    )


def letter_tokenizer() -> Any:
    """Make a CLIP tokenizer that knows single characters; its ids fit every text encoder."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation]
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=[], model_max_length=LENGTH)
