"""The components and the pipeline as Kubeflow gets them."""

from __future__ import annotations

import ast
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.evaluate.component import evaluate
from components.ingest.component import ingest
from components.promote.component import promote
from components.register.component import register
from components.report.component import report
from components.spec import resolve_spec, spec_yaml
from components.steps import LAST_WORDS, run_document, spec_of, step
from components.train.component import train
from model.errors import InputError, ServiceError
from pipeline.cli.main import run as run_command
from pipeline.cli.output import Output
from pipeline.kubeflow import CACHE, CONFIG, SECRETS, Settings, compile_to, read_rayjob
from tests.conftest import REPOSITORY

COMPONENTS = {each.name: each for each in (ingest, train, register, evaluate, promote, report)}
ORDER = ("ingest", "train", "register", "evaluate", "promote")
RAYJOB = REPOSITORY / "infra" / "k8s" / "base" / "rayjob.yaml"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's own document, and the one of its platform."""
    file = tmp_path_factory.mktemp("compiled") / "p.yaml"
    settings = Settings(resolve_spec("sd-turbo"), rayjob=read_rayjob(RAYJOB), storage="s3://b/s")
    compile_to(settings, file)
    spec, platform = yaml.safe_load_all(file.read_text())
    return spec, platform


def tasks_of(spec: dict[str, Any]) -> dict[str, Any]:
    inner = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    return {**inner, "report": spec["root"]["dag"]["tasks"]["report"]}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_typed_documented_and_thin(name: str) -> None:
    folder = REPOSITORY / "components" / name
    tree = ast.parse((folder / "component.py").read_text(encoding="utf-8"))
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {root.split(".")[0] for root in roots} <= {"kfp", *sys.stdlib_module_names}
    spec = COMPONENTS[name].component_spec
    assert spec.description
    facts = yaml.safe_load((folder / "metadata.yaml").read_text())
    assert facts["name"] == name and facts["stability"] and facts["tags"]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for each in {**(spec.inputs or {}), **(spec.outputs or {})}:
        assert f"`{each}`" in readme, f"{folder}/README.md says nothing of {each}"
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert len(function.body) <= 6  # the docstring, imports, one block


