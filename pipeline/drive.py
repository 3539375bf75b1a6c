"""What the cluster's job runs: `python -m pipeline.drive <batch URI> [--failed]`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from threading import Event as Flag

from components.register.connection import Patience
from components.train.batch import load_batch
from components.train.claims import JOB_NAME, LEASE_SECONDS, Lease
from components.train.state import ConceptState
from model.errors import AwayError, EchoDistillError, InputError, ServiceError
from pipeline.cli.interruptible import Interruptible
from pipeline.driver import START_SECONDS, Driver
from pipeline.pack_run import log_lines
from pipeline.progress import Event, Progress
from pipeline.services import local_ray, quiet_libraries


def drive(
    uri: str,
    progress: Progress,
    stop: Flag,
    *,
    failed: bool = False,
    job: str = "",
    lease_seconds: float = LEASE_SECONDS,
    **seconds: float,
) -> dict[str, ConceptState]:
    """Take a batch to its end under a lease; the process is connected to a Ray.

    Returns:
        every concept's state, by id.

    Raises:
        InputError: when another driver works on it, or settings are wrong.
        ServiceError: when a service stays out of reach at the start.
    """
    patience = _patience(uri, progress, stop)
    batch = patience.ask(lambda: load_batch(uri))
    lease = patience.ask(lambda: Lease(uri, job, seconds=lease_seconds))
    driver: Driver | None = None
    try:
        driver = Driver(batch, lease, progress, stop, **seconds)
        states = driver.run(failed=failed)
        if lease.lost.is_set():
            raise InputError(f"another driver took the batch {uri} over: this one ends")
    except BaseException as error:
        ours = isinstance(error, EchoDistillError)
        if stop.is_set() and ours:  # while it waited for a service
            lease.end("cancelled")
        else:
            lease.end("failed", str(error) if ours else f"{type(error).__name__}: {error}")
        if driver is not None:
            driver.tell_end()
        raise
    lease.end("cancelled" if stop.is_set() else "done")
    driver.tell_end()
    return states


def main(arguments: Sequence[str]) -> int:
    """Entry point of the cluster's job: a batch's URI, and `--failed`."""
    quiet_libraries()
    uri, failed = arguments[0], "--failed" in arguments
    stop, say = Flag(), log_lines()

    def work() -> bool:
        batch = _patience(uri, say, stop).ask(lambda: load_batch(uri))
        os.environ.setdefault("MLFLOW_TRACKING_URI", batch.registry)
        with local_ray(cpus=1, echo=True):
            job = os.environ.get(JOB_NAME, "")
            states = drive(uri, say, stop, failed=failed, job=job)
        left = batch.train_only  # the gate is another's business
        return all(one.good or (left and one.state == "trained") for one in states.values())

    try:
        good = Interruptible(say).run(work, stop.set)
    except KeyboardInterrupt:  # or SIGTERM, which is how a job is stopped
        print("cancelled", flush=True)
        return 130
    except EchoDistillError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    except Exception:  # 1, which Python would end with, says that concepts failed
        traceback.print_exc()
        return EchoDistillError.exit_code
    return 0 if good else 1


def _patience(uri: str, progress: Progress, stop: Flag) -> Patience:
    """Wait for a storage that is away as a driver begins, as long as for the registry."""

    def sleep(pause: float) -> None:
        if stop.wait(pause):
            raise ServiceError("the driver was stopped while it waited for the storage")

    def say(text: str) -> None:
        progress(Event("batch", uri, text))

    return Patience(START_SECONDS, say, sleep, AwayError)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
