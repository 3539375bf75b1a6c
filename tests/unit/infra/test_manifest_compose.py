"""Compose for one machine: taken by Docker's own program, and by our rules."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.auth import read_keys
from serve.settings import load_settings
from tests.manifests.rendered import INFRA

COMPOSE = INFRA / "compose" / "compose.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(COMPOSE.read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]


def _config(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "docker-compose"
    command = [str(program), "-f", str(path), "config", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_docker_takes_it(tmp_path: Path) -> None:
    answer = _config(COMPOSE)
    assert answer.returncode == 0, answer.stderr
    assert "variable is not set" not in answer.stderr  # a lone $ would be taken for one
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text("utf-8").replace("healthcheck:", "healthchek:", 1))
    assert _config(wrong).returncode != 0


def test_it_has_every_service() -> None:
    wanted = {"objectstore", "postgres", "mlflow", "ray", "endpoint", "prometheus", "grafana"}
    assert set(SERVICES) == wanted


@pytest.mark.parametrize("name", SERVICES)
def test_services_keep_our_rules(name: str) -> None:
    service = SERVICES[name]
    tag = service["image"].partition(":")[2]
    assert tag and tag != "latest"
    assert service["healthcheck"]["test"] and "mem_limit" in service
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    for key, value in service.get("environment", {}).items():
        secret = re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", key)
        assert not secret or str(value).startswith("/run/secrets/"), key
    for other in service.get("depends_on", {}):
        assert "healthcheck" in SERVICES[other]
    own = "build" in service
    assert own == service["image"].startswith("echodistill/")
    if own:
        build = service["build"]
        assert (COMPOSE.parent / build["context"] / build["dockerfile"]).is_file()


def test_every_secret_is_made_by_the_script_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = set(DOCUMENT["secrets"])
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", ())}
    assert named == used
    text = yaml.safe_dump(SERVICES)
    assert set(re.findall(r"/run/secrets/(\w+)", text)) <= named
    script = shutil.copy(COMPOSE.parent / "secrets.sh", tmp_path)
    made = {}
    for _ in range(2):
        subprocess.run([str(script)], check=True, env={"PATH": os.environ["PATH"]})
        made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == named
    assert {f"secrets/{name}" for name in made} == {x["file"] for x in DOCUMENT["secrets"].values()}
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert len({made[name] for name in made}) == len(made)
    assert made["s3_password"] in made["s3_credentials"]
    assert len(made["api_keys"].splitlines()) == 1  # a second run adds nothing
    # What Prometheus sends is a key that the endpoint takes.
    monkeypatch.delenv("ECHODISTILL_SERVE_API_KEYS", raising=False)
    settings = load_settings(host="0.0.0.0", api_keys_file=tmp_path / "secrets" / "api_keys")
    keys = read_keys(settings)
    assert keys.owner(f"Bearer {made['scrape_key']}") is not None


def test_the_object_store_of_ray_fits_into_its_shared_memory() -> None:
    from ray._private.ray_constants import REQUIRE_SHM_SIZE_THRESHOLD

    gigabytes = int(SERVICES["ray"]["shm_size"].removesuffix("gb"))
    assert 0.95 * gigabytes * 2**30 >= REQUIRE_SHM_SIZE_THRESHOLD  # Ray takes no less, or the disk


def test_what_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (COMPOSE.parent / source).is_dir(), source
            else:
                assert source in DOCUMENT["volumes"]
    scraped = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text("utf-8"))
    for job in scraped["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            assert target.partition(":")[0] in SERVICES