def test_the_steps_follow_each_other_and_are_never_cached(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    spec, _ = compiled
    tasks = tasks_of(spec)
    assert set(tasks) == {*ORDER, "report"}
    for before, after in zip(ORDER, ORDER[1:], strict=False):
        assert tasks[after]["dependentTasks"] == [before]
    told = tasks["report"]
    assert told["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert told["dependentTasks"] == ["exit-handler-1"]
    for name, task in tasks.items():
        assert not task["cachingOptions"].get("enableCache"), name
        assert task["retryPolicy"]["maxRetryCount"] == 3 and task["retryPolicy"]["backoffDuration"]
    defaults = spec["root"]["inputDefinitions"]["parameters"]
    assert spec_of(defaults["spec"]["defaultValue"]) == resolve_spec("sd-turbo")
    assert yaml.safe_load(defaults["rayjob"]["defaultValue"])["kind"] == "RayJob"
    assert defaults["storage"]["defaultValue"] == "s3://b/s" and "prefix" in defaults


def test_every_pod_has_bounds_secrets_and_the_rayjobs_image(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    spec, platform = compiled
    head = yaml.safe_load(read_rayjob(RAYJOB))["spec"]["rayClusterSpec"]["headGroupSpec"]
    image = head["template"]["spec"]["containers"][0]["image"]
    executors = spec["deploymentSpec"]["executors"]
    assert len(executors) == 6
    for name, executor in executors.items():
        container = executor["container"]
        assert container["image"] == image
        bounds = container["resources"]
        assert bounds["resourceCpuLimit"] and bounds["resourceMemoryLimit"], name
        assert bounds["resourceCpuRequest"] and bounds["resourceMemoryRequest"]
        command = json.dumps(container)
        assert "pip install" not in command and not any(key in command for key in SECRETS)
    assert "accelerator" in executors["exec-evaluate"]["container"]["resources"]
    assert "accelerator" not in executors["exec-train"]["container"]["resources"]  # it watches
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name in executors:
        pod = pods[name]
        named = {each["secretName"]: each for each in pod["secretAsEnv"]}
        assert set(named) == set(SECRETS) and all(each["optional"] for each in named.values())
        assert int(pod["activeDeadlineSeconds"]) > 0
        assert pod["securityContext"]["runAsNonRoot"] is True
        (cache,) = pod["emptyDirMounts"]
        assert cache["mountPath"] == CACHE
        (config,) = pod["configMapAsEnv"]
        assert {each["envVar"] for each in config["keyToEnv"]} == set(CONFIG)


def test_secrets_and_settings_are_those_of_the_manifests() -> None:
    """A name that no manifest knows would start pods without credentials."""
    text = RAYJOB.read_text(encoding="utf-8")
    config = yaml.safe_load((RAYJOB.parent / "config.yaml").read_text(encoding="utf-8"))
    assert config["metadata"]["name"] == "echodistill"
    assert "echodistill-s3" in text and set(SECRETS) >= {"echodistill-s3"}
    assert config["data"]["ECHODISTILL_CACHE"] == CACHE
    # An overlay adds the first, for an empty value would be taken for one.
    assert set(CONFIG) - {"AWS_ENDPOINT_URL"} <= set(config["data"])


def test_the_command_compiles_and_says_what_is_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "new" / "p.yaml"
    words = ["pipeline", "compile", "-o", str(out)]  # the RayJob is found from any folder
    output = Output()
    assert run_command([*words, "--set", "train.iterations=7"], output) == 0
    assert output.document["file"] == str(out) and output.document["base"] == "pocket"
    assert '"iterations": 7' in str(yaml.safe_load_all(out.read_text()).__next__())
    assert f"wrote {out}" in capfd.readouterr().out
    for extra, sentence in (
        (["--rayjob", str(tmp_path / "none.yaml")], "none.yaml can't be read"),
        (["-o", str(tmp_path / "p.txt")], "end it in .yaml"),
        (["--backend", "other"], "there is no backend 'other'"),
        (["--backend", "local"], "give --image"),
        (["--set", "train.steps=1"], "unknown key"),
    ):
        assert run_command([*words, *extra], Output()) == 2
        assert sentence in capfd.readouterr().err
    assert run_command(["pipeline", "run", "s3://x/y"], Output()) == 2
    assert "--local" in capfd.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(InputError("wrong"), 2), (ServiceError("away"), 3)])
def test_a_step_ends_with_one_sentence(
    error: Exception,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(LAST_WORDS, str(tmp_path / "words"))
    with pytest.raises(SystemExit) as ended, step("ingest") as say:
        say("looks")
        raise error
    assert ended.value.code == code
    words = json.loads((tmp_path / "words").read_text())
    assert words == {"step": "ingest", "error": str(error), "exit_code": code}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, step("train"):
        signal.raise_signal(signal.SIGTERM)  # what holds a lease hears of it
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    looks, failed = capsys.readouterr().out.splitlines()
    assert looks.endswith("Z ingest: looks") and failed.endswith(f"Z ingest: error: {error}")


def test_a_parameter_holds_a_whole_run_spec_or_a_part_of_one() -> None:
    spec = resolve_spec("sd-turbo", None, ["train.iterations=5"])
    assert spec_of(spec_yaml(spec)) == spec
    part = spec_of("preset: sd-turbo\ntrain: {iterations: 5}\n")
    assert part == spec
    with pytest.raises(InputError, match="unknown key 'train.steps'"):
        spec_of("train: {steps: 5}")
    assert run_document("s3://b/s", "1") == "s3://b/s/pipelines/1.json"
