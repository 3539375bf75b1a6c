"""What the manifests say of our code and its libraries is so: settings, modules, options, paths."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from serve.app import APP_NAME, GATEWAY_NAME, PAINTER_NAME
from serve.settings import ServeSettings
from tests.manifests.rendered import BATCH_URI, INFRA, batch, containers, sets

REPOSITORY = INFRA.parent
SETS = sets()


def _serve_config(overlay: str) -> dict[str, Any]:
    (service,) = (one for one in SETS[overlay] if one["kind"] == "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


@pytest.mark.parametrize("overlay", sorted(SETS))
def test_the_serve_config_is_one_that_ray_takes(overlay: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(_serve_config(overlay))
    (application,) = config.applications
    assert application.name == APP_NAME
    assert {one.name for one in application.deployments} <= {GATEWAY_NAME, PAINTER_NAME}
    # Ray drops what it does not know, so a typing mistake would pass unseen.
    assert not _unknown(_serve_config(overlay))


def _unknown(config: dict[str, Any]) -> set[str]:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        LoggingConfig,
        RayActorOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
    )

    (application,) = config["applications"]
    found = set(config) - set(ServeDeploySchema.model_fields)
    found |= set(config["http_options"]) - set(HTTPOptionsSchema.model_fields)
    found |= set(config["logging_config"]) - set(LoggingConfig.model_fields)
    found |= set(application) - set(ServeApplicationSchema.model_fields)
    for deployment in application["deployments"]:
        found |= set(deployment) - set(DeploymentSchema.model_fields)
        options, scaling = (
            deployment.get(x, {}) for x in ("ray_actor_options", "autoscaling_config")
        )
        found |= set(options) - set(RayActorOptionsSchema.model_fields)
        found |= set(scaling) - set(AutoscalingConfig.model_fields)
    return found


def test_a_mistyped_key_of_the_serve_config_is_seen() -> None:
    config = _serve_config("prod")
    config["applications"][0]["deployments"][0]["autoscaling_config"] = {"max_replica": 2}
    config["http_option"] = {}
    assert _unknown(config) == {"max_replica", "http_option"}


@pytest.mark.parametrize("overlay", sorted(SETS))
def test_the_serve_config_builds_the_application(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.utils import import_attr

    from model.errors import InputError

    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"ECHODISTILL_SERVE_{name.upper()}", raising=False)
    (application,) = _serve_config(overlay)["applications"]
    builder = import_attr(application["import_path"])
    keys = tmp_path / "api-keys"
    keys.write_text(f"somebody sha256:{'0' * 64}\n")
    built = call_user_app_builder_with_args_if_necessary(
        builder, {**application["args"], "api_keys_file": str(keys)}
    )
    assert built is not None
    keys.write_text("")  # others can reach it: it must not start without keys
    with pytest.raises(InputError, match="needs API keys"):
        builder({**application["args"], "api_keys_file": str(keys)})


def test_the_gateway_gives_up_before_the_proxy_does() -> None:
    for overlay in SETS:
        config = _serve_config(overlay)
        args = config["applications"][0]["args"]
        limit = args.get("request_seconds", ServeSettings.model_fields["request_seconds"].default)
        assert limit < config["http_options"]["request_timeout_s"]


@pytest.mark.parametrize("overlay", sorted(SETS))
def test_painters_find_room_on_the_workers(overlay: str) -> None:
    (service,) = (one for one in SETS[overlay] if one["kind"] == "RayService")
    args = _serve_config(overlay)["applications"][0]["args"]
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    settings = ServeSettings(**{**args, "api_keys_file": None})
    assert group["minReplicas"] == settings.replicas
    assert group["maxReplicas"] == (settings.max_replicas or settings.replicas)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) >= settings.replica_cpus + 0.5  # and the gateway
    assert ("nvidia.com/gpu" in limits) == settings.device.startswith("cuda")
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > settings.drain_seconds


def test_the_batch_starts_a_module_that_is_there() -> None:
    (module,) = re.findall(r"python -m (\S+)", batch()["spec"]["entrypoint"])
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (1, 0), (3, 1), (130, 1), ("missing", 1)])
def test_failed_concepts_are_no_failed_job(ends: int | str, code: int, tmp_path: Path) -> None:
    python = tmp_path / "python"
    found = f"[ $1 != -c ] || exit {int(ends == 'missing')}"
    python.write_text(f'#!/bin/sh\n{found}\necho "$@" > {tmp_path}/said\nexit {ends}\n')
    python.chmod(0o755)
    # KubeRay writes the line into a shell's, and Ray's client quotes each word of it again.
    show = ["bash", "-c", f"printf '%s\\0' {batch()['spec']['entrypoint']}"]
    words = subprocess.run(show, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["sh", "-c", shlex.join(words)], env=environment, check=False)
    assert bool(ended.returncode) == bool(code)
    if ends == "missing":
        assert not (tmp_path / "said").exists()
    else:
        assert (tmp_path / "said").read_text() == f"-m pipeline.drive {BATCH_URI}\n"


def test_the_batch_has_the_environment_that_submit_gives() -> None:
    from pipeline.jobs import _ENVIRONMENT

    assert yaml.safe_load(batch()["spec"]["runtimeEnvYAML"])["env_vars"] == _ENVIRONMENT


def test_ray_is_of_the_version_that_is_installed() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text("utf-8")
    (version,) = re.findall(r"^ray==(.+)$", pins, re.MULTILINE)
    found = re.findall(r"rayVersion: (.+?)(?: #.*)?\n", _texts())
    assert len(found) == 2 and set(found) == {version}


def test_variables_of_ours_are_read_somewhere() -> None:
    code = "\n".join(
        path.read_text("utf-8")
        for room in ("model", "components", "pipeline", "serve")
        for path in (REPOSITORY / room).rglob("*.py")
    )
    used = set(re.findall(r"\bECHODISTILL_[A-Z_]+\b", _texts()))
    assert used
    for name in used:
        setting = name.removeprefix("ECHODISTILL_SERVE_").lower()
        assert name in code or setting in ServeSettings.model_fields, name


def test_variables_of_ray_are_read_by_it() -> None:
    import ray

    (config,) = (
        one for one in SETS["prod"] if one["kind"] == "ConfigMap" and "HOME" in one["data"]
    )
    used = {name for name in config["data"] if name.startswith("RAY_")}
    # A pod's disk is reported as empty without it, and NodeDiskFills would sleep.
    assert "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE" in used
    package = Path(ray.__file__).parent
    places = ("dashboard/modules/reporter/reporter_agent.py", "_common/usage/usage_constants.py")
    sources = "\n".join((package / name).read_text("utf-8") for name in places)
    assert all(f'"{name}"' in sources for name in used), used


def test_health_paths_are_those_of_ray_and_mlflow() -> None:
    import ray
    from mlflow.server.security_utils import HEALTH_ENDPOINTS

    package = Path(ray.__file__).parent
    sources = "\n".join(
        (package / name).read_text("utf-8")
        for name in (
            "dashboard/modules/reporter/healthz_agent.py",
            "dashboard/modules/reporter/reporter_head.py",
            "serve/_private/proxy_request_response.py",
        )
    )
    ports: dict[str, set[Any]] = {}
    for manifests in SETS.values():
        for manifest in manifests:
            for where, container in containers(manifest):
                for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                    get = container.get(name, {}).get("httpGet")
                    if get is None or "minio" in container["image"]:
                        continue
                    if "mlflow" in where:
                        assert get["path"] in HEALTH_ENDPOINTS
                    else:
                        assert f'"{get["path"]}"' in sources, get
                        ports.setdefault(get["path"], set()).add(get["port"])
    # The agent of a node listens where Ray's own default says.
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    assert ports["/api/local_raylet_healthz"] == {DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}


def test_options_of_the_commands_exist() -> None:
    from mlflow.cli import cli as mlflow
    from ray.scripts.scripts import cli as ray

    def options(command: Any) -> set[str]:
        return {name for item in command.params for name in (*item.opts, *item.secondary_opts)}

    known = {
        "mlflow server": options(mlflow.commands["server"]),
        "ray drain-node": options(ray.commands["drain-node"]),
    }
    seen = set()
    for manifest in SETS["prod"]:
        for _, container in containers(manifest):
            words = container.get("command", []) + container.get("args", [])
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
            text = " ".join(words + hook.get("command", []))
            for command, names in known.items():
                if command in text:
                    seen.add(command)
                    rest = text.partition(command)[2].partition(";")[0]
                    used = set(re.findall(r"(?<!\S)--[a-z-]+", rest))
                    assert used and used <= names, used - names
    assert seen == set(known)
    assert "upgrade" in mlflow.commands["db"].commands


def test_what_the_guide_tells_to_type_is_there() -> None:
    import typer

    from pipeline.cli.main import app

    texts = [
        path.read_text("utf-8") for path in (INFRA / "README.md", *INFRA.glob("*/alerts.yaml"))
    ]
    everything = cast(Any, typer.main.get_command(app))
    seen = set()
    for line in re.findall(r"\bechodistill ([a-z][^`|)\n;]*)", "\n".join(texts)):
        words, command = line.split(), everything
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        if command is everything:  # the namespace of that name
            continue
        seen.add(command.name)
        known = {name for item in command.params for name in (*item.opts, *item.secondary_opts)}
        asked = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert asked <= known, line
    assert {"submit", "status", "compile", "promote", "rollback"} <= seen
    for name in set(re.findall(r"\binfra/[\w/.-]*\w", texts[0])):
        made = "compose/secrets/" in name  # by secrets.sh
        assert made or (REPOSITORY / name).exists(), name


def _texts() -> str:
    files = [*INFRA.glob("k8s/**/*.yaml"), *INFRA.glob("compose/*.yaml")]
    return "\n".join(path.read_text("utf-8") for path in files)
