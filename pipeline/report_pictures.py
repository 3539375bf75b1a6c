"""The pictures that a batch's report shows of a concept: its photos, and what the student draws."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from components.ingest import store
from components.ingest.concept_folder import Concept
from components.ingest.pictures import decode
from components.register.connection import connect
from components.register.registry import RegisteredVersion
from components.train.preview import PREVIEW_PROMPTS
from components.train.state import ConceptState
from model.adapter_meta import PREVIEW_FILE
from model.names import ADAPTER_ARTIFACT
from pipeline.report import SHOWN_PIXELS, Picture, Row

_PHOTOS = 4

log = logging.getLogger(__name__)


def pictures_of(
    one: ConceptState,
    version: RegisteredVersion | None,
    concept: Concept | None,
    registry: str,
    folder: Path,
) -> tuple[Row, ...]:
    """Fetch a concept's pictures into a folder; what can't be had is left out."""
    folder.mkdir(parents=True)
    noun = concept.class_noun if concept else one.id
    captions = [prompt.format(noun) for prompt in PREVIEW_PROMPTS]
    rows = [Row("Photos", _tried(one, lambda: _photos(concept, folder)))]
    if version is not None:
        rows.append(
            Row(
                "Student, one step",
                _tried(one, lambda: _preview(version, registry, folder, captions)),
            )
        )
    elif one.run_id is not None:
        rows.append(
            Row(
                "Student, one step, before it stopped",
                _tried(one, lambda: _sample(str(one.run_id), registry, folder, captions)),
            )
        )
    return tuple(row for row in rows if row.pictures)


def _tried(one: ConceptState, make: Callable[[], list[Picture]]) -> tuple[Picture, ...]:
    try:
        return tuple(make())
    except Exception as error:  # a report without a picture is better than none
        log.warning("a picture of %s can't be had: %s", one.id, error)
        return ()


def _photos(concept: Concept | None, folder: Path) -> list[Picture]:
    found: list[Picture] = []
    for image in concept.images[:_PHOTOS] if concept else ():
        entry = store.find(image.uri)
        if entry is not None:
            path = folder / f"photo-{len(found)}.png"
            decode(store.fetch(entry).read_bytes(), SHOWN_PIXELS).save(path)
            found.append(Picture(path, image.name))
    return found


def _preview(
    version: RegisteredVersion, registry: str, folder: Path, captions: list[str]
) -> list[Picture]:
    from mlflow.artifacts import download_artifacts

    client = connect(registry)
    source = client.get_model_version_download_uri(version.name, str(version.version))
    place = download_artifacts(
        artifact_uri=f"{source.rstrip('/')}/{ADAPTER_ARTIFACT}/{PREVIEW_FILE}",
        dst_path=str(folder),
        tracking_uri=registry,
    )
    return _tiles(Path(place), folder, captions)


def _sample(run_id: str, registry: str, folder: Path, captions: list[str]) -> list[Picture]:
    """Fetch the last pictures that were drawn while it trained."""
    client: Any = connect(registry)
    paths = sorted(item.path for item in client.list_artifacts(run_id, "samples"))
    if not paths:
        return []
    return _tiles(Path(client.download_artifacts(run_id, paths[-1], str(folder))), folder, captions)


def _tiles(grid: Path, folder: Path, captions: list[str]) -> list[Picture]:
    """Cut a row of square pictures into single ones."""
    tiles = []
    with Image.open(grid) as opened:
        side = opened.height
        for number, caption in zip(range(opened.width // side), captions, strict=False):
            path = folder / f"tile-{number}.png"
            opened.crop((number * side, 0, (number + 1) * side, side)).save(path)
            tiles.append(Picture(path, caption))
    return tiles
