"""The services that a command starts for itself and stops again: a local Ray, an S3 server."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.errors import ServiceError
from pipeline.scratch import scratch_folder

OBJECT_STORE_BYTES = 200 * 2**20
_running = threading.Event()  # between the end of Ray's start and the beginning of its stop


def quiet_libraries() -> None:
    """Settings that libraries read from the environment when they are imported first.

    Values that are set already stay: a person's settings win.
    """
    defaults = {
        # Threads that wait actively take the cores from those that they wait for as soon as
        # anything else runs: the same work then takes ten times as long.
        "OMP_WAIT_POLICY": "PASSIVE",
        # But they wait actively for some microseconds first, which saves a third of the time where
        # nothing else runs.
        "GOMP_SPINCOUNT": "10000",
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
    _prepare_environment(address)
    import ray

    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"address": address}
        if address and ":" in address and "://" not in address:
            # Ray Train's cleaner of placement groups looks its cluster up by this, and finds
            # another one where there are several on a machine.
            options["runtime_env"] = {"env_vars": {"RAY_ADDRESS": address}}
        if not address:
            options = _local_options(cpus, stack.enter_context(scratch_folder()))
        stack.callback(_stop_ray)
        try:
            ray.init(log_to_driver=echo, logging_level="error", **options)
        except Exception as error:  # a node that is too slow to start raises no narrower kind
            where = f"at {address} (RAY_ADDRESS)" if address else "on this machine"
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ServiceError(f"Ray {where} can't be reached or started: {reason}") from error
        _running.set()
        yield


def abort_training() -> None:
    """End the training runs that this process started, from any thread; the waiting call raises.

    `ray.shutdown` from another thread than the one that waits can take the whole process down, so
    what is waited for is ended instead. Ray Train gives no handle of its controller; it is found
    among the actors of this process's job.
    """
    if not _running.is_set():
        return
    with contextlib.suppress(Exception):  # Ray may be going down already
        import ray
        from ray._private import state
        from ray._private.worker import global_worker
        from ray._raylet import ActorID

        job = ray.get_runtime_context().get_job_id()
        for actor_id, facts in state.actors().items():
            if facts["ActorClassName"] == "TrainController" and facts["JobID"] == job:
                global_worker.core_worker.kill_actor(ActorID.from_hex(actor_id), True)


def _prepare_environment(address: str | None) -> None:
    """Set what Ray reads when it is imported."""
    # A call after the end would start another local Ray, which nobody would stop.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    # A local Ray turns token authentication on and leaves a token in the home folder, after which
    # Ray's other tools fail: say what we want instead.
    if not address and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _local_options(cpus: int, folder: Path) -> dict[str, Any]:
    return {
        # Not None: Ray would join whatever cluster an earlier `ray start` left word of.
        "address": "local",
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "object_store_memory": OBJECT_STORE_BYTES,
        # Without its agent Ray writes a warning a second; it listens on this machine only.
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": 0,
        "_temp_dir": str(folder),
    }


def _stop_ray() -> None:
    """Ends the Ray of this process and every process of it, a start that failed half-way too."""
    import ray

    _running.clear()
    with contextlib.suppress(Exception):
        ray.shutdown()


@contextmanager
def embedded_s3(bucket: str) -> Iterator[str]:
    """An S3 server of this process's own, in memory, with one bucket; yields its endpoint.

    The environment leads boto3 to it for the time of the block, in this process and in those that
    are started inside.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
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
