"""The services that a command starts for itself and stops again: a local Ray, an S3 server."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import ServiceError

OBJECT_STORE_BYTES = 200 * 2**20


def quiet_libraries() -> None:
    """Settings that libraries read from the environment when they are imported first.

    Values that are set already stay: a person's settings win.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would build an environment of its own when the command was started by `uv run`.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def local_ray(cpus: int, *, echo: bool = False) -> Iterator[None]:
    """A Ray for the time of the block: the cluster that RAY_ADDRESS names, else one of our own.

    `cpus` is what the work asks for at once; with `echo` the workers' words reach this process's
    stdout and stderr. A local Ray counts at least so many, even when the
    machine has fewer: two workers on one core are slow, and right. Raises ServiceError when the
    cluster is out of reach.
    """
    address = os.environ.get("RAY_ADDRESS")
    # A local Ray turns token authentication on and leaves a token in the home folder, after which
    # Ray's other tools fail: say what we want instead, before Ray is imported and reads it.
    if not address and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        yield
        return
    folder = None
    try:
        if address:
            ray.init(address=address, log_to_driver=echo, logging_level="error")
        else:
            # Sockets live here, and their paths may have 107 characters.
            folder = Path(tempfile.mkdtemp(prefix="echodistill-ray-", dir=_short_temporary()))
            ray.init(
                num_cpus=max(cpus, os.cpu_count() or 1),
                object_store_memory=OBJECT_STORE_BYTES,
                # Without its agent Ray writes a warning a second; it listens on this machine only.
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=0,
                log_to_driver=echo,
                logging_level="error",
                _temp_dir=str(folder),
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        stop_ray()
        where = f"at {address} (RAY_ADDRESS)" if address else "on this machine"
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ServiceError(f"Ray {where} can't be reached or started: {reason}") from error
    try:
        yield
    finally:
        stop_ray()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def stop_ray() -> None:
    """Ends the Ray of this process, and every process of it; does nothing when there is none."""
    import ray

    if ray.is_initialized():
        # A second caller may be at it: whoever is first wins.
        with contextlib.suppress(Exception):
            ray.shutdown()


def _short_temporary() -> str | None:
    return "/tmp" if len(tempfile.gettempdir()) > 30 and os.access("/tmp", os.W_OK) else None


@contextmanager
def embedded_s3(bucket: str) -> Iterator[str]:
    """An S3 server of this process's own, in memory, with one bucket; yields its endpoint.

    The environment leads boto3 to it for the time of the block, in this process and in those that
    are started inside.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    hidden = ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION")
    before = {name: os.environ.get(name) for name in (*settings, *hidden)}
    for name in hidden:
        os.environ.pop(name, None)
    os.environ.update(settings)
    try:
        boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.stop()
