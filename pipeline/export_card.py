"""The README of an export: how to draw with it, and how far its pictures are off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

POCKET = "pocket:"
_KOHYA = (
    "\nFor sd-scripts and the programs that read its files: the LoRA file holds the UNet's "
    "cross-attention keys and values, the embedding file the token's vector under `emb_params`.\n"
)


@dataclass(frozen=True)
class Exported:
    """What an export is.

    Attributes:
        concept: id of the concept.
        version: its version in the registry, None for a folder.
        sha256: of the adapter that was exported.
        format: a name of `model.export_formats.FORMATS`.
        rank: of the exported factors; None for whole matrices.
        error: against the adapter: `weights` (relative, Frobenius) and `pictures` (levels of 255).
        stored_rank: the rank of the adapter itself, None when whole.
        stored_error: its own error against what was trained, or None.
        weights: path of the weights file within the folder.
        embeddings: paths of the embedding files, one a token.
        tokens: the concept's tokens.
        prompt: of the example picture.
        base: the student that it was made for.
        latent_shape: (c, h, w).
        noise_scale: what the base's student wants its noise multiplied by.
        sizes: bytes by path.
    """

    concept: str
    version: int | None
    sha256: str
    format: str
    rank: int | None
    error: dict[str, float]
    stored_rank: int | None
    stored_error: dict[str, float] | None
    weights: str
    embeddings: tuple[str, ...]
    tokens: tuple[str, ...]
    prompt: str
    base: str
    latent_shape: tuple[int, int, int]
    noise_scale: float
    sizes: dict[str, int]

    def document(self) -> dict[str, Any]:
        """Return what `export.json` and `--json` tell."""
        return {
            "concept": self.concept,
            "version": None if self.version is None else str(self.version),
            "sha256": self.sha256,
            "format": self.format,
            "rank": self.rank,
            "off": self.error,
            "stored_rank": self.stored_rank,
            "stored_off": self.stored_error,
            "base": self.base,
            "prompt": self.prompt,
            "noise_scale": self.noise_scale,
            "files": self.sizes,
        }


def readme(export: Exported) -> str:
    """Write the README of an export."""
    rank = "whole matrices" if export.rank is None else f"rank {export.rank}"
    head = (
        f"# {export.concept} for {export.format}\n\n"
        f"Made by EchoDistill from the adapter `{export.sha256}`, for the base `{export.base}`: "
        f"{rank}. Against the adapter itself the weights are off by {export.error['weights']:.2%} "
        f"and the pictures by {export.error['pictures']:.2f} levels of 255 (the mean absolute "
        f"difference of the test picture that differs most). {_stored(export)}"
        f"`example.png` is the adapter's own picture of {export.prompt!r}, seed 0, in one step.\n\n"
    )
    return head + (_comfyui(export) if export.format == "comfyui" else _python(export))


def _stored(export: Exported) -> str:
    error = export.stored_error
    if error is None:
        return ""
    return (
        f"The adapter itself was stored in rank {export.stored_rank}: its pictures differ from "
        f"those of the whole one by {error['pictures']:.2f} levels at most "
        f"(`adapter.max_picture_error` bounds that), its weights by {error['weights']:.0%}. "
    )


def _python(export: Exported) -> str:
    return (
        "With plain diffusers (`pip install diffusers transformers peft accelerate`), in this "
        f"folder:\n\n```python\n{python_lines(export)}```\n\n"
        "`example.png` and this picture differ by the error above and by round-off. EchoDistill's "
        "own sampler does the same sums in float32: the student's first and only step from "
        f"t = 999, no guidance, the noise from the seed alone{_scaled(export, ', times {}')}.\n"
        + (_KOHYA if export.format == "kohya" else "")
    )


def _scaled(export: Exported, words: str) -> str:
    """Put the scale of the noise into words, where there is one."""
    return "" if export.noise_scale == 1 else words.format(export.noise_scale)


def python_lines(export: Exported) -> str:
    """Write the Python that draws the example with plain diffusers."""
    whole = export.format == "full"
    loads = [f"pipe.load_lora_weights('.', weight_name={export.weights!r})"]
    if whole:
        loads = [f"pipe.unet.load_state_dict(load_file({export.weights!r}), strict=False)"]
    loads += [
        f"pipe.load_textual_inversion('.', weight_name={path!r}, token={token!r})"
        for path, token in zip(export.embeddings, export.tokens, strict=True)
    ]
    imports = ["import hashlib", "import json", ""]
    if export.base.startswith(POCKET):
        place = "str(pocket_paths().student)"
        third = ["from model.pocket import pocket_paths  # EchoDistill's own small base"]
    else:
        place, third = f"{export.base!r}  # a hub id, or the path of a local copy", []
    imports += [
        "import torch",
        "from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline",
        *(["from safetensors.torch import load_file"] if whole else []),
        *third,
    ]
    shape = ", ".join(map(str, (1, *export.latent_shape)))
    scaled = _scaled(export, "{} * ")
    lines = [
        *imports,
        "",
        f"BASE = {place}",
        "pipe = StableDiffusionPipeline.from_pretrained(BASE)",
        "pipe.scheduler = EulerDiscreteScheduler.from_config(",
        "    pipe.scheduler.config, timestep_spacing='trailing'",
        ")",
        *loads,
        "",
        "seed = 0  # the endpoint's picture of the same seed",
        "key = json.dumps([seed, 'picture', 0, 'noise', 0]).encode()",
        "number = int.from_bytes(hashlib.sha256(key).digest()[:8], 'big')",
        "generator = torch.Generator().manual_seed(number)",
        "picture = pipe(",
        f"    {export.prompt!r},",
        f"    latents={scaled}torch.randn({shape}, generator=generator),",
        "    num_inference_steps=1,",
        "    guidance_scale=0.0,",
        ").images[0]",
        "picture.save('picture.png')",
    ]
    return "\n".join(lines) + "\n"


def _comfyui(export: Exported) -> str:
    names = [path.rpartition("/")[2].removesuffix(".safetensors") for path in export.embeddings]
    prompt = export.prompt
    for token, name in zip(export.tokens, names, strict=True):
        prompt = prompt.replace(token, f"embedding:{name}")
    whole = ", from whole noise, where EchoDistill's is taken times {}"
    return (
        "Copy `models` over ComfyUI's own folder of that name. Then:\n\n"
        "1. CheckpointLoaderSimple: the base's checkpoint (`sd_turbo.safetensors` for SD-Turbo).\n"
        f"2. LoraLoaderModelOnly: `{export.weights.rpartition('/')[2]}`, strength 1.0.\n"
        f"3. CLIPTextEncode: `{prompt}` (`embedding:{names[0]}` stands for `{export.tokens[0]}`).\n"
        "4. SamplerCustom: SDTurboScheduler with 1 step and denoise 1.0, KSamplerSelect `euler`, "
        "cfg 1.0.\n\n"
        "ComfyUI makes other noise of a seed than EchoDistill, so a seed gives another picture of "
        f"the same subject{_scaled(export, whole)}. "
        "It knows networks of Stable Diffusion's own sizes only.\n"
    )


def human(export: Exported, folder: str) -> Sequence[str]:
    """Write the lines that a person reads after an export."""
    rank = "whole matrices" if export.rank is None else f"rank {export.rank}"
    size = sum(export.sizes.values())
    version = "" if export.version is None else f" version {export.version}"
    lines = [
        folder,
        f"{export.concept}{version} ({export.sha256[:12]}) for {export.format}: {rank}, "
        f"{size / 1e6:.2f} MB; weights off by {export.error['weights']:.2%}, pictures by "
        f"{export.error['pictures']:.2f} of 255 levels",
    ]
    if export.stored_error is not None:
        off = export.stored_error
        lines.append(
            f"the adapter itself was stored in rank {export.stored_rank}: its pictures differ from "
            f"the whole one's by {off['pictures']:.2f} levels at most, which "
            f"adapter.max_picture_error bounds, its weights by {off['weights']:.0%}"
        )
    if export.format == "comfyui" and export.base.startswith("pocket:"):
        lines.append(
            "warning: ComfyUI knows networks of Stable Diffusion's own sizes only, and the pocket "
            "pair is not one"
        )
    return lines
