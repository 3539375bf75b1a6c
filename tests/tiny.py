"""Tiny real models for tests: every network is the real class at a toy size, random weights.

`build_tiny_pair(folder)` writes ordinary diffusers and transformers directories in about a second;
a picture takes milliseconds on one core.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

SIDE = 32
FACTOR = 4
LENGTH = 16
D_TEXT = 32
_WORDS = (
    *("photo", "dog", "cat", "robot", "red", "the", "small", "beach", "of", "on", "in", "my"),
    *("rendering", "rendition", "cropped", "clean", "dirty", "dark", "cool", "bright", "good"),
    *("one", "nice", "weird", "large", "zoomed", "close", "up", "far", "away", "very"),
)


@dataclass(frozen=True)
class TinyPaths:
    """Where the tiny models lie; the same names as the pocket pair's paths.

    Attributes:
        teacher: diffusers directory, DDIM.
        student: diffusers directory, Euler trailing; shares all but the UNet with the teacher.
        clip: CLIPModel directory with tokenizer and preprocessor_config.json.
        dino: Dinov2Model directory with preprocessor_config.json.
        vit: ViTModel directory with preprocessor_config.json.
        concepts: folder of two sample concepts, `<id>/00.png.. + concept.yaml`.
    """

    teacher: Path
    student: Path
    clip: Path
    dino: Path
    vit: Path
    concepts: Path


def build_tiny_pair(
    folder: str | Path,
    *,
    teacher_prediction: str = "v_prediction",
    student_prediction: str = "epsilon",
    seed: int = 0,
) -> TinyPaths:
    """Write the tiny pair, backbones and concepts under `folder`: 32 px, latent 4x8x8, length 16.

    Args:
        folder: where to write; made when missing.
        teacher_prediction: `epsilon` or `v_prediction`.
        student_prediction: the same of the student.
        seed: of the random weights.
    """
    root = Path(folder)
    paths = TinyPaths(*(root / name for name in TinyPaths.__dataclass_fields__))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_pair(paths, teacher_prediction, student_prediction)
        _write_backbones(paths)
    write_concepts(paths.concepts)
    return paths


def want_less_noise(student: Path, scale: float) -> None:
    """Have a student want its noise multiplied by `scale` for pictures in one step."""
    config = student / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_noise_scale": scale}))


def write_concepts(folder: Path, ids: tuple[str, ...] = ("tiny-dog", "tiny-robot")) -> None:
    """Write sample concepts: three coloured 40x48 pictures each, and a concept.yaml."""
    for n, concept_id in enumerate(ids):
        place = folder / concept_id
        place.mkdir(parents=True, exist_ok=True)
        gen = torch.Generator().manual_seed(100 + n)
        noun = "robot" if "robot" in concept_id else "dog"
        for i in range(3):
            colours = torch.rand(3, 6, 5, generator=gen)
            picture = torch.nn.functional.interpolate(colours[None], size=(48, 40), mode="bilinear")
            pixels = (picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / f"{i:02d}.png")
        (place / "concept.yaml").write_text(
            f"class_noun: {noun}\ntoken: <new1>\ninitializer: {noun}\nlive: {str(not n).lower()}\n"
        )


def write_tokenizer(folder: Path) -> int:
    """Write a small CLIP tokenizer (bytes, and merges for a few words); gives its size."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = _byte_characters()
    vocabulary = characters + [c + "</w>" for c in characters]
    merges: list[str] = []
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(vocabulary)) == len(vocabulary)
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def text_config(size: int) -> CLIPTextConfig:
    """Give the text encoder's configuration for a vocabulary of `size` tokens."""
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=D_TEXT,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def _write_pair(paths: TinyPaths, teacher_prediction: str, student_prediction: str) -> None:
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
        scaling_factor=0.5,
    )
    size = write_tokenizer(paths.teacher / "tokenizer")
    write_tokenizer(paths.student / "tokenizer")
    text_encoder = CLIPTextModel(text_config(size))
    text_encoder.get_input_embeddings().weight.data.mul_(10)  # words should differ visibly
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ddim = DDIMScheduler(
        **betas,
        prediction_type=teacher_prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    euler = EulerDiscreteScheduler(
        **betas, prediction_type=student_prediction, timestep_spacing="trailing"
    )
    for place, scheduler in ((paths.teacher, ddim), (paths.student, euler)):
        unet = UNet2DConditionModel(
            sample_size=SIDE // FACTOR,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=D_TEXT,
            attention_head_dim=[2, 4],
            norm_num_groups=8,
            use_linear_projection=True,
        )
        unet.save_pretrained(place / "unet")
        vae.save_pretrained(place / "vae")
        text_encoder.save_pretrained(place / "text_encoder")
        scheduler.save_pretrained(place / "scheduler")
        _write_index(place, type(scheduler).__name__)


def _write_index(place: Path, scheduler: str) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (place / "model_index.json").write_text(json.dumps(index, indent=2))


def _write_backbones(paths: TinyPaths) -> None:
    size = write_tokenizer(paths.clip)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
    }
    config = CLIPConfig(
        text_config=text_config(size).to_dict(), vision_config=vision, projection_dim=24
    )
    CLIPModel(config).save_pretrained(paths.clip)
    small = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    Dinov2Model(Dinov2Config(image_size=28, patch_size=7, mlp_ratio=2, **small)).save_pretrained(
        paths.dino
    )
    ViTModel(
        ViTConfig(image_size=SIDE, patch_size=8, intermediate_size=48, **small),
        add_pooling_layer=False,
    ).save_pretrained(paths.vit)
    for place, side, kind in (
        (paths.clip, SIDE, "CLIPImageProcessor"),
        (paths.dino, 28, "BitImageProcessor"),
        (paths.vit, SIDE, "ViTImageProcessor"),
    ):
        _write_preprocessor(place, side, kind)


def _write_preprocessor(place: Path, side: int, kind: str) -> None:
    config = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (place / "preprocessor_config.json").write_text(json.dumps(config))


def _byte_characters() -> list[str]:
    """Give the 256 printable characters that stand for bytes in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + n for n in range(256 - len(printable))]
    return [chr(c) for c in printable + others]
