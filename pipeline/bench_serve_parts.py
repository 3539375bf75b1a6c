"""What a benchmark of serving draws with: a base, made-up adapters, plain diffusers' pipeline."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from model.adapter import Adapter, load_adapter, write_adapter
from model.adapter_meta import AdapterInfo, describe
from model.base_pair import BasePair, load_base_pair
from model.low_rank import DOWN, UP, WHOLE
from model.randomness import generator, normal
from model.sampler import picture_noise
from pipeline.base import own_base
from pipeline.bench_bases import MINI, RANDOM_BASES, STUDENT_SCHEDULE, random_pair
from serve.registry import Pinned

TOKEN, NOUN = "<new1>", "dog"
_STRENGTH = 0.3  # of a delta, against the base's weights
_RESOLUTION = {MINI: 64}
_FULL_RESOLUTION = 512
_SUBJECTS = ("on the beach", "in the snow", "in a box", "on a table", "in the park", "at night")


@dataclass(frozen=True, eq=False)
class ServedBase:
    """A base that draws.

    Attributes:
        pair: what draws; the student stands in for the teacher.
        scheduler: the configuration of the student's scheduler.
        student: its directory, or None for random weights.
    """

    pair: BasePair
    scheduler: dict[str, Any]
    student: Path | None

    def plain(self) -> Any:
        """Give plain diffusers' pipeline of the same weights, with diffusers' own attention."""
        pair = self.pair
        unet = copy.deepcopy(pair.student)
        unet.set_attn_processor(AttnProcessor2_0())
        known = {key: value for key, value in self.scheduler.items() if not key.startswith("_")}
        pipeline = StableDiffusionPipeline(
            vae=pair.vae,
            text_encoder=pair.text_encoder,
            tokenizer=pair.tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(**known),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def served_base(base: str, dtype: torch.dtype, device: torch.device) -> ServedBase:
    """Load what draws of a base, or build one of random weights.

    Raises:
        InputError: when a base can't be loaded.
    """
    if base in RANDOM_BASES:
        pair = random_pair(base, _RESOLUTION.get(base, _FULL_RESOLUTION), 0, dtype, device)
        # An adapter names its base by a hash of the usual form.
        pair = replace(pair, hash=hashlib.sha256(pair.hash.encode()).hexdigest())
        return ServedBase(pair, STUDENT_SCHEDULE, None)
    if base == "pocket":
        from model.pocket import pocket_paths

        student, name = Path(pocket_paths().student), base
    else:
        own = own_base(base)
        student, name = Path(own["student"]), own["base"]
    pair = load_base_pair(student, student, name=name, dtype=dtype, device=device)
    config = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
    return ServedBase(pair, config, student)


def saved_base(base: str, dtype: torch.dtype, device: torch.device, folder: Path) -> ServedBase:
    """Make a base that other processes can load, and load it onto the CPU.

    One of random weights is built on `device` and saved to `folder`, as a diffusers directory.

    Raises:
        InputError: when a base can't be loaded.
    """
    cpu = torch.device("cpu")
    if base not in RANDOM_BASES:
        return served_base(base, dtype, cpu)
    made = served_base(base, dtype, device)
    side = made.pair.latent_shape[1]
    made.pair.student.register_to_config(sample_size=side)  # by it the resolution is known
    made.plain().save_pretrained(folder)
    pair = load_base_pair(folder, folder, name=made.pair.name, dtype=dtype, device=cpu)
    return ServedBase(pair, made.scheduler, folder)


def plain_pictures(pipeline: Any, pair: BasePair, prompts: Sequence[str], seed: int) -> list[Any]:
    """Draw one-step pictures with plain diffusers from the noise that our engine starts from."""
    noise = pair.student_schedule.noise_scale * picture_noise(
        pair, range(seed, seed + len(prompts))
    )
    drawn: Any = pipeline(
        list(prompts),
        num_inference_steps=1,
        guidance_scale=0.0,
        height=pair.resolution,
        width=pair.resolution,
        latents=noise.to(pair.device, pair.dtype),
    )
    return list(drawn.images)


def prompt(number: int) -> str:
    """Give a prompt that holds the concept's token; no two numbers give the same one."""
    return f"a photo of a {TOKEN} {NOUN} {_SUBJECTS[number % len(_SUBJECTS)]} {number}"


def write_adapters(
    cache: Path, pair: BasePair, count: int, rank: int, first: int = 0
) -> Iterator[Pinned]:
    """Write made-up low-rank adapters where the endpoint keeps the ones that it has fetched.

    Concepts are numbered from `first`.
    """
    layout, width = pair.student_layout, pair.student_kv.shape[1]
    spread = float(pair.student_kv.std()) * _STRENGTH
    for number in range(first, first + count):
        concept = f"concept-{number:04d}"
        gen = generator(number, concept, 0, "adapter")
        part = (spread / rank**0.5) ** 0.5
        delta = {}
        for name, rows in zip(layout.names, layout.slices, strict=True):
            layer, size = name.removesuffix(WHOLE), rows.stop - rows.start
            kept = min(rank, size, width)
            delta[layer + DOWN] = (normal((kept, width), gen) * part).half()
            delta[layer + UP] = (normal((size, kept), gen) * part).half()
        info = AdapterInfo(concept, NOUN, (TOKEN,), concept_digest=f"{number:064x}")
        meta = describe(info, pair) | {"rank": rank}
        made = Adapter(delta, normal((1, width), gen) * 0.02, meta, "")
        place = cache / "adapters" / concept / "new"
        sha256 = write_adapter(place, made)
        place.rename(place.with_name(sha256))
        yield Pinned(concept, "1", sha256, pair.hash)


def read_adapter(cache: Path, pinned: Pinned) -> Adapter:
    """Read one of them."""
    return load_adapter(cache / "adapters" / pinned.concept / pinned.sha256)
