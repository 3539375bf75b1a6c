"""The step `train`: have a batch trained, by a RayJob of Kubernetes or here."""

from __future__ import annotations

from components.steps import Say
from components.train.state import BatchStatus
from model.errors import InputError, ServiceError

BACKENDS = ("rayjob", "local")


def train_batch(
    batch_uri: str,
    say: Say,
    *,
    backend: str = "rayjob",
    rayjob: str = "",
    namespace: str = "",
    run: str = "",
) -> BatchStatus:
    """Train what a batch has left to do; adapters are left in its folder (handover.py).

    Args:
        batch_uri: the batch.
        say: hears how it goes on.
        backend: `rayjob`: a RayJob, on a cluster of its own; `local`: this process's Ray.
        rayjob: YAML that holds the RayJob, for that backend.
        namespace: of the RayJob; by default the pod's own.
        run: names the pipeline run.

    Returns:
        how each concept ended; one that failed does not stop the others.

    Raises:
        InputError: when a setting or the manifest is wrong.
        ServiceError: when something is out of reach, or nothing at all was trained.
    """
    if backend == "local":
        from components.train.here import drive_here

        status = drive_here(batch_uri, say)
    elif backend == "rayjob":
        from components.train.rayjob import drive_as_rayjob
        from components.train.rayjob_api import RayJobs

        status = drive_as_rayjob(batch_uri, rayjob, RayJobs(namespace), say, run=run)
    else:
        raise InputError(f"there is no backend {backend!r}: take {' or '.join(BACKENDS)}")
    if not any(one.state in ("trained", "already") for one in status.concepts):
        reasons = sorted({one.error or "no reason given" for one in status.concepts})
        raise ServiceError(f"nothing was trained: {'; '.join(reasons)[:1000]}")
    return status
