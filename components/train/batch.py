"""A batch: the concepts that were checked, planned as packs, and the documents that say so.

<storage>/batches/<batch id>/batch.json      what was submitted: run spec, packs, invalid concepts
                             concepts.json   every checked concept: words, photos and their sha256
                             driver.json     the driver's lease (claims.py)
                             found.json      digests, and what the registry had when it started
                             packs/<n>.json  what the concepts of pack n are at
<storage>/claims/<digest>.json               who trains a digest
<storage>/photos/<sha256>.<type>             photos of folders that were uploaded
<storage>/<batch id>-<n>/                    checkpoints of pack n (Ray Train's)
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from components.ingest import documents, s3, store
from components.ingest.cache import replacing
from components.ingest.concept_folder import CheckedConcept, Concept, ReferenceImage
from components.spec import RunSpec, TrainSpec
from model.errors import InputError

SCHEMA_VERSION = 1
BATCHES = "batches"
S3_STORAGE = ".echodistill"  # hidden, so that it is no concept of a prefix that is a whole bucket
_PLAN, _CONCEPTS, _PHOTOS = "batch.json", "concepts.json", "photos"
_UPLOADS = 16
_DATED = re.compile(r"-\d{8}-\d{6}-[0-9a-f]{4}$")


@dataclass(frozen=True)
class Batch:
    """What was submitted.

    Attributes:
        id: of the batch; ids sort by time.
        uri: its folder.
        prefix: where its concepts came from.
        spec: the resolved run spec; its `train.storage_path` is where everything is kept.
        packs: concept ids, in packs that train together.
        invalid: the problems of the concepts that are left out, by id.
        force: whether registered concepts are trained again.
        waiting: how many packs may wait for room in the cluster at a time.
        registry: where adapters are registered when neither spec nor cluster say so.
        submitted: when, in seconds since 1970.
        train_only: whether trained adapters are left in the batch's folder (handover.py) for
            later steps, instead of being registered and measured by the driver.
    """

    id: str
    uri: str
    prefix: str
    spec: RunSpec
    packs: tuple[tuple[str, ...], ...]
    invalid: Mapping[str, tuple[str, ...]]
    force: bool
    waiting: int
    registry: str
    submitted: float
    train_only: bool = False

    @property
    def storage(self) -> str:
        """Return the folder or s3:// URI of checkpoints, claims and batches."""
        return self.spec.train.storage_path

    @property
    def concept_ids(self) -> list[str]:
        """Return every concept's id, the invalid ones too, sorted."""
        return sorted([*self.invalid, *(each for pack in self.packs for each in pack)])

    def run_name(self, pack: int) -> str:
        """Return the name of a pack's Ray Train run."""
        return f"{self.id}-{pack}"


def plan_batch(
    prefix: str,
    checked: Sequence[CheckedConcept],
    spec: RunSpec,
    *,
    registry: str,
    force: bool = False,
    waiting: int = 2,
    train_only: bool = False,
) -> tuple[Batch, dict[str, Concept]]:
    """Plan checked concepts as packs of `pack.size`; one spec, so one base and resolution for all.

    Raises:
        InputError: when no concept is valid.
    """
    concepts, invalid = sort_checked(checked, spec)
    if not concepts:
        raise InputError(f"no concept of {prefix} is valid: mend the problems that are listed")
    batch_id = new_id(prefix)
    batch = Batch(
        id=batch_id,
        uri=batch_uri(spec.train.storage_path, batch_id),
        prefix=prefix,
        spec=spec,
        packs=tuple(packs(sorted(concepts), spec.pack.planned)),
        invalid=invalid,
        force=force,
        waiting=waiting,
        registry=registry,
        submitted=time.time(),
        train_only=train_only,
    )
    return batch, concepts


def sort_checked(
    checked: Sequence[CheckedConcept], spec: RunSpec
) -> tuple[dict[str, Concept], dict[str, tuple[str, ...]]]:
    """Split checked concepts into the valid ones and the others' problems, by id, in order."""
    invalid = {one.id: one.problems for one in checked if one.concept is None}
    concepts = {one.id: one.concept for one in checked if one.concept is not None}
    if spec.base.name in concepts:  # it could never be asked for at the endpoint
        del concepts[spec.base.name]
        problem = f"{spec.base.name} is the name of the base: rename the concept's folder"
        invalid[spec.base.name] = (problem,)
    return concepts, invalid


