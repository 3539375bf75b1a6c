"""A batch's driver as a RayJob of Kubernetes: made once, adopted again, watched to its end.

The RayJob is named after its batch, and a batch after its content, so whoever is started again
finds the job that it made before. What became of the concepts is read from the batch's documents;
what the RayJob itself says is told of those that it left undone.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from components.steps import Say
from components.train.batch import Batch
from components.train.claims import end_lease
from components.train.rayjob_api import RayJobs
from components.train.state import BatchStatus, BatchView, ConceptState, write_states
from model.errors import InputError, ServiceError

BATCH_WORD = "BATCH_URI"  # of a manifest's entrypoint; the batch's URI takes its place
RUN_LABEL = "echodistill-run"  # the pipeline run that made a RayJob
BATCH_LABEL = "echodistill-batch"
LOOK_SECONDS = 15.0  # between two looks at the batch's documents
_OVER = {"Complete", "Failed", "ValidationFailed"}  # of status.jobDeploymentStatus


@dataclass(frozen=True)
class JobState:
    """What a RayJob is at: whether it is over, whether well, and that in KubeRay's words."""

    over: bool
    good: bool
    words: str


GONE = JobState(over=True, good=False, words="it was deleted")


def drive_as_rayjob(
    batch_uri: str,
    manifest: str,
    jobs: RayJobs,
    say: Say,
    *,
    run: str = "",
    look_seconds: float = LOOK_SECONDS,
) -> BatchStatus:
    """Have a RayJob take a batch to its end; returns how each concept ended.

    A RayJob of this batch that is there is gone on with. One that is over and that another
    pipeline run made is replaced, so that concepts that failed get another try. When nothing is
    left to do none is made.

    Args:
        batch_uri: the batch.
        manifest: YAML that holds one RayJob, with `BATCH_URI` in its entrypoint.
        jobs: where it runs.
        say: hears what changes, a line each.
        run: names the pipeline run.
        look_seconds: between two looks at the batch.

    Raises:
        InputError: when the manifest is wrong, or Kubernetes refuses it.
        ServiceError: when Kubernetes or the storage are out of reach, or the RayJob failed before
            it had trained anything; a RayJob that failed so is removed.
    """
    view = BatchView(batch_uri)
    if all(one.over and one.state != "failed" for one in view.read().concepts):
        say("nothing is left to train")
        return view.read()
    name = job_name(view.batch)
    wanted = _filled(manifest, view.batch, jobs.namespace, name, run)
    job = _started(jobs, wanted, view.batch, run, say)
    state = _watched(jobs, job, view, say, look_seconds)
    status = _settled(view, state, name)
    if not any(one.state in ("trained", "already") for one in status.concepts):
        jobs.delete(name)
        reasons = sorted({one.error or "no reason given" for one in status.concepts})
        raise ServiceError(f"the RayJob {name} trained nothing: {'; '.join(reasons)[:1000]}")
    if state.good:  # a failed one stays until its time is over, for its logs
        jobs.delete(name)
        say(f"RayJob {name}: removed")
    return status


def end_rayjob(batch_uri: str, jobs: RayJobs) -> bool:
    """Remove the RayJob of a batch if it is not over; returns whether there was one."""
    name = job_name(BatchView(batch_uri).batch)
    job = jobs.find(name)
    if job is None or job_state(job).over:
        return False
    jobs.delete(name)
    end_lease(batch_uri, "cancelled")
    return True


def job_name(batch: Batch) -> str:
    """Name the RayJob of a batch: 47 characters at most, and a letter first."""
    return f"batch-{batch.id}"[:47].rstrip("-")


def job_state(job: Mapping[str, Any]) -> JobState:
    """Read what a RayJob is at from its status."""
    status = job.get("status") or {}
    phase, outcome = status.get("jobDeploymentStatus") or "New", status.get("jobStatus") or ""
    told = [phase, outcome, status.get("reason") or "", status.get("message") or ""]
    words = ", ".join(dict.fromkeys(" ".join(text.split())[:300] for text in told if text))
    return JobState(phase in _OVER, phase == "Complete" and outcome == "SUCCEEDED", words)


