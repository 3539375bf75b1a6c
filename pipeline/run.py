"""From a prefix of concepts to registered, measured adapters.

check -> plan packs -> train -> register (candidate) -> evaluate -> promote (champion), with one
result a concept: a bad concept never stops the others, and what is registered already under the
same digest is not trained again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from components.ingest.concept_folder import CheckedConcept, Concept, check_prefix, concept_digest
from components.promote.promote import Decision
from components.register.registry import (
    RegisteredVersion,
    find_version_by_digest,
    register_adapter,
    set_tags,
)
from components.spec import RunSpec, spec_digest
from components.train.job import BasePaths, TrainedConcept, pack_name
from components.train.pack import train_pack
from components.train.progress import TrainEvent
from components.train.tracking import TrackingSettings
from model.errors import DISK_FULL, EchoDistillError, InputError, ServiceError
from pipeline.assess import Assessor
from pipeline.base import base_hash
from pipeline.progress import Event, Progress, silent
from pipeline.tracking import tracking_uri

State = Literal["trained", "already", "failed", "invalid"]
Cluster = Callable[[], AbstractContextManager[None]]
SECONDS_TAG = "train_seconds"
_DISK_FULL = tuple(os.strerror(code) for code in DISK_FULL)


@dataclass(frozen=True)
class ConceptResult:
    """What became of one concept.

    Attributes:
        id: the concept's id.
        state: `trained` now, `already` there, `failed`, or `invalid` (see `error`).
        version: of the registered model, or None.
        sha256: of the adapter, or None.
        seconds: training time; of the run that made it when it was there already.
        error: why there is no adapter, or None.
        iterations: iterations trained.
        metrics: figures by name.
        promoted: whether the version is the champion now.
        note: what a person should know, such as why it was not promoted.
        run_id: its MLflow run.
        concept: the checked concept, or None when it is invalid.
    """

    id: str
    state: State
    version: str | None = None
    sha256: str | None = None
    seconds: float = 0.0
    error: str | None = None
    iterations: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    promoted: bool = False
    note: str = ""
    run_id: str | None = None
    concept: Concept | None = None

    @property
    def good(self) -> bool:
        """Whether nothing is left to look at: trained and through its gate, or there already."""
        return self.state == "already" or (self.state == "trained" and self.promoted)

    def as_json(self) -> dict[str, Any]:
        """Give the shape of `--json`."""
        return {
            "id": self.id,
            "state": self.state,
            "version": self.version,
            "sha256": self.sha256,
            "seconds": round(self.seconds, 3),
            "error": self.error,
            "iterations": self.iterations,
            "metrics": self.metrics,
            "promoted": self.promoted,
            "note": self.note,
        }


def train_prefix(
    uri: str,
    spec: RunSpec,
    *,
    force: bool = False,
    progress: Progress = silent,
    cluster: Cluster = nullcontext,
) -> list[ConceptResult]:
    """Train every valid concept below a prefix that has no adapter yet.

    Args:
        uri: a folder or s3:// prefix of concepts, or one concept's folder.
        spec: the resolved run spec.
        force: train registered concepts again, as new versions.
        progress: listens; what it raises ends the run.
        cluster: opens the Ray that trains; it is asked only when there is something to train.
            By default the process is connected to one already.

    Returns:
        one result a concept, by id.

    Raises:
        InputError: when prefix, spec or base are wrong as a whole.
        ServiceError: when S3, the tracking server or Ray are out of reach, or the disk is full.
    """
    registry = tracking_uri(spec=spec)
    progress(Event("check", uri))
    checked = check_prefix(uri)
    results = {one.id: _invalid(one) for one in checked if one.concept is None}
    concepts = [one.concept for one in checked if one.concept is not None]
    _refuse_base_name(concepts, spec, results)
    concepts = [concept for concept in concepts if concept.id not in results]
    progress(Event("check", uri, f"{len(concepts)} of {len(checked)} concepts are valid"))
    if concepts:
        progress(Event("base", spec.base.name, "load and verify"))
        runner = _Runner(spec, registry, force, progress, cluster)
        results |= runner.run(concepts)
    return [results[one.id] for one in checked]


def packs(concepts: Sequence[Concept], size: int) -> Iterator[Sequence[Concept]]:
    """Split concepts into packs of at most `size`, as even as they go, in order."""
    if not concepts:
        return
    count = -(-len(concepts) // size)
    for index in range(count):
        low, high = (len(concepts) * i // count for i in (index, index + 1))
        yield concepts[low:high]


def _invalid(checked: CheckedConcept) -> ConceptResult:
    return ConceptResult(checked.id, "invalid", error="; ".join(checked.problems))


def _refuse_base_name(
    concepts: Sequence[Concept], spec: RunSpec, results: dict[str, ConceptResult]
) -> None:
    """A concept named like the base could never be asked for at the endpoint."""
    for concept in concepts:
        if concept.id == spec.base.name:
            error = f"{concept.id} is the name of the base: rename the concept's folder"
            results[concept.id] = ConceptResult(concept.id, "invalid", error=error)


def _from_version(
    concept: Concept, version: RegisteredVersion, state: State, note: str = ""
) -> ConceptResult:
    return ConceptResult(
        concept.id,
        state,
        version=str(version.version),
        sha256=version.sha256,
        seconds=float(version.tags.get(SECONDS_TAG, 0.0)),
        iterations=int(version.tags.get("iterations") or 0),
        metrics=version.metrics,
        run_id=version.run_id,
        note=note,
        concept=concept,
    )


class _Runner:
    """Takes checked concepts to results."""

    def __init__(
        self, spec: RunSpec, registry: str, force: bool, progress: Progress, cluster: Cluster
    ) -> None:
        self._cluster = cluster
        self._spec = spec
        self._registry = registry
        self._force = force
        self._progress = progress
        self._assessor = Assessor(spec, registry, progress)

    def run(self, concepts: Sequence[Concept]) -> dict[str, ConceptResult]:
        results = {} if self._force else self._already(concepts)
        rest = [concept for concept in concepts if concept.id not in results]
        if rest:
            with self._cluster():
                for pack in packs(rest, self._spec.pack.size):
                    results |= self._train(pack)
        return results

    def _already(self, concepts: Sequence[Concept]) -> dict[str, ConceptResult]:
        """Find the concepts that are registered under their digest, and finish them."""
        own, hashed = spec_digest(self._spec), base_hash(self._spec)
        found = {}
        for concept in concepts:
            digest = concept_digest(concept, own, hashed)
            version = find_version_by_digest(concept.id, digest, tracking_uri=self._registry)
            if version is None:
                continue
            note = f"version {version.version} was trained with the same images, settings and base"
            self._progress(Event("train", concept.id, f"not again: {note}"))
            version, decision = self._assessor.finish(version, concept)
            result = _from_version(concept, version, "already", note)
            found[concept.id] = _decided(result, decision)
        return found

    def _train(self, pack: Sequence[Concept]) -> dict[str, ConceptResult]:
        """Train one pack, then take each of its adapters through the registry."""
        spec = self._spec
        name = pack_name(spec, pack)
        if self._force:
            # Under its own name the finished run would only be found again.
            name += f"-{time.strftime('%Y%m%d-%H%M%S')}"
        self._progress(Event("train", ", ".join(concept.id for concept in pack), f"as {name}"))
        trained = train_pack(
            spec,
            pack,
            bases=BasePaths.from_spec(spec),
            run_name=name,
            tracking=TrackingSettings(self._registry, spec.tracking.experiment),
            progress=relay(self._progress),
        )
        refuse_full_disk(trained, spec.train.storage_path)
        results = {}
        for concept, made in zip(pack, trained, strict=True):
            try:
                results[concept.id] = self._register(concept, made)
            except (InputError, ServiceError):
                raise
            except EchoDistillError as error:
                results[concept.id] = _failed(concept, made, str(error))
        return results

    def _register(self, concept: Concept, made: TrainedConcept) -> ConceptResult:
        """Register, evaluate and promote one adapter."""
        if made.adapter_dir is None:
            return _failed(concept, made, made.error or "training gave no adapter")
        self._progress(Event("register", concept.id))
        version = register_adapter(
            made.adapter_dir,
            concept,
            tracking_uri=self._registry,
            run_id=made.run_id,
            force=self._force,
        )
        tags = {SECONDS_TAG: f"{made.seconds:.3f}"}
        set_tags(version, tags, tracking_uri=self._registry)
        version, decision = self._assessor.assess(version, concept, made.adapter_dir)
        result = _from_version(concept, version, "trained")
        return _decided(replace(result, seconds=made.seconds, run_id=made.run_id), decision)


def _failed(concept: Concept, made: TrainedConcept, error: str) -> ConceptResult:
    return ConceptResult(
        concept.id, "failed", seconds=made.seconds, error=error, run_id=made.run_id, concept=concept
    )


def _decided(result: ConceptResult, decision: Decision) -> ConceptResult:
    reasons = "; ".join(decision.reasons)
    note = result.note if decision.promoted else f"stays a candidate: {reasons}"
    return replace(result, promoted=decision.promoted, note=note)


def refuse_full_disk(trained: Sequence[TrainedConcept], storage: str) -> None:
    """Raise ServiceError when training broke because it could not write: that is nobody's concept.

    The system's words are all that comes back from a worker.
    """
    for made in trained:
        if made.error and any(words in made.error for words in _DISK_FULL):
            raise ServiceError(
                f"no space left on the disk while training wrote to {storage}: free some and run "
                "again, it goes on where it was"
            )


def relay(progress: Progress) -> Callable[[TrainEvent], None]:
    """Turn training's events into ours."""

    def listen(event: TrainEvent) -> None:
        parts = [f"{name} {value:.3g}" for name, value in event.losses.items()]
        if event.seconds_per_iteration:
            parts.insert(0, f"{event.seconds_per_iteration:.2f} s/it")
        text = event.text or " ".join(parts) or event.stage
        progress(Event("train", event.concept_id, text, event.iteration, event.iterations))

    return listen
