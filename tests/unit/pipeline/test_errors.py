"""What an error becomes: a sentence and an exit code."""

import errno
import os
import sys
import tomllib
from pathlib import Path

import pytest

from model.errors import EchoDistillError, InputError, ServiceError
from pipeline.cli.main import EXTRA_OF, app, caused_by, describe, run
from pipeline.cli.output import Output
from tests.tiny import write_concepts


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("the photo x.png is cut off: upload it again"), 2, "upload it again"),
        (ServiceError("S3 is away: check the network"), 3, "check the network"),
        (EchoDistillError("the training diverged"), 4, "diverged"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 3, "runs/a"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "runs/b"), 2, "runs/b cannot be"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/c"), 2, "permissions"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "runs/d"), 2, "runs/d cannot be"),
        (FileExistsError(errno.EEXIST, "File exists", "runs/e"), 2, "runs/e cannot be"),
        (ZeroDivisionError("division by zero"), 4, "--debug"),
    ],
)
def test_every_error_has_its_sentence_and_code(error: Exception, code: int, words: str) -> None:
    message, found = describe(error)
    assert found == code
    assert words in message and "\n" not in message


def test_the_cause_that_says_most_is_told() -> None:
    try:
        try:
            raise ServiceError("the disk is full")
        except ServiceError as inner:
            raise RuntimeError("worker 0 failed") from inner
    except RuntimeError as outer:
        assert str(caused_by(outer)) == "the disk is full"
    bug = RuntimeError("a bug")
    assert caused_by(bug) is bug


def test_every_command_but_check_has_its_extra() -> None:
    names = {each.name for each in [*app.registered_commands, *app.registered_groups]}
    assert set(EXTRA_OF) == names - {"check"}
    extras = set(
        tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    assert {extra for each in EXTRA_OF.values() for extra in each.split(",")} <= extras


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["generate", "fox", "a fox"], "mlflow", "serve"),
        (["serve", "--port", "0"], "fastapi", "serve"),
        (["demo"], "moto", "pipeline"),
        (["compare", "--quick"], "ray", "train"),
    ],
)
def test_a_missing_package_names_the_extra_that_brings_it(
    arguments: list[str],
    missing: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    registry = tmp_path / "runs" / "train" / "mlflow.db"
    registry.parent.mkdir(parents=True)
    registry.touch()
    for name in [name for name in sys.modules if name.split(".")[0] in {missing, "serve"}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert run(arguments, Output()) == 2
    told = capfd.readouterr().err
    assert f"{arguments[0]} needs {missing}" in told
    assert f"-e '.[{extra}]'" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "photos", "--plan", "--wait"], "leave out --wait and --env"),
        (["submit", "photos", "--env", "=3"], "--env needs NAME=value"),
        (["demo", "--prompt", " "], "--prompt is empty"),
        (["status", "x", "--storage", "s3://"], "names no bucket"),
        (["compare", "--methods", ""], "there is no method ''"),
        (["bench", "train", "--out", "."], "cannot be written"),
        (["bench", "train", "--profile", "."], "cannot be written"),
        (["bench", "serve", "--out", "a-file/x.json"], "a-file cannot be written"),
        (["generate", "fox", "a fox", "--base", "nope"], "one that ships (pocket) or a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_starts(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    assert run(arguments, Output()) == 2
    assert words in " ".join(capfd.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_command_whose_reader_is_gone_ends_as_other_tools_do(
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_concepts(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    saved = os.dup(1)
    os.dup2(writer, 1)
    # rich leads the descriptor of stdout elsewhere.
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    try:
        assert run(["check", str(tmp_path)], Output(as_json=as_json)) == 141
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert capfd.readouterr().err == ""


def test_another_pipe_that_breaks_has_its_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(prefix: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("components.ingest.concept_folder.check_prefix", broken)
    for name in ("stdout", "stderr"):  # typer puts others in their place
        monkeypatch.setattr(sys, name, getattr(sys, name))
    assert run(["check", "photos"], Output()) == 4
    assert "error: an error of ours: BrokenPipeError" in capfd.readouterr().err
