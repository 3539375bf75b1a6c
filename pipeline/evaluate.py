"""Measuring versions that are registered already, as training does, and telling their gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.promote.promote import failings
from components.register.registry import RegisteredVersion, get_version
from components.spec import RunSpec
from model.names import CHAMPION
from pipeline.assess import Assessor
from pipeline.photos import Photos, photos_of
from pipeline.progress import Event, Progress
from pipeline.versions import find_version

if TYPE_CHECKING:
    from components.evaluate.evaluate import Metrics

SpecOf = Callable[[RegisteredVersion], RunSpec]


@dataclass(frozen=True)
class Evaluated:
    """A version that was measured.

    Attributes:
        version: with its new figures.
        found: the figures and what they were measured on.
        photos: that it was measured against.
        champion: whether it is its concept's champion.
        against: what the gate has against it; nothing: it passes.
        seconds: that the measuring took.
    """

    version: RegisteredVersion
    found: Metrics
    photos: Photos
    champion: bool
    against: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the gate lets it pass."""
        return not self.against

    def as_json(self) -> dict[str, Any]:
        """Give the shape of `--json`."""
        return {
            "concept": self.version.concept_id,
            "version": str(self.version.version),
            "sha256": self.version.sha256,
            "champion": self.champion,
            "metrics": self.found.figures(),
            "feature_models": self.found.feature_models,
            "protocol": self.found.protocol,
            "photos": {
                "place": self.photos.place,
                "count": len(self.photos.concept.images),
                "note": self.photos.note,
            },
            "passed": self.passed,
            "reasons": list(self.against),
            "image_paths": {name: str(path) for name, path in self.found.pictures.items()},
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    names: Sequence[str],
    spec_of: SpecOf,
    *,
    concepts: str | None,
    out: Path,
    tracking_uri: str,
    progress: Progress,
) -> list[Evaluated]:
    """Measure versions, write the figures to them and their pictures to their runs and `out`.

    Everything that is given is looked at before anything is drawn.

    Args:
        names: `<id>`, which means its champion, or `<id>@<version or alias>`.
        spec_of: gives the run spec of a version: base, feature models, prompts, seeds and gate.
        concepts: a place of the photos other than where training found them.
        out: the pictures of version 3 of `my-dog` go to `<out>/my-dog-v3`.
        tracking_uri: of the registry.
        progress: listens.

    Raises:
        InputError: for an unknown concept or version, photos that are missing, a wrong setting.
        ServiceError: when registry or S3 are out of reach, or the disk is full.
    """
    found = [find_version(name, tracking_uri) for name in names]
    versions = {(each.name, each.version): each for each in found}
    asked = []
    for version in versions.values():
        photos = photos_of(version, concepts, tracking_uri=tracking_uri)
        if photos.note:
            progress(Event("photos", version.concept_id, photos.note))
        asked.append((version, spec_of(version), photos))
    assessors: dict[str, Assessor] = {}
    results = []
    for version, spec, photos in asked:
        key = spec.model_dump_json(include={"base", "resolution", "evaluate", "train"})
        if key not in assessors:
            assessors[key] = Assessor(spec, tracking_uri, progress)
        results.append(_measure(assessors[key], version, spec, photos, out, tracking_uri))
    return results


def _measure(
    assessor: Assessor,
    version: RegisteredVersion,
    spec: RunSpec,
    photos: Photos,
    out: Path,
    tracking_uri: str,
) -> Evaluated:
    began = time.monotonic()
    folder = out / f"{version.concept_id}-v{version.version}"
    version, found = assessor.measure(version, photos.concept, out=folder)
    champion = get_version(version.concept_id, CHAMPION, tracking_uri=tracking_uri)
    reigns = champion is not None and champion.version == version.version
    against = failings(version, None if reigns else champion, spec.gate)
    return Evaluated(version, found, photos, reigns, tuple(against), time.monotonic() - began)
