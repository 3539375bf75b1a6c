"""Batches as jobs of a Ray cluster, through its Jobs API."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from components.ingest import documents, store
from components.train.batch import Batch
from components.train.claims import JOB_NAME, LEASE, LEASE_SECONDS, end_lease, is_alive
from model.errors import InputError, ServiceError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_SECONDS = 30.0
START_SECONDS = 60.0  # that a cluster which has just started may take until it runs jobs
_BATCH = "echodistill.batch"
_ENVIRONMENT = {
    # A node of an autoscaling cluster takes minutes to come.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
    # The packs say much that is alike, and each is a line of its own.
    "RAY_DEDUP_LOGS": "0",
}
OVER = {"STOPPED", "SUCCEEDED", "FAILED"}
_NO_AGENT = "No available agent"  # Ray's words


class Jobs:
    """The jobs of one cluster, whose dashboard is at `address`.

    A cluster with token authentication wants RAY_AUTH_TOKEN in the environment.
    """

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            InputError: when the cluster refuses the token.
            ServiceError: when it is out of reach.
        """
        self.address = address if "://" in address else f"http://{address}"
        self._check_port()
        if "RAY_AUTH_TOKEN" in os.environ:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        # Ray's client lets these win over the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        from ray.job_submission import JobSubmissionClient

        with self._plain_errors():
            self._client: Any = JobSubmissionClient(self.address)

    def submit(
        self, batch: Batch, *, failed: bool = False, environment: Mapping[str, str] | None = None
    ) -> str:
        """Start a driver for a batch; returns the job's id.

        With `failed` it tries those again that failed. `environment` is for driver and workers; the
        cluster's dashboard shows it. A cluster that has only just started is given
        `START_SECONDS` until it runs jobs.

        Raises:
            ServiceError: when the cluster is out of reach or does not take the job.
        """
        with self._plain_errors():
            count = len(self._of(batch))
            job = f"{batch.id}-j{count + 1}"
            variables = {**_ENVIRONMENT, **(environment or {}), JOB_NAME: job}
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint(batch.uri, failed),
                        submission_id=job,
                        runtime_env={"env_vars": variables},
                        metadata={_BATCH: batch.id},
                    )
                    return job
                except RuntimeError as error:
                    if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(1.0)

    def state(self, job: str) -> tuple[str, str]:
        """Return a job's status (PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED) and message."""
        with self._plain_errors():
            info = self._client.get_job_info(job)
            return info.status.value, info.message or ""

    def running(self, batch: Batch) -> bool:
        """Tell whether a job of a batch is pending or runs."""
        with self._plain_errors():
            return any(self.state(job)[0] not in OVER for job in self._of(batch))

    def logs(self, batch: Batch) -> str:
        """Return what the drivers of a batch and their packs said.

        Raises:
            InputError: when the cluster knows no job of it.
        """
        with self._plain_errors():
            jobs = self._of(batch)
            if not jobs:
                raise InputError(
                    f"the cluster at {self.address} knows no job of the batch {batch.id}: logs go "
                    "with the cluster, echodistill status has what was kept"
                )
            return "".join(self._client.get_job_logs(job) for job in jobs)

    def check_own(self, batch: Batch) -> None:
        """Refuse a batch that a driver works on of which this cluster knows nothing.

        Raises:
            InputError: when there is one: another cluster's, or one that died a moment ago with the
                head that knew its job.
        """
        lease = documents.read(store.join(batch.uri, LEASE))
        if lease is None or not is_alive(lease.value):
            return
        job = lease.value.get("job")
        with self._plain_errors():
            if job not in self._of(batch):
                raise InputError(
                    f"a driver ({f'job {job}' if job else 'of a RayJob'}) works on the batch "
                    f"{batch.id} that the cluster at {self.address} does not know: give the "
                    "--address of its own (a RayJob is deleted), or wait "
                    f"{LEASE_SECONDS:.0f} s if that is gone"
                )

    def cancel(self, batch: Batch) -> None:
        """Stop a batch's jobs and wait until they are; what is trained stays.

        Raises:
            InputError: when another cluster works on it.
            ServiceError: when the cluster is out of reach, or a job does not stop.
        """
        self.check_own(batch)
        with self._plain_errors():
            for job in self._of(batch):
                if self.state(job)[0] not in OVER:
                    self._client.stop_job(job)
            deadline = time.monotonic() + STOP_SECONDS
            while self.running(batch):
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"the jobs of {batch.id} did not stop in {STOP_SECONDS:.0f} s: look at "
                        f"{self.address}"
                    )
                time.sleep(0.3)
        end_lease(batch.uri, "cancelled")

    def _of(self, batch: Batch) -> list[str]:
        """Return the ids of a batch's jobs, in the order in which they were submitted."""
        every = sorted(self._client.list_jobs(), key=lambda job: job.start_time or 0)
        ours = (job for job in every if (job.metadata or {}).get(_BATCH) == batch.id)
        return [str(job.submission_id) for job in ours]

    def _check_port(self) -> None:
        """Ask for a connection, since Ray's client waits for one without an end."""
        try:
            parts = urlsplit(self.address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(self.address)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=5).close()
        except ValueError:  # a port or a host's name that none can be, too
            raise InputError(
                f"--address {self.address} must be http://host:port, of the dashboard"
            ) from None
        except OSError as error:
            raise self._away(error) from error

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise InputError(
                f"the Ray cluster at {self.address} refused the token: set RAY_AUTH_TOKEN to the "
                "cluster's (and RAY_AUTH_MODE=token)"
            ) from error
        except (ConnectionError, OSError) as error:
            raise self._away(error) from error
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
            raise ServiceError(f"the Ray cluster at {self.address} answered: {reason}") from error

    def _away(self, error: Exception) -> ServiceError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return ServiceError(
            f"the Ray cluster at {self.address} can't be reached ({reason}): check --address and "
            "that its dashboard listens there"
        )


def entrypoint(uri: str, failed: bool) -> str:
    """Return the shell line that starts a driver.

    The cluster's own `python` runs it; where Ray was started from an environment that is not on the
    PATH, the submitting one does, if it is on that machine too.
    """
    # In a checkout any python finds our own package, so what it needs is looked for too.
    find = (
        "from importlib.util import find_spec as f; "
        "raise SystemExit(not all(map(f, ('ray', 'torch', 'pipeline.drive'))))"
    )
    pythons = f"python {shlex.quote(sys.executable)}"
    flag = " --failed" if failed else ""
    return (
        f'for p in {pythons}; do "$p" -c {shlex.quote(find)} 2>/dev/null && '
        f'exec "$p" -m pipeline.drive {shlex.quote(uri)}{flag}; done; '
        "echo 'error: echodistill is not installed on this node: use an image that has it'; exit 3"
    )


def is_lost(batch: Batch) -> bool:
    """Tell whether a driver began with a batch, did not end, and has not been heard of since."""
    lease = documents.read(store.join(batch.uri, LEASE))
    return lease is not None and not lease.value.get("ended") and not is_alive(lease.value)


def is_driven(batch: Batch) -> bool:
    """Tell whether a driver works on a batch now."""
    lease = documents.read(store.join(batch.uri, LEASE))
    return lease is not None and is_alive(lease.value)
