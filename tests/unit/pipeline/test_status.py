"""`echodistill status --watch`: it stays until the batch is over."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

from components.ingest import documents
from components.train.claims import Lease
from components.train.state import PACKS, ConceptState, as_facts
from pipeline.cli import main, status
from pipeline.cli.output import Output
from tests.unit.pipeline.test_batch import planned

DONE = ConceptState(
    "a", "trained", version="3", iteration=9, iterations=9, seconds=7.0, worker="node-7",
    loss={"rec": 0.5, "mse": 0.25}, promoted=True,
)  # fmt: skip


@pytest.mark.parametrize("how", ["lines", "terminal", "json"])
def test_a_batch_is_watched_until_it_is_over(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "WATCH_SECONDS", 0.05)
    batch = planned(tmp_path, "a")
    lease, over = Lease(batch.uri, "job"), threading.Event()

    def end() -> None:
        documents.write(f"{batch.uri}/{PACKS}/0.json", {"a": as_facts(DONE)})
        over.set()
        lease.end("done")

    output = Output(as_json=how == "json")
    if how == "terminal":
        output.console = Console(file=output._stdout, force_terminal=True, width=120, height=9)
    threading.Timer(0.5, end).start()
    words = ["status", batch.uri, "--watch", *(["--json"] if how == "json" else [])]
    assert main.run(words, output) == 1  # one concept is not valid
    assert over.is_set()
    said = capfd.readouterr().out
    if how == "json":
        document = json.loads(said)
        assert document["state"] == "done" and document["counts"] == {"invalid": 1, "trained": 1}
        return
    assert ("queued" in said) is (how == "terminal")  # which shows it while it goes on
    row = [line.split() for line in said.splitlines() if line.startswith("a ")][-1]
    assert row == ["a", "trained", "9/9", "rec", "0.5", "mse", "0.25", "7", "node-7", "3"]


def test_a_batch_that_nothing_has_begun_says_where_to_look(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    batch = planned(tmp_path, "a")
    assert main.run(["status", batch.uri], Output()) == 1  # one concept is not valid
    assert f"echodistill logs --batch {batch.uri} " in capfd.readouterr().out
