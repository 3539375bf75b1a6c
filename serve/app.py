"""The Ray Serve application: a gateway that speaks HTTP, and painters that draw.

Two deployments, so that HTTP and drawing scale and fail apart. A painter batches pictures of any
concepts; Ray's multiplexing is not used, for it splits batches by model.
"""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr
from ray import serve as ray_serve

from serve.auth import ApiKeys, read_keys
from serve.gateway import make_http
from serve.guard import App
from serve.remote import RemotePainter
from serve.replica import PainterReplica
from serve.settings import ServeSettings

APP_NAME = "echodistill"
PAINTER_NAME = "painter"
GATEWAY_NAME = "gateway"
# A gateway only waits: it takes many more requests than its queue holds, to refuse them itself, in
# the API's own shape.
GATEWAY_REQUESTS = 2000


def build_app(settings: ServeSettings, keys: ApiKeys | None = None) -> ray_serve.Application:
    """The Ray Serve application of the settings.

    Args:
        settings: all settings; keys in them do not travel, only their digests do.
        keys: accepted API keys, read from the settings when not given.

    Raises:
        InputError: when others could reach the endpoint but no key is set.
    """
    accepted = read_keys(settings) if keys is None else keys
    travelling = settings.model_copy(update={"api_keys": SecretStr("")})

    def make_gateway() -> App:
        handle = ray_serve.get_deployment_handle(PAINTER_NAME, app_name=APP_NAME)
        return make_http(RemotePainter(handle), travelling, accepted)

    gpus = settings.replica_gpus
    if gpus is None:
        gpus = 1.0 if settings.device.startswith("cuda") else 0.0
    painter = ray_serve.deployment(
        PainterReplica,
        name=PAINTER_NAME,
        **_replicas(settings),
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": gpus},
        # The gateway bounds what waits; a few more calls leave room for health and lists.
        max_ongoing_requests=settings.max_queue + 16,
        max_queued_requests=settings.max_queue + 16,
        health_check_period_s=settings.health_seconds,
        health_check_timeout_s=max(30.0, 3 * settings.health_seconds),
        # What is wrong with a base stays wrong: one more try is for what passes.
        max_constructor_retry_count=2,
    )
    gateway = ray_serve.deployment(
        ray_serve.ingress(make_gateway)(),
        name=GATEWAY_NAME,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=GATEWAY_REQUESTS,
        max_queued_requests=GATEWAY_REQUESTS,
    )
    return gateway.bind(painter.bind(travelling))


def _replicas(settings: ServeSettings) -> dict[str, Any]:
    """How many painters: a fixed number, or as many as the requests under way ask for."""
    if settings.max_replicas is None or settings.max_replicas == settings.replicas:
        return {"num_replicas": settings.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.scale_at,
        }
    }
