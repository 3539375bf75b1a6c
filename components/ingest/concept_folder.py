"""Concept folders: what a concept is, and the check of every concept below a prefix."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from components.ingest import concept_facts, pictures, store
from components.ingest.concept_facts import BesideFacts
from components.ingest.store import Entry
from model import METHOD_VERSION
from model.errors import InputError
from model.names import CONCEPT_ID

if TYPE_CHECKING:
    import torch

MAX_IMAGES = 64
MAX_IMAGE_BYTES = 256 << 20
_FOLDER_DEPTH = 2  # <id>/<image>, and one level more to see images that lie too deep
_CONCEPTS_AT_ONCE, _IMAGES_AT_ONCE = 8, 4
_decoding = threading.BoundedSemaphore(4)  # a decoded image of 50 megapixels is 150 MB
_NOT_CONCEPTS = {"__MACOSX"}
_NO_FILE = (store.FOLDER_LINK, store.EMPTY_FOLDER)  # entries that stand for a whole folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceImage:
    """One checked photo: where it is, its content's sha256, its size upright in pixels."""

    name: str
    uri: str
    path: str
    sha256: str
    width: int
    height: int
    caption: str | None = None


@dataclass(frozen=True)
class Concept:
    """A checked concept; ``digest`` covers everything of it that training depends on."""

    id: str
    class_noun: str
    token: str
    initializer: str
    live: bool
    images: tuple[ReferenceImage, ...]

    @property
    def digest(self) -> str:
        """Return the sha256 over id, words and the images' contents and captions in order."""
        return _digest(
            {
                "id": self.id,
                "class_noun": self.class_noun,
                "token": self.token,
                "initializer": self.initializer,
                "images": [[image.sha256, image.caption] for image in self.images],
            }
        )


@dataclass(frozen=True)
class CheckedConcept:
    """The result of checking one concept: its problems, or the concept when there is none.

    Every problem is one sentence that starts with the file it is about and says what to do.
    """

    id: str
    valid: bool
    class_noun: str | None
    n_images: int
    problems: tuple[str, ...]
    concept: Concept | None = None


def concept_digest(concept: Concept, spec_digest: str, base_hash: str) -> str:
    """Return the digest under which an adapter of this concept is found again.

    It covers the concept, the spec fields that change the result, the base pair's hash and
    ``METHOD_VERSION``.
    """
    return _digest(
        {
            "concept": concept.digest,
            "spec": spec_digest,
            "base": base_hash,
            "method": METHOD_VERSION,
        }
    )


