"""`echodistill submit --plan`: a batch that is written for a RayJob, with no cluster in reach."""

import shlex
from pathlib import Path

from PIL import Image

from components.train.batch import load_batch, load_concepts
from tests.integration.pipeline.commands import run
from tests.manifests.kustomize import load
from tests.manifests.rendered import BATCH


def test_a_batch_is_written_for_a_rayjob(tmp_path: Path) -> None:
    for name in ("fox", "mug"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        Image.linear_gradient("L").resize((96, 128)).convert("RGB").save(folder / "0.png")
        (folder / "concept.yaml").write_text(f"class_noun: {name}\n")
    (tmp_path / "photos" / "broken").mkdir()
    (tmp_path / "photos" / "broken" / "0.png").write_bytes(b"no picture")
    done = run("submit", "photos", "--plan", "--storage", "kept", "--json", cwd=tmp_path)
    assert done.code == 1, done.stderr  # one concept is not valid
    document = done.document
    assert (document["state"], document["job"]) == ("queued", None)
    assert document["counts"] == {"invalid": 1, "queued": 2}
    batch = load_batch(document["uri"])
    assert sorted(load_concepts(batch)) == ["fox", "mug"]
    assert batch.uri.startswith(str(tmp_path / "kept"))
    # What the guide does with it.
    (job,) = load(BATCH)
    filled = job["spec"]["entrypoint"].replace("BATCH_URI", document["uri"])
    assert document["uri"] in shlex.split(filled)[2].split()
