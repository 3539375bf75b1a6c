"""`echodistill serve`: the endpoint, until it is told to stop."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.interruptible import Interruptible, TerminatedError
from pipeline.cli.options import Debug, Json, TrackingUri
from pipeline.cli.output import Output

if TYPE_CHECKING:
    from serve.settings import ServeSettings

LOG = Path("runs/logs/serve.txt")
ACCESS_LOG = Path("runs/logs/access.jsonl")
DRAIN_SECONDS = 20.0  # for requests that are being answered


def serve(
    context: typer.Context,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; others than this machine need keys.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 for any free one.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="pocket, or a folder that holds teacher/ and student/."),
    ] = None,
    tracking_uri: TrackingUri = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve every registered champion over the OpenAI Images API.

    Further settings come from the environment (ECHODISTILL_SERVE_<NAME>). Ctrl-C stops it (exit
    code 130), and so does SIGTERM (exit code 0, for that is how a service ends).
    """
    output: Output = context.obj
    settings = _settings(host, port, base, tracking_uri)
    from pipeline.services import local_ray
    from serve.auth import read_keys
    from serve.endpoint import free_port, start

    # What can be told at once is told before Ray starts.
    read_keys(settings)
    free_port(settings.host, settings.port)
    enough = threading.Event()
    job = Interruptible(output)
    # Nothing is lost when the start of a Ray of our own is cut short.
    job.patience = DRAIN_SECONDS if os.environ.get("RAY_ADDRESS") else 0.0

    def work() -> None:
        # Said in here, where a signal is listened to.
        output.say("starting Ray and the endpoint (half a minute; to compile takes minutes)")
        most = max(settings.replicas, settings.max_replicas or 0)
        with local_ray(cpus=most + 1, echo=output.debug):
            endpoint = start(settings)
            job.patience = DRAIN_SECONDS
            try:
                if not enough.is_set():
                    _announce(output, endpoint.url, settings)
                enough.wait()
            finally:
                endpoint.stop()

    try:
        with output.noise_to(LOG):
            job.run(work, enough.set)
    except TerminatedError:
        output.say("stopped")
        raise typer.Exit(0) from None


def _settings(
    host: str | None, port: int | None, base: str | None, tracking_uri: str | None
) -> ServeSettings:
    from pipeline import tracking
    from serve.settings import POCKET, load_settings

    given: dict[str, Any] = {"host": host, "port": port}
    if tracking_uri or "ECHODISTILL_SERVE_TRACKING_URI" not in os.environ:
        # Without a word about it there may be none yet: then the base is served.
        find = tracking.registry_to_read if tracking_uri else tracking.tracking_uri
        given["tracking_uri"] = find(tracking_uri)
    if base is not None and base != POCKET:
        from pipeline.base import own_base

        own = own_base(base)
        given |= {"base": own["base"], "student": own["student"]}
    if "ECHODISTILL_SERVE_ACCESS_LOG" not in os.environ:
        ACCESS_LOG.parent.mkdir(parents=True, exist_ok=True)
        given["access_log"] = ACCESS_LOG
    return load_settings(**{name: value for name, value in given.items() if value is not None})


def _announce(output: Output, url: str, settings: ServeSettings) -> None:
    document = {
        "url": url,
        "base": settings.base,
        "tracking_uri": settings.tracking_uri,
        "access_log": str(settings.access_log),
        "pid": os.getpid(),
    }

    def human(console: Any) -> None:
        for line in (
            f"serving {url} (base {settings.base}); Ctrl-C stops it",
            f"  models   curl {url}/v1/models",
            f"  health   curl {url}/healthz",
            f"  requests {settings.access_log}",
            f"  registry {settings.tracking_uri}",
        ):
            console.print(line, markup=False, soft_wrap=True)

    output.finish(document, human)
