"""From a prefix of concepts to registered, measured adapters.

check -> plan packs -> train -> register (candidate) -> evaluate -> promote (champion), with one
result a concept: a bad concept never stops the others, and what is registered already under the
same digest is not trained again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from components.ingest.concept_folder import Concept, check_prefix, concept_digest
from components.promote.promote import Decision
from components.register.connection import Patience, RegistryAwayError, reaching
from components.register.registry import (
    RegisteredVersion,
    find_version_by_digest,
    register_adapter,
    set_tags,
)
from components.register.took import (
    COST_TAG,
    GPU_SECONDS_TAG,
    SECONDS_TAG,
    already_note,
    training_tags,
)
from components.spec import RunSpec, spec_digest
from components.train.base_hash import base_hash
from components.train.batch import packs, sort_checked
from components.train.delivery import TrackingSettings, deliver_late
from components.train.handover import TO_REGISTER
from components.train.job import BasePaths, TrainedConcept, pack_name
from components.train.pack import check_storage, train_pack
from components.train.progress import TrainEvent
from components.train.state import ConceptState
from model.errors import DISK_FULL, AwayError, EchoDistillError, ServiceError
from pipeline.assess import Assessor
from pipeline.parent_run import parent_of_training
from pipeline.progress import Event, Progress, silent
from pipeline.tracking import tracking_uri

State = Literal["trained", "already", "failed", "invalid", "waiting"]
REGISTRY_SECONDS = 90.0
Cluster = Callable[[], AbstractContextManager[None]]
Assessed = tuple[RegisteredVersion, Decision]
_DISK_FULL = tuple(os.strerror(code) for code in DISK_FULL)


class Assesses(Protocol):
    """What measures versions and lets them take the champion's place: see `Assessor`."""

    def assess(
        self, version: RegisteredVersion, concept: Concept, adapter_dir: Path | None = None
    ) -> Assessed:
        """Measure a version and put it to the gate."""

    def finish(self, version: RegisteredVersion, concept: Concept) -> Assessed:
        """Do what an interrupted run left undone."""


@dataclass(frozen=True)
class ConceptResult:
    """What became of one concept.

    Attributes:
        id: the concept's id.
        state: `trained` now, `already` there, `failed`, or `invalid` (see `error`); in a batch
            also `waiting`, for a registry that is away (see `note`).
        version: of the registered model, or None.
        sha256: of the adapter, or None.
        seconds: training time; of the run that made it when it was there already.
        gpu_seconds: its share of the GPUs' time in that; 0 on CPUs.
        cost: of those, or None without a price (`cost.gpu_hour`).
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
    gpu_seconds: float = 0.0
    cost: float | None = None
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
            "gpu_seconds": round(self.gpu_seconds, 3),
            "cost": self.cost,
            "error": self.error,
            "iterations": self.iterations,
            "metrics": self.metrics,
            "promoted": self.promoted,
            "note": self.note,
        }

    def as_state(self) -> ConceptState:
        """Return what the concept is at, as a batch's documents tell it."""
        return ConceptState(
            self.id,
            self.state,
            version=self.version,
            sha256=self.sha256,
            seconds=round(self.seconds, 3),
            gpu_seconds=round(self.gpu_seconds, 3),
            cost=self.cost,
            iteration=self.iterations,
            iterations=self.iterations,
            run_id=self.run_id,
            promoted=self.promoted,
            note=self.note,
            error=self.error,
        )


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
    valid, invalid = sort_checked(checked, spec)
    results = {
        name: ConceptResult(name, "invalid", error="; ".join(problems))
        for name, problems in invalid.items()
    }
    concepts = list(valid.values())
    progress(Event("check", uri, f"{len(concepts)} of {len(checked)} concepts are valid"))
    if concepts:
        progress(Event("base", spec.base.name, "load and verify"))
        runner = PackRunner(spec, registry, force=force, progress=progress)
        results |= runner.already(concepts)
        rest = [concept for concept in concepts if concept.id not in results]
        if rest:
            check_storage(spec.train.storage_path)
            batch = parent_of_training(uri, spec, registry, valid, results, force=force)
            with cluster(), batch as runner.parent:
                for pack in packs(concepts, spec.pack.planned):
                    left = [concept for concept in pack if concept.id not in results]
                    if left:
                        # Under the whole pack's name a run that was begun goes on.
                        results |= _train(runner, left, spec, pack_name(spec, pack), force)
    return [results[one.id] for one in checked]


def _train(
    runner: PackRunner, pack: Sequence[Concept], spec: RunSpec, name: str, force: bool
) -> dict[str, ConceptResult]:
    """Train one pack, then take each of its adapters through the registry."""
    if force:
        # Under its own name the finished run would only be found again.
        name += f"-{time.strftime('%Y%m%d-%H%M%S')}"
    results = {}
    for concept, made in zip(pack, runner.train(pack, name), strict=True):
        try:
            results[concept.id] = runner.finish(concept, made)
        except RegistryAwayError as error:
            raise ServiceError(
                f"{error}; what was trained is kept: run the command again to register it"
            ) from error
        except ServiceError:
            raise
        except EchoDistillError as error:  # of this concept alone: the others go on
            results[concept.id] = failed(concept, made, str(error))
    return results


def from_version(
    concept: Concept, version: RegisteredVersion, state: State, note: str = ""
) -> ConceptResult:
    """Say what the registry knows of a concept."""
    return ConceptResult(
        concept.id,
        state,
        version=str(version.version),
        sha256=version.sha256,
        seconds=float(version.tags.get(SECONDS_TAG, 0.0)),
        gpu_seconds=float(version.tags.get(GPU_SECONDS_TAG, 0.0)),
        cost=float(version.tags[COST_TAG]) if COST_TAG in version.tags else None,
        iterations=int(version.tags.get("iterations") or 0),
        metrics=version.metrics,
        run_id=version.run_id,
        note=note,
        concept=concept,
    )