def rayjob_of(manifest: str) -> dict[str, Any]:
    """Return the RayJob of a manifest.

    Raises:
        InputError: when there is not one of them, or no place for the batch in its entrypoint.
    """
    try:
        found = [each for each in yaml.safe_load_all(manifest) if isinstance(each, dict)]
    except yaml.YAMLError as error:
        raise InputError(f"the RayJob manifest is not YAML: {error}") from None
    rayjobs = [each for each in found if each.get("kind") == "RayJob"]
    if len(rayjobs) != 1:
        raise InputError(f"the manifest holds {len(rayjobs)} RayJobs: give one that holds one")
    job: dict[str, Any] = rayjobs[0]
    if BATCH_WORD not in str((job.get("spec") or {}).get("entrypoint", "")):
        raise InputError(
            f"the RayJob's spec.entrypoint does not say {BATCH_WORD}, which the batch's URI takes "
            f"the place of: write python -m pipeline.drive {BATCH_WORD}"
        )
    return job


def _filled(manifest: str, batch: Batch, namespace: str, name: str, run: str) -> dict[str, Any]:
    """Return the RayJob of a manifest, made out to a batch."""
    job = rayjob_of(manifest)
    entrypoint = str(job["spec"]["entrypoint"])
    if shlex.quote(batch.uri) != batch.uri:  # it may stand within quotes
        raise InputError(f"{batch.uri} has characters that a shell takes apart: rename --storage")
    job["spec"]["entrypoint"] = entrypoint.replace(BATCH_WORD, f"{batch.uri} --failed")
    meta = job.setdefault("metadata", {})
    labels = {**meta.get("labels", {}), BATCH_LABEL: batch.id}
    if run:
        labels[RUN_LABEL] = run[:63]
    job["metadata"] = {**meta, "name": name, "namespace": namespace, "labels": labels}
    return job


def _started(
    jobs: RayJobs, wanted: Mapping[str, Any], batch: Batch, run: str, say: Say
) -> dict[str, Any]:
    """Return the RayJob of the batch: one that is there, or a new one."""
    name = wanted["metadata"]["name"]
    there = jobs.find(name)
    if there is not None:
        meta = there["metadata"]
        own = bool(run) and meta.get("labels", {}).get(RUN_LABEL) == run[:63]
        if not meta.get("deletionTimestamp") and (own or not job_state(there).over):
            say(f"RayJob {name}: goes on ({job_state(there).words})")
            return there
        say(f"RayJob {name}: an earlier run's is removed")
        jobs.delete(name)
        end_lease(batch.uri, "interrupted")
    made = jobs.create(wanted)
    say(f"RayJob {name}: made in the namespace {jobs.namespace}")
    return made


def _watched(
    jobs: RayJobs, job: dict[str, Any], view: BatchView, say: Say, look_seconds: float
) -> JobState:
    """Follow a RayJob and its concepts to the RayJob's end."""
    name, told, known = job["metadata"]["name"], "", dict[str, ConceptState]()
    uid = job["metadata"].get("uid")
    while True:
        state = job_state(job)
        if state.words != told:
            say(f"RayJob {name}: {state.words}")
            told = state.words
        for line in _changes(view.read(), known):
            say(line)
        if state.over:
            return state
        jobs.wait(job, look_seconds)
        found = jobs.find(name)
        if found is None or found["metadata"].get("uid") != uid:
            say(f"RayJob {name}: {GONE.words}")
            return GONE
        job = found


def _changes(status: BatchStatus, known: dict[str, ConceptState]) -> Iterator[str]:
    """Yield a line for each concept whose state is another than the last time."""
    for one in status.concepts:
        before = known.get(one.id)
        known[one.id] = one
        new = before is None or (before.state, before.iteration) != (one.state, one.iteration)
        if new and one.state != "queued":
            count = f"{one.iteration}/{one.iterations}" if one.iterations else ""
            told = one.error or one.note
            yield " ".join(filter(None, (f"{one.id}: {one.state}", count, one.losses, told)))


def _settled(view: BatchView, state: JobState, name: str) -> BatchStatus:
    """Read how the concepts ended; those that the RayJob left undone failed with it."""
    status = view.read()
    if status.state in ("queued", "running"):  # its driver never began, or was killed
        end_lease(view.batch.uri, "interrupted")
    why = status.error or f"the RayJob {name} ended before it was trained ({state.words})"
    undone = [one for one in status.concepts if not one.over]
    failed = [
        replace(one, state="failed", error=f"{why}: run the pipeline again, it goes on", note="")
        for one in undone
    ]
    write_states(view.batch, failed)
    return view.read()
