"""The images' build files: linted, and their steps tried without a Docker engine."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serve.endpoint import RAY_ENVIRONMENT
from tests.manifests.rendered import INFRA, images

REPOSITORY = INFRA.parent
DOCKER = INFRA / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
IDS = [path.stem for path in FILES]


def _instructions(path: Path) -> list[tuple[str, str]]:
    """Keyword and rest of every instruction, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


def _sources(path: Path) -> list[str]:
    """What a build file takes out of the repository."""
    found = []
    for word, rest in _instructions(path):
        if word == "COPY" and "--from=" not in rest:
            found += rest.split()[:-1]
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_build_files_are_linted(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    answer = subprocess.run([str(hadolint), str(path)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_linter_finds_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /tmp\n")
    hadolint = Path(sys.executable).parent / "hadolint"
    answer = subprocess.run([str(hadolint), str(bad)], capture_output=True, text=True, check=False)
    assert answer.returncode == 1 and "DL3007" in answer.stdout


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_images_are_what_the_manifests_want(path: Path) -> None:
    steps = _instructions(path)
    stages = [rest for word, rest in steps if word == "FROM"]
    assert len(stages) == 2 and stages[0].endswith(" AS build"), "what builds must not ship"
    (base,) = (rest.partition("=")[2] for word, rest in steps if word == "ARG" and "IMAGE" in rest)
    assert re.fullmatch(r"[a-z/]+:[\w.-]+", base) and not base.endswith(":latest")
    assert [rest for word, rest in steps if word == "USER"] == ["10001:10001"]
    assert "ADD" not in {word for word, _ in steps}
    labels = " ".join(rest for word, rest in steps if word == "LABEL")
    for name in ("title", "description", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{name}=" in labels
    runs = " ".join(rest for word, rest in steps if word == "RUN")
    assert "infra/docker/install.sh" in runs and "sbom.py" in runs
    assert f"echodistill/{path.stem}" in images()
    # With it a pod that asked for no GPU would be given all of its node's.
    assert "NVIDIA_VISIBLE_DEVICES" not in path.read_text("utf-8")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    lines = (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    for name in _sources(path):
        assert (REPOSITORY / name).exists(), name
        parts = [name, *map(str, Path(name).parents)]
        assert any(fnmatch.fnmatch(part, line) for part in parts for line in let_in), name
    secret = ["runs", "tests", ".git", ".venv", "infra/compose", "mlflow.db"]
    assert not set(secret) & set(let_in) and "*" in lines


def test_everything_that_is_imported_is_copied() -> None:
    rooms = {"model", "components", "pipeline", "serve"}
    for name in ("train", "serve"):
        assert rooms <= set(_sources(DOCKER / f"{name}.Dockerfile"))


@pytest.mark.system
def test_the_install_step_works_in_a_clean_environment(tmp_path: Path) -> None:
    """The layer of the requirements without what they require: our own package builds from it."""
    context = tmp_path / "app"
    for name in _sources(DOCKER / "serve.Dockerfile"):
        if name not in ("model", "components", "pipeline", "serve"):
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, context / name)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin"
    environment = {**os.environ, "PATH": f"{python}:/usr/bin:/bin", "PIP_OPTIONS": "--no-deps"}
    install = [str(context / "infra/docker/install.sh"), str(context), "serve", "annotated-types"]
    answer = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
    if "Temporary failure in name resolution" in answer.stderr:
        pytest.skip("needs a package index")
    assert answer.returncode == 0, answer.stderr
    sbom = [str(python / "python"), str(context / "infra/docker/sbom.py"), "x", "1"]
    written = json.loads(subprocess.run(sbom, capture_output=True, check=True).stdout)
    assert {"echodistill", "annotated-types"} <= {item["name"] for item in written["components"]}


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["serve"], ["S[serve]"]),
        (["pipeline", "kubeflow", "torch==2.13.0"], ["S[pipeline,kubeflow]", "torch==2.13.0"]),
        (["mlflow>=3", "boto3>=1"], ["mlflow>=3", "boto3>=1"]),
    ],
)
def test_the_install_script_asks_pip_for(
    words: list[str], asked: list[str], tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PIP_OPTIONS": "--dry-run"}
    command = [str(DOCKER / "install.sh"), "S", *words]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = said.stdout.splitlines()
    assert lines[:3] == ["-m", "pip", "install"]
    assert lines[lines.index("--constraint") + 1] == "S/constraints.txt"
    assert lines[lines.index("--dry-run") + 1 :] == asked


def test_what_the_images_install_is_pinned() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text("utf-8")
    for path in FILES:
        runs = " ".join(rest for word, rest in _instructions(path) if word == "RUN")
        asked = runs.partition("install.sh /app")[2].partition("&&")[0]
        for name in re.findall(r"'([a-z0-9-]+)>=", asked):
            assert re.search(rf"^{name}==", pins, re.MULTILINE), name


def test_the_database_is_reached_by_the_driver_that_the_image_has() -> None:
    """Without its name in the URI, SQLAlchemy takes one of its own choice, by its version."""
    from sqlalchemy.engine import make_url

    texts = [INFRA / "k8s/base/mlflow.yaml", INFRA / "compose/compose.yaml"]
    schemes = [re.findall(r"(postgresql[+\w]*)://", path.read_text("utf-8")) for path in texts]
    assert all(schemes)
    drivers = {make_url(f"{each}://h/d").get_dialect().driver for each in sum(schemes, [])}
    assert drivers == {"psycopg2"}
    assert "'psycopg2-binary>=2'" in (DOCKER / "mlflow.Dockerfile").read_text("utf-8")


def test_the_bill_of_materials_is_whole() -> None:
    command = [sys.executable, str(DOCKER / "sbom.py"), "echodistill-train", "0.1.0"]
    made = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.5")
    assert made["metadata"]["component"]["name"] == "echodistill-train"
    found = {item["name"]: item for item in made["components"]}
    assert found["ray"]["purl"] == f"pkg:pypi/ray@{found['ray']['version']}"
    assert {"torch", "mlflow", "deepspeed", "prometheus-client"} <= set(found)
    assert len({item["bom-ref"] for item in made["components"]}) == len(made["components"])


def test_the_endpoint_tells_ray_the_same_in_its_image_as_elsewhere() -> None:
    steps = _instructions(DOCKER / "serve.Dockerfile")
    told = dict(
        pair.split("=", 1) for word, rest in steps if word == "ENV" for pair in rest.split()
    )
    assert told.items() >= RAY_ENVIRONMENT.items()
