"""The base pair: a multi-step teacher and a one-step student that share everything else.

Both are ordinary diffusers directories. They may share files on disk; what counts is that text
encoder, tokenizer and VAE have the same values at fp16, since published weights of one model
differ in precision and bytes.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from model.cross_attention import base_weight, expose_keys_values
from model.errors import InputError
from model.kv_layout import KVLayout
from model.schedule import NOISE_SCALE, NoiseSchedule

_PROBES = (
    "A photo of a dog, 25% off!",
    "it's the 3rd café; don't (really) say <new1> naïvely",
    "supercalifragilistic " * 4,
)

_SCHEDULE_KEYS = (
    "_class_name",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "timestep_spacing",
)


@dataclass(frozen=True, eq=False)
class BasePair:
    """A loaded base pair; every network is frozen and in eval mode.

    Attributes:
        name: the user's name of the pair.
        teacher: UNet `T`, keys and values from outside.
        student: UNet `S`, the same.
        teacher_layout: rows of the teacher's K/V matrix.
        student_layout: rows of the student's.
        teacher_kv: base K/V matrix of the teacher [C_T, d], float32.
        student_kv: base K/V matrix of the student [C_S, d], float32.
        vae: `E` and `D`.
        text_encoder: `tau`.
        tokenizer: its tokenizer.
        teacher_schedule: noise schedule of the teacher.
        student_schedule: noise schedule of the student.
        resolution: side of a picture in pixels.
        latent_shape: (c, h, w) of a latent.
        hash: sha256 (hex) over the fp16 values of all that the student's picture depends on.
        dtype: type of the frozen networks.
        device: where they are.
    """

    name: str
    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    teacher_layout: KVLayout
    student_layout: KVLayout
    teacher_kv: torch.Tensor
    student_kv: torch.Tensor
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Any
    teacher_schedule: NoiseSchedule
    student_schedule: NoiseSchedule
    resolution: int
    latent_shape: tuple[int, int, int]
    hash: str
    dtype: torch.dtype
    device: torch.device

    @property
    def factor(self) -> int:
        """Give the pixels per latent pixel, 8 for Stable Diffusion."""
        return self.resolution // self.latent_shape[1]

    def encode_images(self, x: torch.Tensor) -> torch.Tensor:
        """Encode images [R, 3, S, S] in [-1, 1] to latents `z = s * E(x)` [R, c, h, w], float32.

        `E(x)` is the posterior's mean: no draw is needed, and equal views give equal latents.
        """
        posterior: Any = self.vae.encode(x.to(self.device, self.dtype))
        shift = self.vae.config.get("shift_factor") or 0.0
        return (posterior.latent_dist.mode().float() - shift) * self.vae.config.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Decode latents to images `D(z / s)` [R, 3, S, S], about [-1, 1], float32."""
        shift = self.vae.config.get("shift_factor") or 0.0
        latents = z / self.vae.config.scaling_factor + shift
        out: Any = self.vae.decode(latents.to(self.device, self.dtype))
        return out.sample.float()

    def denoise(
        self, unet: UNet2DConditionModel, z_t: torch.Tensor, t: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        """Run a UNet of the pair on states [R, c, h, w] at `t` [R] with keys and values [R, L, C].

        Returns its prediction, float32.
        """
        states = z_t.to(self.device, self.dtype)
        layout = self.teacher_layout if unet is self.teacher else self.student_layout
        pieces = layout.cut(kv.to(self.dtype))
        out: Any = unet(states, t.to(self.device), encoder_hidden_states=pieces)
        return out.sample.float()


def load_base_pair(
    teacher_dir: str | Path,
    student_dir: str | Path,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    resolution: int | None = None,
) -> BasePair:
    """Load two local diffusers directories as a base pair, from safetensors only.

    Args:
        teacher_dir: multi-step model.
        student_dir: one-step model.
        name: what to call the pair.
        dtype: type of the frozen networks; base K/V matrices are float32 always.
        device: where to put them.
        resolution: side in pixels; by default what the student was made for.

    Raises:
        InputError: when a directory is not whole, or the two do not share text encoder,
            tokenizer or VAE (the first difference is named).
    """
    teacher_dir, student_dir = Path(teacher_dir), Path(student_dir)
    device = torch.device(device)
    vae, text_encoder, tokenizer = _load_shared(teacher_dir, student_dir)
    teacher = load_part(UNet2DConditionModel, teacher_dir / "unet")
    student = load_part(UNet2DConditionModel, student_dir / "unet")
    teacher_layout, student_layout = expose_keys_values(teacher), expose_keys_values(student)
    teacher_kv, student_kv = (
        base_weight(teacher, teacher_layout).to(device),
        base_weight(student, student_layout).to(device),
    )
    student_config = _scheduler_config(student_dir)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    resolution = resolution or student.config.sample_size * factor
    if resolution % (factor * 2 ** (len(student.config.block_out_channels) - 1)):
        raise InputError(
            f"Resolution {resolution} does not fit the networks of {student_dir}; "
            f"use {student.config.sample_size * factor}."
        )
    side = resolution // factor
    student_schedule = NoiseSchedule.from_config(student_config)
    digest = _hash(student, vae, text_encoder, tokenizer, student_config)
    for network in (teacher, student, vae, text_encoder):
        nn.Module.to(freeze(network), device, dtype)  # diffusers' own `to` only adds a warning
    return BasePair(
        name=name,
        teacher=teacher,
        student=student,
        teacher_layout=teacher_layout,
        student_layout=student_layout,
        teacher_kv=teacher_kv,
        student_kv=student_kv,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        teacher_schedule=NoiseSchedule.from_config(_scheduler_config(teacher_dir)),
        student_schedule=student_schedule,
        resolution=resolution,
        latent_shape=(vae.config.latent_channels, side, side),
        hash=digest,
        dtype=dtype,
        device=device,
    )


def freeze(network: nn.Module) -> nn.Module:
    """Put a network in eval mode with no gradient to its weights; returns it."""
    return network.eval().requires_grad_(False)


def load_part(kind: Any, folder: Path, **more: Any) -> Any:
    """Load one network of a directory in float32, from safetensors only.

    Args:
        kind: a diffusers or transformers model class.
        folder: its folder.
        more: further options of the class.

    Raises:
        InputError: when the folder is missing or not whole.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give a whole diffusers directory.")
    options: dict[str, Any] = {
        "torch_dtype" if issubclass(kind, ModelMixin) else "dtype": torch.float32,
        "use_safetensors": True,
        "output_loading_info": True,
        **more,
    }
    if _only_fp16(folder):
        options["variant"] = "fp16"
    try:
        with _quiet():
            network, found = kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{folder} cannot be loaded ({_first_line(error)}); give whole safetensors weights."
        ) from error
    absent = sorted(map(str, found["missing_keys"])) + sorted(map(str, found["mismatched_keys"]))
    if absent:
        raise InputError(f"{folder} lacks the weight {absent[0]!r}; give whole weights.")
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bars and reports off the user's terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _only_fp16(folder: Path) -> bool:
    """Tell whether a folder has `*.fp16.safetensors` weights and no others."""
    weights = [path.name for path in folder.glob("*.safetensors")]
    return bool(weights) and all(".fp16" in name for name in weights)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _scheduler_config(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({_first_line(error)}); give a whole diffusers directory."
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """Load a CLIP tokenizer from its folder.

    Raises:
        InputError: when the folder is not whole.
    """
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no vocab.json; give a whole diffusers directory.")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} cannot be loaded ({_first_line(error)}); give a whole CLIP tokenizer."
        ) from error


def _load_shared(teacher_dir: Path, student_dir: Path) -> tuple[Any, Any, Any]:
    """Load the student's VAE, text encoder and tokenizer; check that the teacher's are the same."""
    loaded: list[Any] = []
    for part, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        mine = load_part(kind, student_dir / part)
        if (teacher_dir / part).resolve() != (student_dir / part).resolve():
            other = load_part(kind, teacher_dir / part)
            difference = _difference(mine, other)
            if difference is not None:
                raise InputError(
                    f"{teacher_dir} and {student_dir} differ in {part} at {difference!r}; "
                    "teacher and student must share it."
                )
        loaded.append(mine)
    tokenizer = load_tokenizer(student_dir / "tokenizer")
    if _tokenizer_facts(tokenizer) != _tokenizer_facts(load_tokenizer(teacher_dir / "tokenizer")):
        raise InputError(
            f"{teacher_dir} and {student_dir} differ in their tokenizer; "
            "teacher and student must share it."
        )
    return loaded[0], loaded[1], tokenizer


def _difference(mine: nn.Module, other: nn.Module) -> str | None:
    """Name the first parameter in which two networks differ at fp16, or None."""
    a, b = mine.state_dict(), other.state_dict()
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            return name
        if not torch.equal(a[name].half(), b[name].half()):
            return name
    for key in ("scaling_factor", "shift_factor"):
        if getattr(mine.config, key, None) != getattr(other.config, key, None):
            return key
    return None


def _tokenizer_facts(tokenizer: Any) -> str:
    """Describe a tokenizer by what it does: its vocabulary and its ids of probing texts."""
    encoded = tokenizer(list(_PROBES), padding="max_length", truncation=True)["input_ids"]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return json.dumps([vocabulary, encoded, tokenizer.model_max_length])


def _hash(
    student: nn.Module, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any, scheduler: Any
) -> str:
    digest = hashlib.sha256()
    for part, network in (("unet", student), ("vae", vae), ("text_encoder", text_encoder)):
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().half().cpu().contiguous().numpy().data)
    # The settings, not the numbers made from them: those may differ in the last bit elsewhere.
    schedule = {key: scheduler.get(key) for key in _SCHEDULE_KEYS}
    if scheduler.get(NOISE_SCALE, 1) != 1:
        schedule[NOISE_SCALE] = float(scheduler[NOISE_SCALE])
    scaling = [vae.config.get(key) for key in ("scaling_factor", "shift_factor")]  # type: ignore[operator, union-attr]
    digest.update(json.dumps([schedule, scaling], sort_keys=True).encode())
    digest.update(_tokenizer_facts(tokenizer).encode())
    return digest.hexdigest()
