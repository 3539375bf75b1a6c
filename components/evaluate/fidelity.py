"""Fidelity of pictures to a concept: identity by two networks, text agreement, distance to truth.

Identity is measured on the subject alone where it can be found (the sample concepts), so that a
picture gains nothing by copying the references' backgrounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from components.evaluate.evaluate import FeatureModels
from components.evaluate.truth import true_renders
from components.ingest.concept_folder import Concept, load_images
from model import judge as judges
from model import metrics
from model.judge import Judge
from model.views import square

_BATCH = 16


@dataclass(frozen=True)
class Fidelity:
    """Means over pictures.

    Attributes:
        identity: mean cosine to the references in CLIP's image embeddings, in [-1, 1].
        identity_independent: the same in the judge's features, which no training has seen.
        text: cosine of picture and prompt (with the class noun alone) in CLIP, in [-1, 1].
        truth: 1 minus the mean cosine to true renders in the judge's features, in [0, 2], smaller
            is better; None where the truth is not known.
    """

    identity: float
    identity_independent: float
    text: float
    truth: float | None


class FidelityMeter:
    """Measures pictures of one concept."""

    def __init__(self, concept: Concept, models: FeatureModels, judge: Judge, side: int) -> None:
        """Read the references.

        Args:
            concept: whose pictures are measured.
            models: CLIP is used.
            judge: the independent one.
            side: of the pictures in pixels.
        """
        self._models, self._judge, self._noun = models, judge, concept.class_noun
        self.truth = true_renders(concept.id, [image.sha256 for image in concept.images])
        self.references = torch.stack(
            [square(image, side) for image in load_images(concept, shorter_side=side)]
        )
        self._clip, self._judged = self._identities(self.references)

    @property
    def masked(self) -> bool:
        """Tell whether identity is measured on the subject alone."""
        return self.truth is not None

    def measure(self, prompts: Sequence[str], pictures: torch.Tensor) -> Fidelity:
        """Measure pictures of prompts.

        Args:
            prompts: P prompts with `{}` for the subject, the first P of `truth_prompts` where
                the truth is known.
            pictures: uint8 [P, K, 3, S, S], K a prompt.
        """
        count = pictures.shape[1]
        rows = pictures.flatten(0, 1)
        clip, judged = self._identities(rows)
        whole = torch.cat([self._models.clip.projected(x) for x in self._batches(rows)])
        texts = self._models.clip_text([prompt.format(self._noun) for prompt in prompts])
        return Fidelity(
            identity=float(metrics.mean_cosine(clip, self._clip).mean()),
            identity_independent=float(metrics.mean_cosine(judged, self._judged).mean()),
            text=float(metrics.clip_t(whole, texts.repeat_interleave(count, dim=0)).mean()),
            truth=self._distance(pictures),
        )

    def _distance(self, pictures: torch.Tensor) -> float | None:
        if self.truth is None:
            return None
        distances = []
        for drawn, true in zip(pictures, self.truth[: len(pictures)], strict=True):
            mine, theirs = (self._judge.features(self._signed(each)) for each in (drawn, true))
            distances.append(1 - metrics.mean_cosine(mine, theirs).mean())
        return float(torch.stack(distances).mean())

    @torch.no_grad()
    def _identities(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute CLIP's embeddings and the judge's features of pictures uint8 [R, 3, S, S]."""
        clip, judged = [], []
        for x in self._batches(rows):
            shown = self._judge.subjects(x) if self.masked else x
            clip.append(self._models.clip.projected(shown))
            judged.append(self._judge.features(shown))
        return torch.cat(clip), torch.cat(judged)

    def _batches(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [self._signed(part) for part in rows.split(_BATCH)]

    def _signed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Turn uint8 pictures into float32 in [-1, 1]."""
        return pictures.to(self._models.clip.mean.device).float() / 127.5 - 1


def model_names(models: FeatureModels) -> str:
    """Name the networks that the figures come from."""
    return f"{models.names}; independent: {judges.NAME}"
