"""Starting and stopping the endpoint on this machine or on a running Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from model.errors import InputError, ServiceError
from serve.auth import ApiKeys, read_keys
from serve.settings import ServeSettings

READY_SECONDS = 60.0
OBJECT_STORE_BYTES = 200 * 2**20
# What Ray's processes are told. An answer is half a megabyte: it goes with the reply, not by way of
# the object store, and gateway and painter, which only wait, run in one thread each, not three. The
# gateway is one process, and its share of every answer bounds the rate (tests/bench/SERVE.md).
RAY_ENVIRONMENT = {
    "RAY_max_direct_call_object_size": str(4 * 2**20),
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
_OUR_ERROR = re.compile(r"^(?:model\.errors\.)?(InputError|ServiceError): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint. `stop()` ends it, and Ray too when `start` began it."""

    url: str
    owns_ray: bool

    def stop(self) -> None:
        """Ends what `start` began: no process of it is left."""
        import ray
        from ray import serve as ray_serve

        # Ray tells of the controller that it ends on standard output, where a program may read.
        with contextlib.redirect_stdout(sys.stderr):
            with contextlib.suppress(Exception):  # Ray may be gone already
                ray_serve.shutdown()
            if self.owns_ray:
                ray.shutdown()


def start(settings: ServeSettings) -> Endpoint:
    """Starts the endpoint and waits until it has drawn a picture.

    A Ray that this process is connected to is used; else the settings' cluster, or one of its own.

    Raises:
        InputError: for a port in use, missing keys, or a base that cannot be loaded.
        ServiceError: when Ray or the endpoint does not start.
    """
    keys = read_keys(settings)
    port = free_port(settings.host, settings.port)
    owns_ray = _start_ray(settings.ray_address)
    _refuse_second()
    endpoint = Endpoint(f"http://{_reachable(settings.host)}:{port}", owns_ray)
    try:
        _deploy(settings, keys, port)
        _wait_ready(endpoint.url)
    except BaseException:
        endpoint.stop()
        raise
    return endpoint


def prepare_environment() -> None:
    """Has a Ray that this process starts from now on serve answers fast; what is set stays so."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def free_port(host: str, port: int) -> int:
    """The port if it is free, or any free one for 0. Raises InputError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do, so that a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise InputError(
                f"port {port} on {host} cannot be listened on ({error.strerror or error}): choose "
                "another, or 0 for any free one."
            ) from None
        return int(probe.getsockname()[1])


def _start_ray(address: str) -> bool:
    """Connects to Ray, or starts one; False when this process was connected already."""
    if address == "local":
        _choose_authentication()
        prepare_environment()
    import ray

    if ray.is_initialized():
        return False
    try:
        if address == "local":
            ray.init(
                address="local",
                object_store_memory=OBJECT_STORE_BYTES,
                # Without its agent Ray logs a warning a second; it listens on this machine only.
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=0,
                # Standard output belongs to this process alone: a program may read it.
                log_to_driver=False,
                logging_level="warning",
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
    except Exception as error:  # a node that is too slow to start raises no narrower kind
        ray.shutdown()
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ServiceError(f"Ray ({address}) cannot be reached or started: {reason}.") from error
    return True


def _refuse_second() -> None:
    """Raises ServiceError when Serve runs here already: its port and host could not be changed."""
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise ServiceError(
        "Ray Serve already runs on this Ray cluster: stop it first, or deploy the endpoint there "
        "with 'serve.app:build_app'."
    )


def _choose_authentication() -> None:
    """Gives a local Ray a token of its own, unless the environment says something else.

    Ray would otherwise write a token to the home folder, and turn authentication on for every
    later Ray tool of this user.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray reads the mode when it is imported; once that is past, its start turns the mode on.
    if "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"


def _deploy(settings: ServeSettings, keys: ApiKeys, port: int) -> None:
    from ray import serve as ray_serve

    from serve.app import APP_NAME, build_app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # The gateway writes the access log: Serve's own would be a second one.
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options={"host": settings.host, "port": port},
        logging_config=quiet,
    )
    try:
        ray_serve.run(
            build_app(settings, keys), name=APP_NAME, route_prefix="/", logging_config=quiet
        )
    except RuntimeError as error:
        raise _why_not_started(APP_NAME, error) from error


def _why_not_started(app_name: str, error: Exception) -> InputError | ServiceError:
    """The sentence with which a replica failed to start, out of Serve's report of it."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(app_name)
    reports = [str(error)]
    if application is not None:
        reports += [item.message for item in application.deployments.values()]
    for report in reports:
        found = _OUR_ERROR.search(report)
        if found is not None:
            kind = InputError if found.group(1) == "InputError" else ServiceError
            return kind(found.group(2))
    reason = (reports[-1].strip().splitlines() or ["no reason given"])[-1][:300]
    return ServiceError(f"the endpoint did not start: {reason}")


def _reachable(host: str) -> str:
    """A name under which this machine reaches what listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _wait_ready(url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=READY_SECONDS):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ServiceError(f"the endpoint at {url} did not become ready in {READY_SECONDS:.0f} s.")
