"""Pictures of a registered concept on this machine, without a server."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.ingest.cache import cache_root, disk_error, replacing, replacing_folder
from components.register.registry import RegisteredVersion, fetch_adapter
from model.errors import EchoDistillError, InputError
from pipeline.progress import Event, Progress
from pipeline.tracking import registry_to_read
from pipeline.versions import find_version

if TYPE_CHECKING:
    import torch

    from model.adapter import Adapter

STEPS = (1, 2, 4)
LARGEST_N = 64
_NAME_LENGTH = 48


@dataclass(frozen=True)
class Generated:
    """What was drawn: files in the order of their seeds, by which version, with which words."""

    concept: str
    version: int
    sha256: str
    prompt: str
    seeds: tuple[int, ...]
    paths: tuple[Path, ...]
    seconds: float


def generate(
    concept: str,
    prompt: str,
    *,
    seed: int,
    steps: int,
    n: int,
    out: Path,
    tracking_uri: str | None,
    base: dict[str, str] | None = None,
    progress: Progress,
) -> Generated:
    """Draw `n` pictures of a concept, seeds `seed`, `seed + 1`, ..., as PNG files in `out`.

    Args:
        concept: `<id>`, which means its champion, or `<id>@<alias or version>`.
        prompt: names the concept by its token or its class noun.
        seed: of the first picture; the same seed gives the endpoint's picture.
        steps: network evaluations, 1, 2 or 4.
        n: how many.
        out: a folder; made when it is missing.
        tracking_uri: of the registry; None is the environment's, or the embedded one.
        base: `teacher` and `student` directories to draw with, by default what the adapter names.
        progress: listens.

    Raises:
        InputError: for an unknown concept or version, a prompt that does not name it or is too
            long, or a base that is not the adapter's.
        ServiceError: when the registry is out of reach or the disk is full.
    """
    if steps not in STEPS:
        raise InputError(f"--steps {steps} is not offered: the student draws in 1, 2 or 4")
    if not 1 <= n <= LARGEST_N:
        raise InputError(f"--n {n} is out of range: ask for 1 to {LARGEST_N} pictures")
    registry = registry_to_read(tracking_uri)
    version = find_version(concept, registry)
    # What can be refused without the networks' libraries is refused before they are loaded.
    from model.adapter import prompt_for
    from model.base_pair import load_base_pair
    from model.sampler import draw
    from model.text import check_length

    progress(Event("load", version.concept_id, f"version {version.version}"))
    adapter = load_version(version, registry)
    words = prompt_for(adapter.meta, prompt)
    teacher, student = base_of(adapter, base)
    pair = load_base_pair(
        teacher,
        student,
        name=adapter.meta["base"]["name"],
        resolution=adapter.meta["resolution"],
    )
    check_length(pair.tokenizer, words, adapter.tokens)
    _make_folder(out)
    seeds = tuple(range(seed, seed + n))
    paths = []
    start = time.perf_counter()
    for done, one in enumerate(seeds, 1):
        picture = draw(pair, [adapter], [words], [one], steps)[0]
        path = (
            out / f"{version.concept_id}-v{version.version}-{_words(prompt, steps)}-seed{one}.png"
        )
        _save(picture, path)
        paths.append(path)
        progress(Event("draw", version.concept_id, path.name, done, n))
    seconds = time.perf_counter() - start
    return Generated(
        version.concept_id, version.version, version.sha256, words, seeds, tuple(paths), seconds
    )


def _words(prompt: str, steps: int) -> str:
    """Name pictures of a prompt, so that another's do not take their place."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if len(words) > _NAME_LENGTH:
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:6]
        words = f"{words[:_NAME_LENGTH].rstrip('-')}-{digest}"
    return words if steps == 1 else f"{words}-{steps}-steps"


def load_version(version: RegisteredVersion, tracking_uri: str) -> Adapter:
    """Load a version's adapter from the cache, where it comes from the registry once."""
    from model.adapter import load_adapter

    place = cache_root() / "adapters" / version.concept_id / version.sha256
    if place.exists():
        try:
            return load_adapter(place, expected_sha256=version.sha256)
        except EchoDistillError:
            shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="echodistill-fetch-") as scratch:
        fetched = fetch_adapter(version, Path(scratch), tracking_uri=tracking_uri)
        with replacing_folder(place) as temporary:
            shutil.copytree(fetched, temporary, dirs_exist_ok=True)
    return load_adapter(place, expected_sha256=version.sha256)


def base_of(adapter: Adapter, base: dict[str, str] | None) -> tuple[Path, Path]:
    """Return the teacher and student directories to draw with: as given, or as recorded."""
    if base is not None:
        return Path(base["teacher"]), Path(base["student"])
    from components.ingest.store import resolve_model

    recorded = adapter.meta["base"]
    student = resolve_model(recorded["student"])
    # Drawing needs no teacher, so one that can't be had is not asked for: the student stands in.
    return student, student


def _save(picture: torch.Tensor, path: Path) -> None:
    from model.png import png

    with replacing(path) as temporary:
        temporary.write_bytes(png(picture.permute(1, 2, 0).numpy()))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
