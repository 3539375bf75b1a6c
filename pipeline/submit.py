"""From a prefix to a batch that a cluster works on: check, upload, plan, submit, wait."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from components.ingest import store
from components.ingest.concept_folder import CheckedConcept, check_prefix
from components.register.connection import hide_password
from components.spec import RunSpec
from components.train.batch import (
    Batch,
    at_storage,
    plan_batch,
    save_batch,
    sort_checked,
    storage_for,
    upload_photos,
)
from components.train.claims import end_lease, queue_again
from components.train.state import BatchStatus, BatchView
from model.errors import InputError, ServiceError
from pipeline.jobs import OVER, Jobs, is_driven, is_lost
from pipeline.progress import Event, Progress
from pipeline.tracking import tracking_uri

WAIT_SECONDS = 2.0
AWAY_SECONDS = 300.0  # that who waits for a batch does without its cluster or storage
# A job that has just ended may still be writing its last words.
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Checked:
    """The concepts of a prefix, checked for a run spec; `invalid` are left out."""

    prefix: str
    spec: RunSpec
    concepts: tuple[CheckedConcept, ...]

    @property
    def invalid(self) -> dict[str, tuple[str, ...]]:
        """Return the problems of the concepts that are not valid, by id."""
        return sort_checked(self.concepts, self.spec)[1]


def check(prefix: str, spec: RunSpec, progress: Progress) -> Checked:
    """Check every concept below a prefix.

    Raises:
        InputError: when the prefix holds no concepts.
        ServiceError: when S3 is out of reach.
    """
    prefix = store.absolute(prefix)  # it is written down, and read elsewhere
    progress(Event("check", prefix))
    checked = Checked(prefix, spec, tuple(check_prefix(prefix)))
    good = len(checked.concepts) - len(checked.invalid)
    progress(Event("check", prefix, f"{good} of {len(checked.concepts)} concepts are valid"))
    return checked


def plan(
    checked: Checked,
    progress: Progress,
    *,
    storage: str | None = None,
    force: bool = False,
    waiting: int = 2,
) -> Batch:
    """Upload what a cluster can't read and write the batch, for whoever drives it.

    Args:
        checked: what `check` gave.
        progress: listens.
        storage: folder that every node sees, or s3:// URI, of batches, checkpoints and uploaded
            photos; by default the spec's, or one in the prefix's bucket.
        force: train registered concepts again.
        waiting: how many packs may wait for room at a time.

    Raises:
        InputError: when no concept is valid, or a setting is wrong.
        ServiceError: when the storage is out of reach.
    """
    place = storage_for(checked.prefix, checked.spec, storage)
    spec = at_storage(checked.spec, place)
    # In S3 there is no place for the registry's file: it stays where `train` has it.
    registry = tracking_uri(spec=checked.spec if place.startswith("s3://") else spec)
    if hide_password(registry) != registry:
        raise InputError(
            f"{hide_password(registry)} holds a password, which the batch's documents would show: "
            "give it to the cluster as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    batch, concepts = plan_batch(
        checked.prefix, checked.concepts, spec, registry=registry, force=force, waiting=waiting
    )
    if not store.is_s3(checked.prefix):
        progress(Event("upload", batch.storage, f"photos of {len(concepts)} concepts"))
    save_batch(batch, upload_photos(concepts, batch.storage))
    return batch


def submit(
    checked: Checked,
    jobs: Jobs,
    progress: Progress,
    *,
    storage: str | None = None,
    force: bool = False,
    waiting: int = 2,
    environment: Mapping[str, str] | None = None,
) -> tuple[Batch, str]:
    """Upload what the cluster can't read, write the batch and submit its job.

    Args:
        checked: what `check` gave.
        jobs: the cluster.
        progress: listens.
        storage: as `plan`.
        force: as `plan`.
        waiting: as `plan`.
        environment: variables for the job.

    Returns:
        the batch and its job's id.

    Raises:
        InputError: when no concept is valid, or a setting is wrong.
        ServiceError: when storage or cluster are out of reach.
    """
    batch = plan(checked, progress, storage=storage, force=force, waiting=waiting)
    job = jobs.submit(batch, environment=environment)
    progress(Event("submit", batch.id, f"packs: {len(batch.packs)}; job: {job}"))
    return batch, job


def retry(
    batch: Batch, jobs: Jobs, *, failed: bool, environment: Mapping[str, str] | None = None
) -> str:
    """Start another driver for what a batch has left to do; returns the job's id.

    Raises:
        InputError: when a driver works on it, here or on another cluster.
        ServiceError: when storage or cluster are out of reach.
    """
    jobs.check_own(batch)
    lost = is_lost(batch)
    # A head that was started again may take a job for running whose driver went with it.
    if jobs.running(batch) and not lost:
        raise InputError(f"the batch {batch.id} is being worked on: wait, or cancel it")
    if lost or is_driven(batch):  # its job is over, but did not say so: it was killed
        end_lease(batch.uri, "interrupted")
    queue_again(batch.uri)
    return jobs.submit(batch, failed=failed, environment=environment)


def wait(view: BatchView, jobs: Jobs, job: str, progress: Progress) -> BatchStatus:
    """Read a batch's status until its job is over, telling what changes; returns the last one.

    A head that starts again and a storage that is away are waited for: the driver goes on.

    Raises:
        ServiceError: when the job ended without its driver having begun, or cluster or storage
            stay away.
    """
    told: dict[str, tuple[str, int]] = {}
    gone = away = 0.0
    while True:
        try:
            status, over = _look(view, jobs, job)
        except ServiceError as error:
            if not away:
                away = time.monotonic()
                progress(Event("batch", view.batch.id, f"goes on by itself: {error}"))
            if time.monotonic() - away > AWAY_SECONDS:
                where = f"echodistill status {view.batch.uri} --watch"
                raise ServiceError(f"{error}; the batch may go on by itself: {where}") from error
            time.sleep(WAIT_SECONDS)
            continue
        away = 0.0
        told = _tell(status, told, progress)
        if over and (status.over or gone and time.monotonic() - gone > _GRACE_SECONDS):
            break
        gone = gone or (time.monotonic() if over else 0.0)
        time.sleep(WAIT_SECONDS)
    if status.state == "running":  # its driver was killed
        end_lease(view.batch.uri, "interrupted")
        status = view.read()
    if not status.over:
        state, message = jobs.state(job)
        lines = jobs.logs(view.batch).strip().splitlines()[-3:]
        raise ServiceError(
            f"the job {job} ended ({state}: {' '.join(message.split())[:200]}) before its driver "
            f"could work: {' | '.join(lines)[:500]}"
        )
    return status


def _look(view: BatchView, jobs: Jobs, job: str) -> tuple[BatchStatus, bool]:
    """Return a batch's status, and whether its job is over.

    When the cluster does not answer, a batch that says that it is over is believed.
    """
    status = view.read()
    try:
        return status, jobs.state(job)[0] in OVER
    except ServiceError:
        if status.over:
            return status, True
        raise


def _tell(
    status: BatchStatus, told: Mapping[str, tuple[str, int]], progress: Progress
) -> dict[str, tuple[str, int]]:
    """Tell states and iterations that are new since the last time."""
    now: dict[str, tuple[str, int]] = {
        one.id: (one.state, one.iteration) for one in status.concepts
    }
    for one in status.concepts:
        if told.get(one.id) == now[one.id] or one.state == "queued":
            continue
        if one.state == "training" and one.iterations:
            progress(Event("train", one.id, one.losses, one.iteration, one.iterations))
        else:
            progress(Event("batch", one.id, ": ".join(filter(None, (one.state, one.error)))))
    return now