def packs(ids: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    """Split concepts into packs of at most `size`, as even as they go, in order."""
    count = -(-len(ids) // size)
    bounds = [len(ids) * i // count for i in range(count + 1)] if count else [0]
    return [tuple(ids[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]


def new_id(prefix: str) -> str:
    """Name a batch after its prefix and the time; 47 characters at most, for Kubernetes."""
    return f"{_short(prefix)}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _short(prefix: str) -> str:
    name = prefix.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:20] or "batch"


def content_id(batch: Batch, concepts: Mapping[str, Concept]) -> str:
    """Name a batch after all that its documents say: the same submission has the same id."""
    content = {
        "spec": batch.spec.model_dump(mode="json"),
        "concepts": {name: asdict(each) for name, each in concepts.items()},
        "invalid": {name: list(each) for name, each in batch.invalid.items()},
        "registry": batch.registry,
        "force": batch.force,
        "train_only": batch.train_only,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{_short(batch.prefix)}-{digest[:16]}"


def batch_uri(storage: str, batch_id: str) -> str:
    """Return the folder of a batch."""
    return store.join(store.join(storage, BATCHES), batch_id)


def storage_for(prefix: str, spec: RunSpec, given: str | None) -> str:
    """Say where a batch is kept: as given, else as the spec says, else in the prefix's bucket.

    A folder comes back absolute, for the driver runs elsewhere.

    Raises:
        InputError: for an S3 URI without a bucket, or another scheme.
    """
    place = given
    if place is None:
        place = spec.train.storage_path
        if store.is_s3(prefix) and place == TrainSpec().storage_path:
            place = f"s3://{s3.parse(prefix)[0]}/{S3_STORAGE}"
    place = store.absolute(place)
    return place.rstrip("/") if store.is_s3(place) else place


def at_storage(spec: RunSpec, storage: str) -> RunSpec:
    """Return a spec whose runs are kept at `storage`."""
    train = spec.train.model_copy(update={"storage_path": storage})
    return spec.model_copy(update={"train": train})


def upload_photos(concepts: Mapping[str, Concept], storage: str) -> dict[str, Concept]:
    """Copy photos that lie in folders to the storage, by content; returns the concepts there.

    What is there already is not copied again. Photos on S3 stay where they are.
    """
    photos = store.join(storage, _PHOTOS)

    def moved(image: ReferenceImage) -> ReferenceImage:
        if store.is_s3(image.uri):
            return replace(image, path="")  # a place in this machine's cache
        target = store.join(photos, image.sha256 + PurePosixPath(image.name).suffix.lower())
        if not store.exists(target):
            _copy(store.local_path(image.path), target, image.sha256)
        return replace(image, uri=target, path="" if store.is_s3(target) else target)

    images = [image for concept in concepts.values() for image in concept.images]
    with ThreadPoolExecutor(_UPLOADS) as pool:
        there = iter(list(pool.map(moved, images)))
    return {
        name: replace(concept, images=tuple(next(there) for _ in concept.images))
        for name, concept in concepts.items()
    }


def _copy(path: Path, target: str, sha256: str) -> None:
    if store.is_s3(target):
        s3.upload(path, *s3.parse(target), sha256=sha256)
        return
    with replacing(store.local_path(target)) as temporary:
        shutil.copyfile(path, temporary)


def save_batch(batch: Batch, concepts: Mapping[str, Concept]) -> None:
    """Write a batch's documents; it is there once `batch.json` is.

    Raises:
        InputError: when another batch has its id.
    """
    documents.write(
        store.join(batch.uri, _CONCEPTS), {name: asdict(each) for name, each in concepts.items()}
    )
    facts = {
        "schema_version": SCHEMA_VERSION,
        "id": batch.id,
        "prefix": batch.prefix,
        "spec": batch.spec.model_dump(mode="json"),
        "packs": batch.packs,
        "invalid": dict(batch.invalid),
        "force": batch.force,
        "waiting": batch.waiting,
        "registry": batch.registry,
        "submitted": batch.submitted,
        "train_only": batch.train_only,
    }
    if documents.write(store.join(batch.uri, _PLAN), facts, documents.ABSENT) is None:
        raise InputError(f"there is a batch {batch.uri} already: submit again")


def is_saved(uri: str) -> bool:
    """Tell whether a batch's documents are there."""
    return documents.read(store.join(uri, _PLAN)) is not None


def load_batch(uri: str) -> Batch:
    """Read what was submitted.

    Raises:
        InputError: when there is no such batch.
    """
    found = documents.read(store.join(uri, _PLAN))
    if found is None:
        raise InputError(
            f"there is no batch {uri}: give its id and --storage, or the URI that submit printed"
        )
    facts = dict(found.value)
    if facts.pop("schema_version", None) != SCHEMA_VERSION:
        raise InputError(f"{uri} was written by another version of this program: submit it again")
    try:
        facts["spec"] = RunSpec.model_validate(facts["spec"])
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{uri} was submitted by another version of this program, whose settings this one does "
            f"not know ({setting}: {first['msg']}): use one version for both"
        ) from None
    facts["packs"] = tuple(tuple(pack) for pack in facts["packs"])
    facts["invalid"] = {name: tuple(each) for name, each in facts["invalid"].items()}
    return Batch(uri=uri, **facts)


def load_concepts(batch: Batch) -> dict[str, Concept]:
    """Read the checked concepts of a batch, by id."""
    found = documents.read(store.join(batch.uri, _CONCEPTS))
    if found is None:
        raise InputError(f"{batch.uri} has no {_CONCEPTS}: submit the batch again")
    return {name: _concept(facts) for name, facts in found.value.items()}


def _concept(facts: dict[str, Any]) -> Concept:
    images = tuple(ReferenceImage(**image) for image in facts["images"])
    return Concept(**{**facts, "images": images})


def find_batch(given: str | None, storage: str) -> str:
    """Return the URI of a batch that is named by URI, by id, or not at all (then the newest).

    Raises:
        InputError: when there is none.
    """
    if given is not None:
        return given.rstrip("/") if "/" in given else batch_uri(storage, given)
    known = documents.list_folders(store.join(storage, BATCHES))
    if not known:
        raise InputError(f"there is no batch in {storage}: give --storage, or a batch's URI")
    dated = sorted((name for name in known if _DATED.search(name)), key=lambda n: n.split("-")[-3:])
    others = [name for name in known if not _DATED.search(name)]  # named after their content
    uris = [batch_uri(storage, name) for name in (*dated[-1:], *others)]
    return uris[0] if len(uris) == 1 else max(uris, key=_submitted)


def _submitted(uri: str) -> float:
    found = documents.read(store.join(uri, _PLAN))
    return float(found.value["submitted"]) if found else 0.0
