"""One pack on a cluster: an actor that takes it from photos to champions, and can be looked at.

The actor itself asks for no CPU or GPU: its workers do (Ray Train's placement group), and so does
the actor that measures the adapters afterwards.
"""

from __future__ import annotations

import copy
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

from components.ingest import documents, store
from components.ingest.cache import cache_root
from components.ingest.concept_folder import Concept
from components.register.connection import RegistryAwayError
from components.register.registry import RegisteredVersion
from components.register.took import already_note
from components.spec import RunSpec
from components.train.finished import adapters_folder, finished
from components.train.handover import hand_over
from components.train.job import MANIFEST, STATES, TrainedConcept
from components.train.pack import uses_cuda
from components.train.progress import TrainEvent
from components.train.record import last_checkpoint, mend_record
from model.errors import AwayError, EchoDistillError, InputError, ServiceError
from pipeline.assess import Assessor
from pipeline.progress import Event, Progress, silent
from pipeline.run import (
    REGISTRY_SECONDS,
    Assessed,
    ConceptResult,
    PackRunner,
    failed,
    from_version,
    handed_over,
    relay,
    waiting,
)
from pipeline.services import quiet_libraries

_LINE_SECONDS = 10.0
_ASSESSORS = 3  # processes that may die over the measuring of one concept
# Stages after training, as a concept's note tells them.
_AFTERWARDS = {"register": "is registered", "evaluate": "is measured", "promote": ""}


@dataclass(frozen=True)
class PackOrder:
    """What a pack's actor is given.

    Attributes:
        spec: the resolved run spec.
        registry: MLflow URI.
        run_name: of the Ray Train run; the same one goes on.
        concepts: the members.
        digests: of the members, by id.
        earlier: runs that trained a member before, by id; the furthest checkpoint is gone on from.
        force: train registered concepts again.
        patience: seconds that trained concepts wait for a registry that is away.
        parent: the MLflow run of the batch, or None.
        hand_over: the batch's folder, when adapters are left there and not registered.
    """

    spec: RunSpec
    registry: str
    run_name: str
    concepts: tuple[Concept, ...]
    digests: dict[str, str]
    earlier: dict[str, tuple[str, ...]]
    force: bool
    patience: float = REGISTRY_SECONDS
    parent: str | None = None
    hand_over: str | None = None


@dataclass
class Look:
    """What a pack is at: whether its workers have begun, and the last facts by concept."""

    worker: str
    began: bool = False
    concepts: dict[str, dict[str, Any]] = field(default_factory=dict)


