"""A batch that is trained by the process that asks, on the Ray that it is connected to.

The pipeline's train step does so where there is no Kubernetes: on one machine, or in one pod. Packs
follow each other; for many at once there is the batch's driver.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from components.ingest import documents, store
from components.ingest.concept_folder import Concept, concept_digest
from components.register.connection import hide_password
from components.register.registry import find_versions
from components.register.took import already_note
from components.spec import spec_digest
from components.steps import Say, registry_of
from components.train.base_hash import base_hash
from components.train.batch import Batch, load_concepts
from components.train.claims import Lease
from components.train.delivery import TrackingSettings
from components.train.handover import TO_REGISTER, hand_over
from components.train.job import TrainedConcept
from components.train.pack import train_pack
from components.train.progress import TrainEvent
from components.train.state import (
    FOUND,
    BatchStatus,
    BatchView,
    ConceptState,
    write_states,
)
from model.errors import EchoDistillError

_LINE_SECONDS = 10.0


def drive_here(batch_uri: str, say: Say) -> BatchStatus:
    """Train what a batch has left to do, and what failed before; returns how each concept ended.

    Raises:
        InputError: when a driver works on the batch, or settings are wrong.
        ServiceError: when storage, registry or Ray are out of reach, or the disk is full.
    """
    view = BatchView(batch_uri)
    batch = view.batch
    left = {one.id: one for one in view.read().concepts if not one.over or one.state == "failed"}
    if not left:
        say("nothing is left to train")
        return view.read()
    registry = registry_of(batch)
    lease = Lease(batch_uri, "pipeline")
    try:
        concepts = load_concepts(batch)
        rest = _without_registered(batch, concepts, left, registry, say)
        with _ray():
            for number, ids in enumerate(batch.packs):
                pack = [concepts[name] for name in ids if name in rest]
                if pack:
                    _train(batch, number, pack, registry, say)
    except BaseException as error:
        ours = isinstance(error, EchoDistillError)
        lease.end("failed", str(error) if ours else f"{type(error).__name__}: {error}")
        raise
    lease.end("done")
    return view.read()


def _without_registered(
    batch: Batch,
    concepts: Mapping[str, Concept],
    left: Mapping[str, ConceptState],
    registry: str,
    say: Say,
) -> set[str]:
    """Return the concepts that the registry does not have; the others' states are written."""
    own, hashed = spec_digest(batch.spec), base_hash(batch.spec)
    digests = {name: concept_digest(one, own, hashed) for name, one in concepts.items()}
    found = {"digests": digests, "already": {}, "registry": hide_password(registry)}
    documents.write(store.join(batch.uri, FOUND), found)
    wanted = {name: digests[name] for name in left if name in digests}
    known = []
    for name, (version, _) in find_versions(wanted, own, tracking_uri=registry).items():
        note = already_note(version)
        say(f"{name}: not again: {note}")
        state = ConceptState(
            name,
            "already",
            version=str(version.version),
            sha256=version.sha256,
            run_id=version.run_id,
            note=note,
        )
        known.append(state)
    write_states(batch, known)
    return set(left) - {one.id for one in known}


def _train(batch: Batch, number: int, pack: Sequence[Concept], registry: str, say: Say) -> None:
    """Train one pack and leave its adapters in the batch's folder."""
    spec, name = batch.spec, batch.run_name(number)
    say(f"{', '.join(concept.id for concept in pack)}: as {name}")
    write_states(batch, [ConceptState(concept.id, "training") for concept in pack])
    try:
        trained = train_pack(
            spec,
            pack,
            run_name=name,
            tracking=TrackingSettings(registry, spec.tracking.experiment),
            progress=_lines(say),
        )
    except BaseException:
        write_states(batch, [ConceptState(concept.id) for concept in pack])
        raise
    write_states(batch, [_ended(batch, made, say) for made in trained])


def _ended(batch: Batch, made: TrainedConcept, say: Say) -> ConceptState:
    """Return how a concept's training ended; a trained one is handed over."""
    state = ConceptState(
        made.id,
        "trained",
        digest=made.digest or None,
        sha256=made.sha256,
        seconds=round(made.seconds, 3),
        gpu_seconds=round(made.gpu_seconds, 3),
        cost=made.cost,
        iteration=made.iterations,
        iterations=made.iterations,
        loss=made.losses,
        run_id=made.run_id,
        note=TO_REGISTER,
    )
    if made.adapter_dir is None:
        error = made.error or "training gave no adapter"
        say(f"{made.id}: failed: {error}")
        return replace(state, state="failed", error=error, note="")
    hand_over(made, batch.uri)
    say(f"{made.id}: trained in {made.seconds:.0f} s")
    return state


def _lines(say: Say) -> Callable[[TrainEvent], None]:
    """Return a listener that tells a concept's iterations every ten seconds."""
    told: dict[str, float] = {}

    def listen(event: TrainEvent) -> None:
        now = time.monotonic()
        last = event.iteration == event.iterations
        if not last and now - told.get(event.concept_id, -_LINE_SECONDS) < _LINE_SECONDS:
            return
        told[event.concept_id] = now
        losses = " ".join(f"{name} {value:.3g}" for name, value in event.losses.items())
        what = event.text or losses or event.stage
        say(f"{event.concept_id}: {event.iteration}/{event.iterations} {what}")

    return listen


@contextmanager
def _ray() -> Iterator[None]:
    """Connect to the Ray that RAY_ADDRESS names, or start one for the time of the block."""
    address = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    if not address and "RAY_AUTH_MODE" not in os.environ:
        # Ray would leave a token in the home folder otherwise.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address=address or "local", log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()
