"""Fixtures that every test shares: one Ray cluster, one S3 server, one database template.

Everything here is real and small. Start-up is what costs, so each service starts once a session,
and only when the first test asks for it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch, ray or deepspeed are imported anywhere: they read these when they are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# On a busy machine Ray takes its own HTTP proxy, which is slow to start, for a dead one.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "120")
# What is polled for or waited for in these small runs takes longer than they do.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The tests bring their own cluster.
os.environ.pop("RAY_ADDRESS", None)

import pytest

from tests.services import mlflow_process

# Settings of a user's shell do not count here, but for where base networks are unpacked.
for _name in [each for each in os.environ if each.startswith("ECHODISTILL_")]:
    if _name != "ECHODISTILL_CACHE":
        del os.environ[_name]

REPOSITORY = Path(__file__).resolve().parent.parent
_OWN_RAY = ("test_cli_", "test_demo", "test_chaos")  # files whose tests start a Ray of their own
AWS_NAMES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


@pytest.hookimpl(tryfirst=True)  # `-m ray` reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run a Ray, the session's or one of their own."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "ray_cluster" in fixtures or item.path.name.startswith(_OWN_RAY):
            item.add_marker(pytest.mark.ray)


@dataclass(frozen=True)
class S3Bucket:
    """An empty bucket of the session's S3 server."""

    endpoint: str
    name: str
    client: Any

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    def upload_folder(self, folder: Path, prefix: str = "") -> str:
        """Uploads every file below `folder`; returns the URI of the prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = "/".join(filter(None, (prefix.strip("/"), str(path.relative_to(folder)))))
                self.client.upload_file(str(path), self.name, key)
        return f"{self.uri}/{prefix}".rstrip("/")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """The environment variables with which a process finds the session's S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield dict(
        zip(AWS_NAMES, (f"http://{host}:{port}", "testing", "testing", "us-east-1"), strict=True)
    )
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """A new bucket; during the test this process finds the server through its environment."""
    import boto3

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    client = boto3.session.Session().client("s3", endpoint_url=s3_server["AWS_ENDPOINT_URL"])
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return S3Bucket(s3_server["AWS_ENDPOINT_URL"], name, client)


@pytest.fixture(scope="session")
def ray_cluster(s3_server: dict[str, str]) -> Iterator[None]:
    """One local Ray for the whole session, whose workers know the S3 server.

    Eight logical CPUs, so that a trainer's controller, its workers and a Serve replica fit at once
    whatever the machine has: these tests are about what is computed, not about scheduling.
    """
    import ray

    before = {name: os.environ.get(name) for name in AWS_NAMES}
    # Workers inherit the environment of the raylet, which is this process's when it starts.
    os.environ.update(s3_server)
    ray.init(
        # Never a cluster that somebody else, or an earlier `ray start`, left word of.
        address="local",
        num_cpus=8,
        object_store_memory=100 * 2**20,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=0,
        log_to_driver=False,
        logging_level="warning",
    )
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    yield
    if "ray.serve" in sys.modules:
        from ray import serve as ray_serve

        ray_serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty MLflow database: making one takes seconds, copying it none."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = tmp_path_factory.mktemp("mlflow")
    path = folder / "mlflow.db"
    SqlAlchemyStore(f"sqlite:///{path}", str(folder / "artifacts")).engine.dispose()
    return path


@pytest.fixture(scope="session")
def mlflow_server(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real `mlflow server` that also serves artifacts."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    shutil.copyfile(mlflow_template, folder / "mlflow.db")
    with mlflow_process(folder / "mlflow.db", folder) as url:
        yield url


@pytest.fixture
def tracking_uri(
    mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An empty MLflow tracking server and registry in SQLite, for this test alone."""
    import mlflow

    path = tmp_path / "mlflow.db"
    shutil.copyfile(mlflow_template, path)
    uri = f"sqlite:///{path}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    yield uri
    mlflow.set_registry_uri(before)
    mlflow.set_tracking_uri(before)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Downloads of the tests go to a cache of the session's own."""
    if "ECHODISTILL_CACHE" not in os.environ:
        os.environ["ECHODISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
