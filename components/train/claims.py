"""Who works on what: a driver's lease on its batch, and its claims on concepts' digests.

Only the lease has a time: one small document a driver, renewed while it lives. A claim names the
lease that it hangs on and is worth nothing once that has run out or ended, so a driver of thousands
of concepts renews one document, and a driver that ends frees all its claims by one write. A claim
also names the run that trains the concept, so that whoever claims it next finds its checkpoints.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

from components.ingest import documents, store
from model.errors import InputError

LEASE = "driver.json"
JOB_NAME = "ECHODISTILL_JOB"  # the environment variable that tells a driver its job's id
# Clocks of a cluster differ by less, and a driver on cores that are all taken is heard in time.
LEASE_SECONDS = 120.0
_RUNS_KEPT = 8

log = logging.getLogger(__name__)


def is_alive(lease: Any, holder: str | None = None) -> bool:
    """Tell whether a lease document is held now (by `holder`, if given)."""
    if not isinstance(lease, dict) or lease.get("ended"):
        return False
    return (holder is None or lease.get("holder") == holder) and lease["expires"] > time.time()


def end_lease(batch_uri: str, how: str) -> None:
    """Say of a batch whose driver was killed, or never began, that it is over."""
    place = store.join(batch_uri, LEASE)
    there = documents.read(place)
    if there is None:
        ended = {"holder": "", "job": None, "expires": 0.0, "ended": how, "error": None}
        documents.write(place, ended, documents.ABSENT)
    elif not there.value.get("ended"):
        documents.write(place, {**there.value, "ended": how}, there.tag)


def queue_again(batch_uri: str) -> None:
    """Say of a batch whose last driver has ended that another was asked for."""
    place = store.join(batch_uri, LEASE)
    there = documents.read(place)
    if there is not None and there.value.get("ended"):
        documents.write(place, {**there.value, "ended": "queued", "error": None}, there.tag)


class Lease:
    """A driver's hold on a batch, renewed by a thread until it ends.

    Attributes:
        uri: of the batch.
        holder: this driver's name, made anew each time.
        lost: set when another driver holds the batch now.
    """

    def __init__(self, batch_uri: str, job: str, *, seconds: float = LEASE_SECONDS) -> None:
        """Take the lease.

        Raises:
            InputError: when another driver has it.
        """
        self.uri = batch_uri
        self.holder = secrets.token_hex(8)
        self.lost = threading.Event()
        self._seconds = seconds
        self._place = store.join(batch_uri, LEASE)
        self._facts = {"holder": self.holder, "job": job, "began": time.time(), "ended": None}
        self._stop = threading.Event()
        there = documents.read(self._place)
        if there is not None and is_alive(there.value):
            raise self._taken(there.value)
        tag = self._write(documents.ABSENT if there is None else there.tag)
        if tag is None:
            raise self._taken({})
        self._tag = tag
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def end(self, how: str, error: str | None = None) -> None:
        """Give the lease back: `done`, `cancelled` or `failed`; frees every claim on it."""
        self._stop.set()
        self._thread.join()
        if not self.lost.is_set():
            self._facts |= {"ended": how, "error": error}
            self._renew_once()

    def _taken(self, lease: dict[str, Any]) -> InputError:
        return InputError(
            f"another driver (job {lease.get('job', 'unknown')}) works on the batch {self.uri}: "
            "wait for its end, or cancel it"
        )

    def _write(self, expected: str) -> str | None:
        facts = {**self._facts, "beat": time.time(), "expires": time.time() + self._seconds}
        return documents.write(self._place, facts, expected)

    def _renew(self) -> None:
        asleep = time.monotonic()
        while not self._stop.wait(self._seconds / 3):
            awake = time.monotonic()
            try:
                if not self._renew_once():
                    self.lost.set()
            except Exception as error:  # whatever it is: unless it is tried again the lease is lost
                log.warning("the lease on %s could not be renewed: %s", self.uri, error)
            self._say_how_late(awake - asleep - self._seconds / 3, time.monotonic() - awake)
            if self.lost.is_set():
                return
            asleep = time.monotonic()

    def _say_how_late(self, late: float, took: float) -> None:
        """Leave a trace of a driver that lives and that others take for dead all the same."""
        if late + took > self._seconds / 3:
            log.warning(
                "the lease on %s is late: its thread was woken %.0f s after it was to be, and "
                "writing took %.0f s",
                self.uri,
                late,
                took,
            )

    def _renew_once(self) -> bool:
        tag = self._write(self._tag)
        if tag is None:
            # Our own write may have arrived though its answer did not.
            there = documents.read(self._place)
            if there is None or there.value.get("holder") != self.holder:
                return False
            tag = self._write(there.tag) or there.tag
        self._tag = tag
        return True


@dataclass(frozen=True)
class Claim:
    """A claim that was taken; `runs` are those that trained the digest, the present one first."""

    key: str
    runs: tuple[str, ...]
    tag: str


class Claims:
    """Claims on digests below a storage folder, on one driver's lease."""

    def __init__(self, storage: str, lease: Lease) -> None:
        self._folder = store.join(storage, "claims")
        self._lease = lease

    def take(self, key: str, run: str) -> Claim | None:
        """Claim a digest for a run; None while a living driver of another batch has it.

        Raises:
            ServiceError: when the store is out of reach.
        """
        uri = self._uri(key)
        there = documents.read(uri)
        if there is not None and self._is_held(there.value):
            return None
        earlier = () if there is None else there.value["runs"]
        # A run that was cancelled before its first checkpoint must not hide those before it.
        runs = tuple(dict.fromkeys((run, *earlier)))[:_RUNS_KEPT]
        value = {"batch": self._lease.uri, "holder": self._lease.holder, "runs": runs}
        tag = documents.write(uri, value, documents.ABSENT if there is None else there.tag)
        return Claim(key, runs, tag) if tag else None

    def release(self, claim: Claim) -> None:
        """Free a digest; its runs stay known. Nothing happens when the claim was lost."""
        free = {"batch": None, "holder": None, "runs": claim.runs}
        documents.write(self._uri(claim.key), free, claim.tag)

    def _is_held(self, value: dict[str, Any]) -> bool:
        if not value["holder"] or value["holder"] == self._lease.holder:
            return False
        lease = documents.read(store.join(value["batch"], LEASE))
        return lease is not None and is_alive(lease.value, value["holder"])

    def _uri(self, key: str) -> str:
        return store.join(self._folder, f"{key}.json")