def _digest(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_prefix(uri: str, *, cache: Path | None = None) -> list[CheckedConcept]:
    """Check every concept below a folder or prefix (or the folder itself, if it is one).

    Returns one result per concept, by id; images on S3 come into ``cache``. Raises
    InputError when the prefix is missing, empty or holds no concept folders, and
    ServiceError when S3 is out of reach.
    """
    entries = store.list_folder(uri, depth=_FOLDER_DEPTH, empty=True)
    single = _single_concept(uri, entries, cache)
    if single is not None:
        concept_id, facts = single
        folders = {concept_id: [entry for entry in entries if not _hidden(entry.name)]}
    else:
        beside = [entry for entry in entries if "/" not in entry.name]
        facts = concept_facts.read_beside(beside, cache)
        folders = _by_folder(entries)
        if not folders and not facts.listed:
            raise InputError(
                f"{uri} holds no concept folders: put each concept's images into {uri}/<id>/"
            )
    ids = sorted(folders.keys() | facts.listed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused here anyway
        with ThreadPoolExecutor(_CONCEPTS_AT_ONCE) as pool:
            checks = [
                pool.submit(_check_concept, name, folders.get(name, []), facts, cache)
                for name in ids
            ]
            try:
                return [check.result() for check in checks]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _hidden(name: str) -> bool:
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or parts[0] in _NOT_CONCEPTS


def _by_folder(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Group entries by their first folder, with names relative to it; hidden ones are left."""
    folders: dict[str, list[Entry]] = {}
    for entry in entries:
        head, _, tail = entry.name.partition("/")
        if _hidden(entry.name) or not (tail or entry.refusal in _NO_FILE):
            continue
        inside = Entry(tail, entry.uri, entry.size, entry.etag, entry.refusal)
        folders.setdefault(head, []).append(inside)
    return folders


def _single_concept(
    uri: str, entries: Sequence[Entry], cache: Path | None
) -> tuple[str, BesideFacts] | None:
    """Return the id and outside facts when the folder itself is one concept, else None.

    It is when it holds a concept.yaml, or images and nothing that looks like concepts.
    """
    top = [entry for entry in entries if "/" not in entry.name and not _hidden(entry.name)]
    names = {entry.name for entry in top}
    has_images = any(pictures.is_image_name(name) for name in names)
    holds_facts = bool(names & set(concept_facts.BESIDE_FILES))
    below = any("/" in e.name and pictures.is_image_name(e.name) for e in entries)
    if concept_facts.CONCEPT_FILE not in names and (not has_images or holds_facts or below):
        return None
    place = store.parent_and_name(uri)
    if place is None:
        raise InputError(f"{uri} has images but no name for a concept: put them into a folder")
    parent, name = place
    facts = concept_facts.read_beside(_files_beside(parent), cache)
    return name, facts.only(name)


def _files_beside(parent: str) -> list[Entry]:
    """Return the fact files in a parent folder; other files there are nobody's business."""
    found = []
    for name in concept_facts.BESIDE_FILES:
        uri = store.join(parent, name)
        if not store.is_s3(parent) and not Path(uri).is_file():
            continue
        entry = store.find(uri)
        if entry is not None:
            found.append(entry)
    return found


def _check_concept(
    concept_id: str, entries: Sequence[Entry], outside: BesideFacts, cache: Path | None
) -> CheckedConcept:
    problems: list[str] = []
    if not CONCEPT_ID.fullmatch(concept_id):
        problems.append(
            f"{concept_id}: a concept id is a-z, 0-9, _ and -, starts with a letter or digit and "
            "has at most 63 characters: rename the folder"
        )
    direct = [entry for entry in entries if "/" not in entry.name]
    photos, others = _sort_files(direct, problems)
    facts = outside.of(concept_id)
    wrong = outside.problems_of(concept_id)
    own = next((entry for entry in others if entry.name == concept_facts.CONCEPT_FILE), None)
    if own is not None:
        facts, found = concept_facts.read_own(own, facts, cache)
        wrong += found
    problems += wrong
    if not any(entry.refusal == store.EMPTY_FOLDER for entry in direct):
        problems += facts.problems({entry.name for entry in photos}, read=not wrong)
    if not photos:
        problems.append(_no_images(concept_id, entries, direct))
    elif len(photos) > MAX_IMAGES:
        problems.append(
            f"{concept_id}: has {len(photos)} images: keep the best {MAX_IMAGES} or fewer"
        )
    images = _check_images(photos[:MAX_IMAGES], facts.captions, cache, problems)
    concept = None
    if not problems and facts.class_noun:
        concept = Concept(
            id=concept_id,
            class_noun=facts.class_noun,
            token=facts.token,
            initializer=facts.initializer_word,
            live=facts.is_live,
            images=tuple(images),
        )
    return CheckedConcept(
        concept_id, not problems, facts.class_noun, len(photos), tuple(problems), concept
    )


def _sort_files(direct: Sequence[Entry], problems: list[str]) -> tuple[list[Entry], list[Entry]]:
    """Split a concept's files into images and others; images of unread types are problems."""
    photos, others = [], []
    for entry in direct:
        if entry.refusal == store.EMPTY_FOLDER:
            others.append(entry)
        elif not entry.name:  # the folder itself is a link
            problems.append(f"{PurePosixPath(entry.uri).name}: {entry.refusal}")
        elif pictures.is_image_name(entry.name):
            photos.append(entry)
        elif pictures.is_unread_image_name(entry.name):
            problems.append(
                f"{entry.name}: this type of image is not read: convert it to jpg, png or webp"
            )
        elif entry.name == "concept.yml":
            problems.append(f"{entry.name}: is not read: rename it to {concept_facts.CONCEPT_FILE}")
        else:
            others.append(entry)
            if entry.name != concept_facts.CONCEPT_FILE:
                log.info("%s is not an image: left out", entry.uri)
    return photos, others


def _no_images(concept_id: str, entries: Sequence[Entry], direct: Sequence[Entry]) -> str:
    deeper = next((e.name for e in entries if "/" in e.name and pictures.is_image_name(e.name)), "")
    if deeper:
        return f"{deeper}: images in a subfolder are not read: move them up into {concept_id}/"
    if not direct:
        return f"{concept_id}: is named beside the folders but has none: add its folder of images"
    return f"{concept_id}: has no images: add 1 to {MAX_IMAGES} photos (jpg, png or webp)"


def _check_images(
    photos: Sequence[Entry],
    captions: Mapping[str, str],
    cache: Path | None,
    problems: list[str],
) -> list[ReferenceImage]:
    """Fetch and decode every image; returns the good ones and adds the others' problems."""

    def check(entry: Entry) -> ReferenceImage | str:
        try:
            if entry.size > MAX_IMAGE_BYTES:
                return f"{entry.name}: is over {MAX_IMAGE_BYTES >> 20} MiB: scale it down"
            if entry.refusal:
                return f"{entry.name}: {entry.refusal}"
            path = store.fetch(entry, cache)
            with _decoding:
                found = pictures.check(path.read_bytes(), entry.name)
        except InputError as error:
            return f"{entry.name}: {error}"
        except OSError as error:
            return f"{entry.name}: can't be read ({error.strerror}): check its permissions"
        if isinstance(found, str):
            return f"{entry.name}: {found}"
        return ReferenceImage(
            entry.name,
            entry.uri,
            str(path),
            found.sha256,
            found.width,
            found.height,
            captions.get(entry.name),
        )

    with ThreadPoolExecutor(_IMAGES_AT_ONCE) as pool:
        results = list(pool.map(check, photos))
    problems += [result for result in results if isinstance(result, str)]
    return [result for result in results if isinstance(result, ReferenceImage)]


def load_images(
    concept: Concept, *, shorter_side: int | None = None, cache: Path | None = None
) -> list[torch.Tensor]:
    """Return a concept's images as uint8 tensors [3, H, W], RGB, upright (EXIF applied).

    ``shorter_side`` scales larger images down to it (pixels), which saves memory and time
    when views are much smaller than photos. A file that is not on this machine is fetched
    from its URI; one whose content is not what was checked is refused (InputError).
    """
    import numpy as np
    import torch

    tensors = []
    for image in concept.images:
        picture = pictures.decode(_checked_bytes(image, cache), shorter_side)
        array = np.array(picture, dtype=np.uint8)
        tensors.append(torch.from_numpy(array).permute(2, 0, 1).contiguous())
    return tensors


def _checked_bytes(image: ReferenceImage, cache: Path | None) -> bytes:
    path = Path(image.path)
    if store.is_s3(image.uri) and not path.is_file():
        entry = store.find(image.uri)
        if entry is None:
            raise InputError(f"{image.uri} is gone since it was checked: run the check again")
        path = store.fetch(entry, cache)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} can't be read on this machine ({error.strerror}): put it back, or run the "
            "check again"
        ) from error
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise InputError(f"{image.uri} changed since it was checked: run the check again")
    return data


__all__ = [
    "CheckedConcept",
    "Concept",
    "ReferenceImage",
    "check_prefix",
    "concept_digest",
    "load_images",
]
