"""Evaluate an adapter: CLIP-I, DINO and CLIP-T of its pictures, and of the base's before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from components.evaluate.prompts import prompt_templates
from components.evaluate.tags import BEFORE, MODELS_TAG, PHOTOS_TAG, PROTOCOL_TAG
from components.ingest.cache import file_sha256, replacing
from components.ingest.concept_folder import Concept, load_images
from model import metrics
from model.adapter import Adapter, load_adapter
from model.base_pair import BasePair
from model.discriminators import Backbone, load_backbone
from model.sampler import draw
from model.views import square

if TYPE_CHECKING:
    from components.register.registry import RegisteredVersion

_BATCH = 8
_GRID_PROMPTS, _GRID_SEEDS = 5, 4


@dataclass(frozen=True, eq=False)
class FeatureModels:
    """The models that features come from; ``names`` says which, with their contents' hash."""

    clip: Backbone
    clip_text: metrics.ClipText
    dino: Backbone
    names: str


@dataclass(frozen=True)
class Scores:
    """Means over all pictures, each in [-1, 1]."""

    clip_i: float
    dino: float
    clip_t: float


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found.

    ``after`` is the adapter, ``before`` the base student asked for the class noun alone.
    ``photos`` tells by 12 digits which reference photos it was measured against. ``pictures``
    are PNG grids by name: a row a prompt, a column a seed.
    """

    after: Scores
    before: Scores
    n_prompts: int
    n_seeds: int
    feature_models: str
    photos: str = ""
    pictures: dict[str, Path] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        """Say what was drawn; figures of different protocols are not compared."""
        return f"dreambench {self.n_prompts}x{self.n_seeds}"

    def figures(self) -> dict[str, float]:
        """Return all figures by name: clip_i, dino, clip_t, before_clip_i, ..."""
        before = {BEFORE + name: value for name, value in asdict(self.before).items()}
        return {**asdict(self.after), **before}


def load_feature_models(
    clip: Path,
    dino: Path,
    *,
    clip_name: str = "",
    dino_name: str = "",
    device: torch.device | str = "cpu",
) -> FeatureModels:
    """Load the metrics' models from local directories; the names are for the report.

    Raises InputError when a directory is not a whole CLIP, or not a DINO, DINOv2 or ViT.
    """
    names = ", ".join(
        f"{kind} {name or folder.name} ({_content_hash(folder)})"
        for kind, name, folder in (("CLIP", clip_name, clip), ("DINO", dino_name, dino))
    )
    return FeatureModels(
        clip=load_backbone(clip, device=device),
        clip_text=metrics.load_clip_text(clip, device=device),
        dino=load_backbone(dino, device=device),
        names=names,
    )


def _content_hash(folder: Path) -> str:
    """Return 12 digits that say which weights a directory holds."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()[:12]


def evaluate_adapter(
    adapter_dir: Path,
    concept: Concept,
    *,
    pair: BasePair,
    models: FeatureModels,
    prompts: int = 25,
    seeds: int = 4,
    out: Path | None = None,
) -> Metrics:
    """Draw DreamBench's prompts with and without an adapter and measure the pictures.

    Args:
        adapter_dir: a verified adapter folder.
        concept: its concept; the reference images are those of the metrics.
        pair: the base pair that the adapter was made for.
        models: the feature models.
        prompts: how many of the 25 prompts.
        seeds: pictures a prompt, of seeds 0, 1, ...
        out: folder for the grids before.png and after.png; None writes none.

    Raises:
        InputError: when the adapter is not whole or was made for another base.
    """
    adapter = load_adapter(adapter_dir)
    adapter.check_base(pair)
    templates = prompt_templates(concept.live, prompts)
    plain = [template.format(concept.class_noun) for template in templates]
    phrase = f"{' '.join(adapter.tokens)} {concept.class_noun}"
    named = [template.format(phrase) for template in templates]
    references = _references(concept, models, pair.resolution)
    texts = models.clip_text(plain).repeat_interleave(seeds, dim=0)
    before = _measure(pair, None, plain, seeds, models, references, texts)
    after = _measure(pair, adapter, named, seeds, models, references, texts)
    pictures = {}
    if out is not None:
        for name, (_, drawn) in (("before", before), ("after", after)):
            pictures[name] = out / f"{name}.png"
            _write_grid(drawn, seeds, pictures[name])
    photos = photos_hash([image.sha256 for image in concept.images])
    return Metrics(after[0], before[0], len(templates), seeds, models.names, photos, pictures)