class PackRun:
    """The actor; `look` answers while `run` works."""

    def __init__(self, order: PackOrder) -> None:
        quiet_libraries()
        self._order = order
        self._look = Look(platform.node())
        self._lock = Lock()
        self._line = log_lines()
        self._relay = relay(self._line)

    def look(self) -> Look:
        """Return what the pack is at."""
        with self._lock:
            return copy.deepcopy(self._look)

    def run(self) -> list[ConceptResult]:
        """Take the pack through; what is wrong with one concept is that concept's result."""
        order = self._order
        assessor = RemoteAssessor(order.spec, order.registry, self._say)
        runner = PackRunner(
            order.spec,
            order.registry,
            assessor=assessor,
            force=order.force,
            progress=self._say,
            listen=self._hear,
            patience=order.patience,
        )
        runner.parent = order.parent
        try:
            results = self._registered(runner)
            rest = [concept for concept in order.concepts if concept.id not in results]
            for concept, made in self._made(runner, rest):
                results[concept.id] = _settled(
                    partial(self._finish, runner, concept, made), concept, made
                )
        finally:
            assessor.close()
            self._tidy()
        return [results[concept.id] for concept in order.concepts]

    def _registered(self, runner: PackRunner) -> dict[str, ConceptResult]:
        """Find what the registry has by now."""
        results: dict[str, ConceptResult] = {}
        for concept in self._order.concepts:
            try:
                version = runner.registered(concept)
            except RegistryAwayError as error:
                # It was asked when the driver started, and what other batches have trained since
                # is found by its claim.
                self._line(Event("train", concept.id, f"without the registry: {error}"))
                break
            if version is not None:
                known = TrainedConcept(concept.id, "trained")
                settle = partial(runner.settle, concept, version)
                if self._order.hand_over is not None:
                    note = already_note(version)
                    settle = partial(from_version, concept, version, "already", note)
                results[concept.id] = _settled(settle, concept, known)
        return results

    def _finish(self, runner: PackRunner, concept: Concept, made: TrainedConcept) -> ConceptResult:
        """Take a trained concept through the registry, or leave it to who will."""
        folder = self._order.hand_over
        if folder is None or made.adapter_dir is None:
            return runner.finish(concept, made)
        hand_over(made, folder)
        return handed_over(concept, made)

    def _made(
        self, runner: PackRunner, rest: Sequence[Concept]
    ) -> Iterator[tuple[Concept, TrainedConcept]]:
        """Yield the concepts that a run has finished before, then those that are trained now."""
        before = self._finished(rest)
        for concept in rest:
            if concept.id in before:
                yield concept, before[concept.id]
        rest = [concept for concept in rest if concept.id not in before]
        if rest:
            yield from zip(rest, self._train(runner, rest), strict=True)

    def _finished(self, concepts: Sequence[Concept]) -> dict[str, TrainedConcept]:
        """Take over adapters that were trained and never registered: whoever did it died before."""
        order, storage = self._order, self._order.spec.train.storage_path
        found: dict[str, TrainedConcept] = {}
        wanted = {concept.id: order.digests[concept.id] for concept in concepts}
        earlier = (run for runs in order.earlier.values() for run in runs)
        mend_record(storage, order.run_name)
        for run in dict.fromkeys((order.run_name, *earlier)):
            left = {name: digest for name, digest in wanted.items() if name not in found}
            try:
                place = last_checkpoint(storage, run) if left else None
                if place:
                    out = adapters_folder(storage, order.run_name)
                    found |= finished(place, left, out)
            except InputError as error:  # it is not whole
                self._line(Event("train", run, f"not taken over: {error}"))
        for name in found:
            self._line(Event("train", name, "was trained before, and only has to be registered"))
        return found

    def _train(self, runner: PackRunner, rest: Sequence[Concept]) -> list[TrainedConcept]:
        name, states = self._order.run_name, self._states(rest)
        try:
            return runner.train(rest, name, states)
        except InputError as error:
            if not states:
                raise
            # A checkpoint of another run can't be used: what it saves must not cost the concepts.
            self._line(Event("train", name, f"without earlier checkpoints: {error}"))
            return runner.train(rest, name)

    def _states(self, concepts: Sequence[Concept]) -> list[str]:
        """Find the last whole checkpoints of the runs that trained the concepts before."""
        order, storage = self._order, self._order.spec.train.storage_path
        latest: dict[str, str | None] = {}
        used: dict[str, None] = {}
        for concept in concepts:
            for run in order.earlier.get(concept.id, ()):
                if run == order.run_name:  # Ray Train goes on from that by itself
                    continue
                try:
                    if run not in latest:
                        latest[run] = last_checkpoint(storage, run)
                    place = latest[run]
                    if place and holds_state(place, concept.id, order.digests[concept.id]):
                        used[place] = None
                        self._line(Event("train", concept.id, f"may go on from {place}"))
                except InputError as error:  # it is not whole
                    self._line(Event("train", concept.id, f"not from {run}: {error}"))
        return list(used)

    def _say(self, event: Event) -> None:
        if event.stage in _AFTERWARDS:
            with self._lock:
                facts = self._look.concepts.setdefault(event.subject, {})
                facts["note"] = _AFTERWARDS[event.stage]
        self._line(event)

    def _hear(self, event: TrainEvent) -> None:
        with self._lock:
            self._look.began = True
            facts = self._look.concepts.setdefault(event.concept_id, {})
            facts |= {"iteration": event.iteration, "iterations": event.iterations}
            if event.worker:
                facts["worker"] = event.worker
            if event.losses:
                facts["loss"] = event.losses
        self._relay(event)

    def _tidy(self) -> None:
        """Remove the adapters that came here from S3: the registry has them now."""
        if store.is_s3(self._order.spec.train.storage_path):
            shutil.rmtree(cache_root() / "runs" / self._order.run_name, ignore_errors=True)


