"""The reference photos that a version is measured against: those it was trained on, or others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from components.ingest import pictures, store
from components.ingest.concept_folder import Concept, ReferenceImage, check_prefix
from components.register.registry import RegisteredVersion
from components.train.lineage import source_of, trained_on
from model.errors import InputError
from pipeline.versions import run_of


@dataclass(frozen=True)
class Photos:
    """A concept with the photos to measure against.

    Attributes:
        concept: the concept.
        place: the folder or prefix of its photos.
        note: how they differ from those it was trained on, or "".
    """

    concept: Concept
    place: str
    note: str = ""


def photos_of(version: RegisteredVersion, given: str | None, *, tracking_uri: str) -> Photos:
    """Find a version's reference photos.

    Args:
        version: which one.
        given: a folder or s3:// prefix of concepts, or this concept's own folder; by default the
            photos are where the version's run found them.
        tracking_uri: of the registry.

    Raises:
        InputError: when there are none, or one can't be used.
        ServiceError: when S3 or the tracking server are out of reach.
    """
    run = run_of(version, tracking_uri)
    recorded = None if run is None else trained_on(run)
    if given is not None:
        concept = _named(version.concept_id, given)
        note = "" if recorded is None else _difference(concept.images, recorded.images)
        return Photos(concept, source_of(concept), note)
    if recorded is None:
        raise InputError(
            f"the run of {version.concept_id} version {version.version} does not say which photos "
            "it was trained on: name their place with --concepts"
        )
    return _as_they_are(version, recorded)


def _named(concept_id: str, place: str) -> Concept:
    """Return a concept of a prefix, checked."""
    checked = {one.id: one for one in check_prefix(place)}
    found = checked.get(concept_id)
    if found is None:
        there = ", ".join(list(checked)[:5])
        raise InputError(f"{place} has no concept {concept_id} (it has {there}): give its prefix")
    if found.concept is None:
        problems = "; ".join(found.problems)
        raise InputError(f"{concept_id} below {place} can't be measured against: {problems}")
    return found.concept


def _as_they_are(version: RegisteredVersion, recorded: Concept) -> Photos:
    """Read the photos that a version was trained on, wherever they are now the same or not."""
    place = source_of(recorded)
    images, changed = [], []
    for image in recorded.images:
        entry = store.find(image.uri)
        if entry is None:
            raise InputError(
                f"{image.uri} is gone, a photo that {version.concept_id} version "
                f"{version.version} was trained on: name another place with --concepts"
            )
        path = store.fetch(entry)
        found = _checked(image, path)
        changed += [image.name] if found.sha256 != image.sha256 else []
        images.append(found)
    note = ""
    if changed:
        note = (
            f"{len(changed)} of {len(images)} photos changed since it was trained: "
            f"{', '.join(changed)}"
        )
    return Photos(replace(recorded, images=tuple(images)), place, note)


def _checked(image: ReferenceImage, path: Path) -> ReferenceImage:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    found = pictures.check(data, image.name)
    if isinstance(found, str):
        raise InputError(f"{image.uri} {found}, or name another place with --concepts")
    return replace(
        image, path=str(path), sha256=found.sha256, width=found.width, height=found.height
    )


def _difference(now: Sequence[ReferenceImage], then: Sequence[ReferenceImage]) -> str:
    """Say how photos differ from those of the training."""
    mine, theirs = {image.sha256 for image in now}, {image.sha256 for image in then}
    if mine == theirs:
        return ""
    return (
        f"these are other photos than it was trained on: {len(mine & theirs)} of {len(theirs)} "
        f"are still there, {len(mine - theirs)} are new"
    )
