"""A batch's report from its documents and the registry alone."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from components.evaluate.tags import MODELS_TAG, PROTOCOL_TAG
from components.ingest import documents
from components.ingest.concept_folder import CheckedConcept, Concept
from components.register.registry import register_adapter, set_metrics, set_tags
from components.spec import resolve_spec
from components.train.batch import at_storage, plan_batch, save_batch
from components.train.claims import LEASE
from components.train.state import FOUND, PACKS, ConceptState, as_facts
from components.train.tracking import Tracker, TrackingSettings
from pipeline.cli import main
from pipeline.cli.output import Output
from tests.integration.data.conftest import MakeAdapter


def test_status_writes_a_page_of_every_concept(
    tracking_uri: str,
    make_adapter: MakeAdapter,
    concept: Concept,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = at_storage(resolve_spec("pocket", None, ["cost.gpu_hour=3600"]), str(tmp_path))
    lost = Concept("lost", "cat", "<new1>", "cat", True, ())
    checked = [
        CheckedConcept(concept.id, True, "dog", 3, (), concept),
        CheckedConcept("lost", True, "cat", 0, (), lost),
        CheckedConcept("broken", False, None, 0, ("0.png: is <no> picture",)),
    ]
    batch, concepts = plan_batch("photos/", checked, spec, registry=tracking_uri)
    save_batch(batch, concepts)

    # One was trained and measured; one broke after its first pictures.
    folder = make_adapter()
    Image.new("RGB", (4 * 32, 32), (10, 200, 10)).save(folder / "preview.png")
    version = register_adapter(folder, concept, tracking_uri=tracking_uri)
    figures = {"clip_i": 0.71, "dino": 0.52, "clip_t": 0.3, "before_clip_i": 0.6}
    set_metrics(version, figures, tracking_uri=tracking_uri)
    how = {MODELS_TAG: "CLIP tiny", PROTOCOL_TAG: "dreambench 2x1"}
    set_tags(version, how, tracking_uri=tracking_uri)
    tracker = Tracker(TrackingSettings(tracking_uri, "x"), "pack")
    tracker.start("lost", {}, "")
    tracker.log("lost", {1: {"loss/rec": 2.0}, 2: {"loss/rec": 1.0}})
    tracker.log_picture("lost", "samples/000002.png", torch.zeros(3, 32, 128, dtype=torch.uint8))
    run_id = tracker.close()["lost"]
    states = [
        ConceptState(
            concept.id, "trained", version="1", sha256=version.sha256, seconds=12.0,
            gpu_seconds=24.0, cost=24.0, iteration=9, worker="node-7", promoted=True,
            run_id=version.run_id,
        ),
        ConceptState(
            "lost", "failed", error="the loss is not finite", note="retry it", run_id=run_id
        ),
    ]  # fmt: skip
    facts = {one.id: as_facts(one) for one in states}
    documents.write(f"{batch.uri}/{PACKS}/0.json", facts)
    lease = {"holder": "x", "job": "j", "ended": "done", "expires": time.time()}
    documents.write(f"{batch.uri}/{LEASE}", lease)
    found = {"digests": {}, "already": {}, "registry": tracking_uri}
    documents.write(f"{batch.uri}/{FOUND}", found)

    assert main.run(["status", batch.uri, "--report", "out/report.html"], Output()) == 1
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 3 + 4 + 4  # photos, the preview's pictures, the last samples
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:", "#lost", "#tiny"}
    assert "<td>trained</td>" in page and "1 (champion)" in page and "0.710" in page
    assert "node-7" in page and version.sha256[:16] in page and "CLIP tiny" in page
    assert "the loss is not finite; retry it" in page and "is &lt;no&gt; picture" in page
    assert page.count("<polyline") == 2 and "1 failed, 1 invalid, 1 trained" in page

    # Nothing that can't be fetched costs the page; a folder or no registry is told.
    shutil.rmtree(tmp_path / "mlartifacts")
    assert main.run(["status", batch.uri, "--report", "report.html"], Output()) == 1
    assert Path("report.html").read_text(encoding="utf-8").count("<img") == 3
    assert main.run(["status", batch.uri, "--report", "out"], Output()) == 2
    wrong = ["status", batch.uri, "--report", "x.html", "--tracking-uri", "sqlite:///no/x.db"]
    assert main.run(wrong, Output()) == 2 and not Path("x.html").exists()