def photos_hash(digests: Sequence[str]) -> str:
    """Return 12 digits that say which photos there are, in whatever order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:12]


def _references(
    concept: Concept, models: FeatureModels, resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return CLIP embeddings [F, e] and DINO features [F, d] of the reference images."""
    side = max(resolution, models.clip.side, models.dino.side)
    embeddings, features = [], []
    with torch.no_grad():
        for image in load_images(concept, shorter_side=side):
            picture = _signed(square(image, side)[None], models.clip.mean.device)
            embeddings.append(models.clip.projected(picture))
            features.append(models.dino.features(picture))
    return torch.cat(embeddings), torch.cat(features)


def _measure(
    pair: BasePair,
    adapter: Adapter | None,
    prompts: Sequence[str],
    seeds: int,
    models: FeatureModels,
    references: tuple[torch.Tensor, torch.Tensor],
    texts: torch.Tensor,
) -> tuple[Scores, torch.Tensor]:
    """Draw prompts x seeds; returns their scores and the pictures, uint8 [P * K, 3, S, S]."""
    drawn, embeddings, features = [], [], []
    rows = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    with torch.no_grad():
        for batch in _batches(rows):
            words, numbers = zip(*batch, strict=True)
            pictures = draw(pair, [adapter] * len(batch), words, numbers)
            signed = _signed(pictures, models.clip.mean.device)
            drawn.append(pictures)
            embeddings.append(models.clip.projected(signed))
            features.append(models.dino.features(signed))
    embedded = torch.cat(embeddings)
    scores = Scores(
        clip_i=float(metrics.clip_i(embedded, references[0]).mean()),
        dino=float(metrics.dino(torch.cat(features), references[1]).mean()),
        clip_t=float(metrics.clip_t(embedded, texts).mean()),
    )
    return scores, torch.cat(drawn)


def _batches(rows: Sequence[tuple[str, int]]) -> Iterator[Sequence[tuple[str, int]]]:
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]


def _signed(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Turn uint8 pictures into float32 in [-1, 1]."""
    return pictures.to(device).float() / 127.5 - 1


def _write_grid(drawn: torch.Tensor, seeds: int, path: Path) -> None:
    """Write some of the pictures as a grid: a row a prompt, a column a seed."""
    n_prompts = len(drawn) // seeds
    count = min(n_prompts, _GRID_PROMPTS)
    chosen = [index * n_prompts // count for index in range(count)]
    by_prompt = drawn.unflatten(0, (n_prompts, seeds))[chosen, : min(seeds, _GRID_SEEDS)]
    grid = torch.cat([torch.cat(list(row), dim=2) for row in by_prompt], dim=1)
    with replacing(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, "PNG")


def record_metrics(
    version: RegisteredVersion, found: Metrics, *, tracking_uri: str, card: str = ""
) -> RegisteredVersion:
    """Write an evaluation to a version's tags and its run, grids included.

    ``card`` becomes the version's description (Markdown). The figures come last: a version that has
    them counts as measured.
    """
    from components.register.connection import connect, reaching
    from components.register.registry import set_metrics, set_tags

    how = {
        MODELS_TAG: found.feature_models,
        PROTOCOL_TAG: found.protocol,
        PHOTOS_TAG: found.photos,
    }
    client = connect(tracking_uri)
    with reaching(tracking_uri):
        if card:
            client.update_model_version(version.name, str(version.version), card)
        for path in found.pictures.values() if version.run_id else ():
            client.log_artifact(version.run_id, str(path), "evaluation")
    set_tags(version, how, tracking_uri=tracking_uri)
    return set_metrics(version, found.figures(), tracking_uri=tracking_uri)