class PackRunner:
    """Takes checked concepts to results, one pack at a time; the process is connected to a Ray.

    Args:
        spec: the resolved run spec.
        registry: MLflow URI.
        assessor: measures and promotes; by default in this process.
        force: train registered concepts again.
        progress: listens.
        listen: hears what training says; by default `progress` does.
        patience: seconds that a trained concept waits for a registry that is away.

    Attributes:
        parent: the MLflow run that those of the concepts are shown below, or None.
    """

    def __init__(
        self,
        spec: RunSpec,
        registry: str,
        *,
        assessor: Assesses | None = None,
        force: bool = False,
        progress: Progress = silent,
        listen: Callable[[TrainEvent], None] | None = None,
        patience: float = REGISTRY_SECONDS,
    ) -> None:
        self.parent: str | None = None
        self._spec = spec
        self._registry = registry
        self._force = force
        self._progress = progress
        self._listen = listen or relay(progress)
        self._assessor = assessor or Assessor(spec, registry, progress)
        self._patience = Patience(
            patience, lambda text: progress(Event("register", "MLflow", text))
        )

    def already(self, concepts: Sequence[Concept]) -> dict[str, ConceptResult]:
        """Find the concepts that are registered under their digest, and finish them."""
        found = {}
        for concept in concepts:
            version = self.registered(concept)
            if version is None:
                continue
            try:
                found[concept.id] = self.settle(concept, version)
            except ServiceError:
                raise
            except EchoDistillError as error:  # of this concept alone: the others go on
                made = TrainedConcept(concept.id, "trained")
                found[concept.id] = failed(concept, made, str(error))
        return found

    def registered(self, concept: Concept) -> RegisteredVersion | None:
        """Return the version that is registered under a concept's digest, if it is to count."""
        if self._force:
            return None
        digest = concept_digest(concept, spec_digest(self._spec), base_hash(self._spec))
        return find_version_by_digest(concept.id, digest, tracking_uri=self._registry)

    def settle(self, concept: Concept, version: RegisteredVersion) -> ConceptResult:
        """Do what an interrupted run left undone of a registered concept."""
        note = already_note(version)
        self._progress(Event("train", concept.id, f"not again: {note}"))
        settled, decision = self._patience.ask(lambda: self._assessor.finish(version, concept))
        return _decided(from_version(concept, settled, "already", note), decision)

    def train(
        self, pack: Sequence[Concept], run_name: str, states: Sequence[str] = ()
    ) -> list[TrainedConcept]:
        """Train one pack as a run of this name, which goes on when it was begun before.

        `states` are checkpoints of other runs to go on from.
        """
        spec = self._spec
        self._progress(Event("train", ", ".join(concept.id for concept in pack), f"as {run_name}"))
        trained = train_pack(
            spec,
            pack,
            bases=BasePaths.from_spec(spec),
            run_name=run_name,
            tracking=self._tracking,
            states=states,
            progress=self._listen,
        )
        refuse_full_disk(trained, spec.train.storage_path)
        return trained

    def finish(self, concept: Concept, made: TrainedConcept) -> ConceptResult:
        """Register, evaluate and promote one adapter.

        Raises:
            RegistryAwayError: when the registry is away for longer than one waits; whoever calls
                again goes on where it was.
        """
        folder, ask = made.adapter_dir, self._patience.ask
        if folder is None:
            return failed(concept, made, made.error or "training gave no adapter")
        self._progress(Event("register", concept.id))
        run_id = ask(lambda: self._log_late(made, folder)) if made.unlogged else made.run_id
        version = ask(
            lambda: register_adapter(
                folder, concept, tracking_uri=self._registry, run_id=run_id, force=self._force
            )
        )
        ask(lambda: set_tags(version, training_tags(made), tracking_uri=self._registry))
        measured, decision = ask(lambda: self._assessor.assess(version, concept, folder))
        result = replace(
            from_version(concept, measured, "trained"),
            seconds=made.seconds,
            gpu_seconds=made.gpu_seconds,
            cost=made.cost,
            run_id=run_id,
        )
        return _decided(result, decision)

    def _log_late(self, made: TrainedConcept, folder: Path) -> str | None:
        """Tell MLflow what it has missed of a training; returns the run's id."""
        with reaching(self._registry):
            return deliver_late(self._tracking, made.unlogged, folder)

    @property
    def _tracking(self) -> TrackingSettings:
        return TrackingSettings(self._registry, self._spec.tracking.experiment, self.parent)


def failed(concept: Concept, made: TrainedConcept, error: str) -> ConceptResult:
    """Say that a concept has no adapter, and why."""
    return ConceptResult(
        concept.id,
        "failed",
        seconds=made.seconds,
        gpu_seconds=made.gpu_seconds,
        cost=made.cost,
        error=error,
        run_id=made.run_id,
        concept=concept,
    )


def waiting(concept: Concept, error: AwayError) -> ConceptResult:
    """Say that a trained concept waits for a service."""
    what = "registry" if isinstance(error, RegistryAwayError) else "storage"
    note = f"trained, waits for the {what}: {error}"
    return ConceptResult(concept.id, "waiting", note=note, concept=concept)


def handed_over(concept: Concept, made: TrainedConcept) -> ConceptResult:
    """Say that a trained concept is left to whoever registers it."""
    return ConceptResult(
        concept.id,
        "trained",
        sha256=made.sha256,
        seconds=made.seconds,
        gpu_seconds=made.gpu_seconds,
        cost=made.cost,
        iterations=made.iterations,
        note=TO_REGISTER,
        run_id=made.run_id,
        concept=concept,
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
