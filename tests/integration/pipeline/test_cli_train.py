"""`echodistill train` and `generate` from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.pipeline.commands import Finished, run, run_here, start
from tests.integration.pipeline.processes import MARK, left_behind, marked, new_mark

QUICK = ("--set", "train.iterations=2", "--set", "echo.rounds=0", "--set", "evaluate.prompts=1")


def refused(done: Finished, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.document["error"] == {"message": done.error, "exit_code": code}
    for word in words:
        assert word in done.error, done.error


def test_train_then_generate(tiny_base: Path, concepts: Path, tmp_path: Path) -> None:
    base = ("--base", str(tiny_base))
    mark = new_mark()
    words = ("train", str(concepts / "my-dog"), *base, *QUICK, "--report", "report.html", "--json")
    done = run(*words, cwd=tmp_path, **{MARK: mark})
    assert done.code == 0, done.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 3 + 4 and "1 (champion)" in page
    (dog,) = done.document["concepts"]
    assert dog["id"] == "my-dog" and dog["state"] == "trained" and dog["error"] is None
    assert dog["version"] == "1" and len(dog["sha256"]) == 64 and dog["seconds"] > 0
    assert "train: my-dog" in done.stderr
    assert left_behind(mark) == {}

    words = ("generate", "my-dog", "a dog on the beach", "--n", "2", "-o", "pictures", "--json")
    made = run(*words, cwd=tmp_path)
    assert made.code == 0, made.stderr
    document = made.document
    assert document["sha256"] == dog["sha256"] and document["seeds"] == [0, 1]
    assert document["prompt"] == "a <new1> dog on the beach"
    paths = [tmp_path / path for path in document["image_paths"]]
    first = [path.read_bytes() for path in paths]
    assert Image.open(paths[0]).size == (32, 32) and first[0] != first[1]
    assert run_here(*words, cwd=tmp_path).code == 0
    assert [path.read_bytes() for path in paths] == first, "the same seeds, other pictures"

    # A candidate that does not pass the gate is told by the exit code; the champion stays.
    strict = ("--force", "--set", "gate.min_clip_t=1", "--json")
    done = run("train", str(concepts / "my-dog"), *base, *QUICK, *strict, cwd=tmp_path)
    assert done.code == 1, done.stderr
    (second,) = done.document["concepts"]
    assert (second["state"], second["version"], second["promoted"]) == ("trained", "2", False)
    assert second["error"] is None and "clip_t" in second["note"]
    assert run_here(*words, cwd=tmp_path).document["version"] == "1"

    unknown = run_here("generate", "my-cat", "a cat", "--json", cwd=tmp_path)
    refused(unknown, 2, "my-cat", "train it")
    ninth = run_here("generate", "my-dog@9", "a dog", "--json", cwd=tmp_path)
    refused(ninth, 2, "version 9", "(1, 2)")
    refused(run_here("generate", "My Dog", "a dog", "--json", cwd=tmp_path), 2, "such as my-dog")
    nowhere = run_here("generate", "my-dog", "a dog", "-o", "/dev/null/x", "--json", cwd=tmp_path)
    refused(nowhere, 2, "/dev/null/x can't be written")
    refused(run_here("generate", "my-dog", "a cat", "--json", cwd=tmp_path), 2, "<new1>", "dog")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_its_processes_ends_everything(
    tiny_base: Path, concepts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    mark = new_mark()
    arguments = ("train", str(concepts), "--base", str(tiny_base), "--json")
    slow = ("--set", "train.iterations=100000", "--set", "train.checkpoint_seconds=1")
    scratch = tempfile.mkdtemp(prefix="t-")  # short, for sockets lie in it
    process = start(*arguments, *slow, cwd=tmp_path, TMPDIR=scratch, **{MARK: mark})
    assert process.stderr is not None
    try:
        for line in process.stderr:  # until it trains
            if "train: my-dog" in line and "s/it" in line:
                break
        assert len(marked(mark)) > 3
        assert list(Path(scratch).glob("echodistill-*"))
        # As a terminal's Ctrl-C and a service manager do: Ray's processes get it too.
        os.killpg(process.pid, number)
        process.send_signal(number)  # an impatient person
        stdout, stderr = process.communicate(timeout=45)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert json.loads(stdout)["error"]["exit_code"] == 130
    assert "Traceback" not in stderr and "\x1b" not in stderr
    assert left_behind(mark) == {}
    assert list(Path(scratch).glob("echodistill-*")) == []
    shutil.rmtree(scratch)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "pokcet"], ["pokcet", "pocket"]),
        (["--set", "train.iteratons=5"], ["train.iteratons", "train.iterations"]),
        (["--set", "train.iterations=-5"], ["train.iterations", "-5"]),
        (["--set", "train.zero_stage=4"], ["train.zero_stage", "4"]),
        (["--spec", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--spec", "typo.yaml"], ["typo.yaml", "'los'", "'loss'"]),
        (["--spec", "broken.yaml"], ["broken.yaml", "line 3, column 13"]),
        (["--set", "tracking.enabled=false"], ["tracking.enabled"]),
    ],
    ids=lambda value: "",
)
def test_a_wrong_setting_is_one_sentence(
    concepts: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "typo.yaml").write_text("preset: pocket\nlos:\n  mse_weight: 2\n")
    (tmp_path / "broken.yaml").write_text("seed: 1\ntrain: [1\n  iterations: 2\n")
    done = run("train", str(concepts), *arguments, "--json", cwd=tmp_path)
    refused(done, 2, *words)
    # Nothing was begun: the sentence comes before Ray.
    assert "ray:" not in done.stderr


def test_an_mlflow_server_that_is_away(tiny_base: Path, concepts: Path, tmp_path: Path) -> None:
    done = run(
        "train", str(concepts), "--base", str(tiny_base), *QUICK, "--json", cwd=tmp_path,
        MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )  # fmt: skip
    refused(done, 3, "http://127.0.0.1:9 did not answer (connection refused)")
    assert "ray:" not in done.stderr


def test_nothing_is_left_of_a_prefix_that_is_not_there(tmp_path: Path) -> None:
    refused(run("train", "nowhere", "--json", cwd=tmp_path), 2, "nowhere")
    assert not (tmp_path / "runs" / "train").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("generate", "fox", "a fox", "--steps", "3"), "--steps 3 is not offered"),
        (("export", "fox", "--format", "onnx", "-o", "out"), "--format 'onnx' is not known"),
    ],
)
def test_options_are_looked_at_before_the_registry(
    tmp_path: Path, command: tuple[str, ...], words: str
) -> None:
    refused(run(*command, "--json", cwd=tmp_path), 2, words)


@pytest.mark.parametrize(
    ("uri", "words"),
    [("sqlite:///typo/x.db", "there is no registry at sqlite:///"), ("typo", "no MLflow server")],
)
def test_who_reads_a_registry_makes_none(tmp_path: Path, uri: str, words: str) -> None:
    done = run("generate", "fox", "a fox", "--tracking-uri", uri, "--json", cwd=tmp_path)
    refused(done, 2, words)
    assert not list(tmp_path.glob("typo*"))
