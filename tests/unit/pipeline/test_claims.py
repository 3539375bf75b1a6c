"""Who works on what: leases that run out, claims that hang on them."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from threading import Event

import pytest

from components.ingest import documents
from components.train.claims import LEASE, Claims, Lease
from model.errors import InputError


def test_a_batch_has_one_driver_at_a_time(tmp_path: Path) -> None:
    batch = str(tmp_path / "batches" / "b1")
    first = Lease(batch, "job-1")
    with pytest.raises(InputError, match="job-1"):
        Lease(batch, "job-2")
    first.end("done")
    Lease(batch, "job-2").end("done")


def test_a_lease_that_is_not_renewed_runs_out(tmp_path: Path) -> None:
    batch = str(tmp_path / "b1")
    place = f"{batch}/{LEASE}"
    dead = {"holder": "x", "job": "job-1", "ended": None, "expires": time.time() - 1}
    documents.write(place, dead)
    lease = Lease(batch, "job-2", seconds=0.3)
    there = documents.read(place)
    deadline = time.monotonic() + 20
    while documents.read(place) == there and time.monotonic() < deadline:  # until it is renewed
        pass
    renewed = documents.read(place)
    assert renewed is not None and there is not None
    assert renewed.value["expires"] > there.value["expires"]
    # Whoever loses it to another learns of it, and says nothing any more.
    documents.write(place, {**renewed.value, "holder": "another"})
    assert lease.lost.wait(20)
    lease.end("done")
    after = documents.read(place)
    assert after is not None and after.value["holder"] == "another" and not after.value["ended"]


def test_a_lease_is_renewed_again_whatever_went_wrong_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(str(tmp_path / "b1"), "job-1", seconds=0.3)
    renewals: list[bool] = []
    renewed = Event()

    def renew() -> bool:
        renewals.append(True)
        if len(renewals) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        renewed.set()
        return True

    monkeypatch.setattr(lease, "_renew_once", renew)
    assert renewed.wait(20) and not lease.lost.is_set()
    lease.end("done")


def test_a_lease_that_is_late_leaves_a_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lease = Lease(str(tmp_path / "b1"), "job-1", seconds=300)
    lease._say_how_late(99.0, 0.5)
    assert not caplog.records
    lease._say_how_late(99.0, 2.0)
    lease.end("done")
    assert "woken 99 s after" in caplog.text and "writing took 2 s" in caplog.text


def test_a_lease_ends_though_the_answer_to_its_last_renewal_was_lost(tmp_path: Path) -> None:
    lease = Lease(str(tmp_path / "b1"), "job-1")
    place = f"{tmp_path}/b1/{LEASE}"
    there = documents.read(place)
    assert there is not None
    documents.write(place, {**there.value, "beat": 0.0})  # its own write, of which it never heard
    lease.end("done")
    after = documents.read(place)
    assert after is not None and after.value["ended"] == "done"


def test_a_digest_has_one_claimant_until_it_lets_go_or_dies(tmp_path: Path) -> None:
    storage = str(tmp_path)
    leases = [Lease(f"{storage}/batches/b{n}", f"job-{n}") for n in range(3)]
    one, two, three = (Claims(storage, lease) for lease in leases)

    mine = one.take("d1", "run-1")
    assert mine is not None and mine.runs == ("run-1",)
    assert two.take("d1", "run-2") is None
    again = one.take("d1", "run-1b")  # its own, after a pack's process died
    assert again is not None and again.runs == ("run-1b", "run-1")
    one.release(mine)  # an old claim lets nothing go
    assert two.take("d1", "run-2") is None
    one.release(again)
    theirs = two.take("d1", "run-2")
    assert theirs is not None and theirs.runs == ("run-2", "run-1b", "run-1")

    leases[1].end("cancelled")  # one write frees every claim
    last = three.take("d1", "run-3")
    assert last is not None and last.runs[0] == "run-3" and "run-2" in last.runs
    for lease in (leases[0], leases[2]):
        lease.end("done")