def _settled(
    settle: Callable[[], ConceptResult], concept: Concept, made: TrainedConcept
) -> ConceptResult:
    """Return a concept's result; what goes wrong is that concept's own."""
    try:
        return settle()
    except AwayError as error:
        return waiting(concept, error)
    except EchoDistillError as error:
        return failed(concept, made, str(error))
    except Exception as error:  # one concept's, whatever it is
        return failed(concept, made, f"an error of ours: {type(error).__name__}: {error}")


def holds_state(checkpoint: str, concept_id: str, digest: str) -> bool:
    """Tell whether a checkpoint holds a state of this concept under this digest."""
    place = store.join(checkpoint, f"{STATES}/{concept_id}/{MANIFEST}")
    found = documents.read(place)
    return found is not None and found.value.get("digest") == digest


class RemoteAssessor:
    """Measures and promotes in an actor of its own, with a worker's resources, when first asked."""

    def __init__(self, spec: RunSpec, registry: str, progress: Progress) -> None:
        self._spec = spec
        self._registry = registry
        self._progress = progress
        self._actor: Any = None

    def assess(
        self, version: RegisteredVersion, concept: Concept, adapter_dir: Path | None = None
    ) -> Assessed:
        """Measure a version; its adapter comes from the registry, for the actor may be anywhere."""
        return self._ask("assess", version, concept)

    def finish(self, version: RegisteredVersion, concept: Concept) -> Assessed:
        """Do what an interrupted run left undone."""
        return self._ask("finish", version, concept)

    def close(self) -> None:
        """End the actor."""
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
            self._actor = None

    def _ask(self, method: str, version: RegisteredVersion, concept: Concept) -> Assessed:
        import ray
        from ray.exceptions import RayActorError, RayError

        self._progress(Event("evaluate", concept.id, f"version {version.version}"))
        for _ in range(_ASSESSORS):
            self._actor = self._actor or self._start()
            try:
                answer: Assessed = ray.get(getattr(self._actor, method).remote(version, concept))
            except RayActorError:  # its machine or process died
                self.close()
            except RayError as error:
                _raise_cause(error)
            else:
                return answer
        raise ServiceError(
            f"the process that measures {concept.id} died {_ASSESSORS} times: look at the memory "
            "of its nodes"
        )

    def _start(self) -> Any:
        import ray

        settings = self._spec.train
        gpus = 1 if uses_cuda(settings.device) else 0
        options = {"num_cpus": settings.cpus_per_worker or 1, "num_gpus": gpus}
        return ray.remote(_AssessorThere).options(**options).remote(self._spec, self._registry)


class _AssessorThere:
    """An `Assessor` in its actor: the networks' libraries are loaded there and not here."""

    def __init__(self, spec: RunSpec, registry: str) -> None:
        self._assessor = Assessor(spec, registry, silent)

    def assess(self, version: RegisteredVersion, concept: Concept) -> Assessed:
        return self._assessor.assess(version, concept)

    def finish(self, version: RegisteredVersion, concept: Concept) -> Assessed:
        return self._assessor.finish(version, concept)


def _raise_cause(error: Exception) -> NoReturn:
    """Raise the error of ours that a remote one wraps in its traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, EchoDistillError):
        raise cause from None
    raise error


def log_lines() -> Callable[[Event], None]:
    """Return a listener that prints events, those that are counted every ten seconds."""
    said: dict[tuple[str, str], float] = {}

    def listen(event: Event) -> None:
        key, now = (event.stage, event.subject), time.monotonic()
        counted = event.done is not None and event.done != event.total
        if counted and now - said.get(key, -_LINE_SECONDS) < _LINE_SECONDS:
            return
        said[key] = now
        count = f"{event.done}/{event.total}" if event.total else ""
        words = " ".join(part for part in (event.subject, count, event.text) if part)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        print(f"{stamp} {event.stage}: {words}", flush=True)

    return listen
