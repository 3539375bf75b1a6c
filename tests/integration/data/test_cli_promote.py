"""`echodistill evaluate`, `promote` and `rollback`, in this process: one story, and wrong input."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.ingest.concept_folder import Concept, check_prefix
from components.register.registry import get_version, register_adapter
from components.spec import resolve_spec, spec_yaml
from components.train.tracking import Tracker, TrackingSettings
from pipeline.cli import main
from pipeline.cli.output import Output
from tests.integration.data.conftest import MakeAdapter
from tests.tiny import TinyPaths
from tests.unit.data.pictures import concept_folder, photo

Command = Callable[..., tuple[int, Any]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command; gives its exit code and its document, or the error's sentence."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, Any]:
        output = Output()
        failures: list[str] = []
        output.fail = lambda message, code: failures.append(message)  # type: ignore[method-assign]
        code = main.run([*arguments], output)
        return code, failures[0] if failures else output.document

    return run


@pytest.fixture
def dog(tmp_path: Path, concept: Concept) -> Concept:
    """The concept of the adapters, with photos of this test's own."""
    prefix = tmp_path / "photos"
    concept_folder(prefix, concept.id)
    (checked,) = check_prefix(str(prefix))
    assert checked.concept is not None
    return replace(checked.concept, live=concept.live)


def trained(tracking_uri: str, tiny: TinyPaths, dog: Concept, name: str) -> str:
    """Log the run of a training; gives its id."""
    base = {"name": "tiny", "metric_clip": tiny.clip, "metric_dino": tiny.dino}
    base |= {"teacher": tiny.teacher, "student": tiny.student, "identity": tiny.clip}
    sets = [f"base.{key}={value}" for key, value in base.items()]
    quick = ["resolution=32", "evaluate.prompts=2", "evaluate.seeds=1"]
    tracker = Tracker(TrackingSettings(tracking_uri, "x"), name)
    tracker.start(dog.id, {}, spec_yaml(resolve_spec("pocket", None, [*sets, *quick])))
    tracker.log_dataset(dog)
    tracker.finish(dog.id, None)
    return tracker.close()[dog.id]


def test_measured_promoted_refused_forced_and_rolled_back(
    tracking_uri: str,
    tiny: TinyPaths,
    make_adapter: MakeAdapter,
    dog: Concept,
    command: Command,
    tmp_path: Path,
) -> None:
    for number, name in ((1, "a"), (2, "b")):
        run_id = trained(tracking_uri, tiny, dog, name)
        folder = make_adapter(number, name, name)
        register_adapter(folder, dog, tracking_uri=tracking_uri, run_id=run_id)
    code, told = command("evaluate", dog.id)
    assert code == 2 and "has no champion" in told and "(1, 2)" in told

    # By the settings of its run, against the photos of its run.
    code, found = command("evaluate", f"{dog.id}@1", "-o", "out")
    (one,) = found["versions"]
    version = get_version(dog.id, 1, tracking_uri=tracking_uri)
    assert version is not None and version.metrics == one["metrics"]
    assert code == (0 if one["passed"] else 1) and found["passed"] == one["passed"]
    assert one["protocol"] == "dreambench 2x1" and str(tiny.clip) in one["feature_models"]
    assert one["photos"] == {"place": str(tmp_path / "photos" / dog.id), "count": 3, "note": ""}
    assert [Path(path).is_file() for path in one["image_paths"].values()] == [True, True]
    client = MlflowClient(tracking_uri, tracking_uri)
    assert len(client.list_artifacts(version.run_id, "evaluation")) == 2
    card = client.get_model_version(version.name, "1").description
    assert "Draws one dog" in card and f"| CLIP-I | {one['metrics']['before_clip_i']:.3f} |" in card

    # Without a champion there is nothing to lose; then there is, and the candidate has no figures.
    code, done = command("promote", f"{dog.id}@1")
    assert (code, done["champion"], done["champion_before"]) == (0, "1", None)
    code, done = command("promote", dog.id)
    assert (code, done["version"], done["promoted"], done["champion"]) == (1, "2", False, "1")
    assert f"echodistill evaluate {dog.id}@2" in done["reasons"][0]

    # Other networks and prompts make other figures, which are not compared.
    other = ("--set", f"base.metric_dino={tiny.vit}", "--seeds", "2")
    code, found = command("evaluate", f"{dog.id}@2", *other)
    (one,) = found["versions"]
    assert code == 1 and one["protocol"] == "dreambench 2x2" and str(tiny.vit) in str(one)
    assert "measured differently" in one["reasons"][-1]
    # A gate that nobody passes, and force.
    command("evaluate", f"{dog.id}@candidate")
    code, done = command("promote", dog.id, "--set", "gate.min_clip_t=1")
    assert code == 1 and "under the gate's 1.000" in done["reasons"][0]
    code, done = command("promote", dog.id, "--set", "gate.min_clip_t=1", "--force")
    assert (code, done["forced"], done["champion"], done["champion_before"]) == (0, True, "2", "1")
    code, done = command("rollback", dog.id)
    assert (code, done["champion"], done["champion_before"]) == (0, "1", "2")
    code, told = command("rollback", dog.id)
    assert code == 2 and "replaced no champion" in told

    # Photos that changed are told, those that are gone are asked for.
    place = Path(dog.images[0].uri)
    photo(seed=99).save(place)
    _, found = command("evaluate", dog.id)
    assert "1 of 3 photos changed" in found["versions"][0]["photos"]["note"]
    place.unlink()
    code, told = command("evaluate", dog.id)
    assert code == 2 and place.name in told and "--concepts" in told
    shutil.copytree(place.parent, tmp_path / "others" / dog.id)
    _, found = command("evaluate", dog.id, "--concepts", "others")
    note = found["versions"][0]["photos"]["note"]
    assert "2 of 3 are still there, 0 are new" in note
    concept_folder(tmp_path / "cats", "cat")
    code, told = command("evaluate", dog.id, "--concepts", "cats")
    assert code == 2 and f"has no concept {dog.id} (it has cat)" in told


@pytest.mark.parametrize("name", ["evaluate", "promote", "rollback"])
def test_what_is_not_there(tracking_uri: str, command: Command, name: str) -> None:
    code, told = command(name, "nobody")
    assert code == 2 and "there is no concept 'nobody'" in told
    code, told = command(name, "My Dog")
    assert code == 2 and "such as my-dog" in told
    code, told = command(name, "nobody", "--tracking-uri", "sqlite:///nowhere/x.db")
    assert code == 2 and "there is no registry" in told and not Path("nowhere").exists()


@pytest.mark.parametrize("name", ["evaluate", "promote", "rollback"])
def test_a_server_that_is_away(command: Command, name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, told = command(name, "fox", "--tracking-uri", uri)
    assert code == 3 and "did not answer" in told


def test_a_version_of_which_no_photos_are_known(
    tracking_uri: str, make_adapter: MakeAdapter, concept: Concept, command: Command
) -> None:
    register_adapter(make_adapter(), concept, tracking_uri=tracking_uri)
    code, told = command("evaluate", f"{concept.id}@1")
    assert code == 2 and "does not say which photos" in told and "--concepts" in told
