"""The RayJobs of a Kubernetes namespace: find, make, remove, wait for a change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.errors import InputError, ServiceError

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
GONE_SECONDS = 300.0  # that a deleted RayJob may take to go
_LOOK_SECONDS = 15.0
_BUSY = (429, 500, 502, 503, 504)
_TRIES = 8  # of one request: a minute and a half


class RayJobs:
    """The RayJobs of one namespace, through the Kubernetes API.

    Args:
        namespace: where; by default the one that this process runs in, else `default`.
        client: a `kubernetes.client.ApiClient`; by default as kubectl would connect, or, in a
            pod, as its service account.
        pause: seconds before a watch that broke is begun again.
    """

    def __init__(self, namespace: str = "", client: Any = None, *, pause: float = 2.0) -> None:
        from kubernetes.client import CustomObjectsApi

        self._api: Any = CustomObjectsApi(client or connect())
        self.namespace = namespace or _own_namespace()
        self._pause = pause
        self._place = (GROUP, VERSION, self.namespace, PLURAL)

    def find(self, name: str) -> dict[str, Any] | None:
        """Return a RayJob, or None when there is none of that name."""
        with self._plain_errors("get"):
            return self._or_none(lambda: self._api.get_namespaced_custom_object(*self._place, name))

    def create(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Make a RayJob; when there is one of its name by now, that one is returned."""
        from kubernetes.client import ApiException

        name = manifest["metadata"]["name"]
        with self._plain_errors("create"):
            try:
                made: dict[str, Any] = self._api.create_namespaced_custom_object(
                    *self._place, manifest
                )
                return made
            except ApiException as error:
                # Another process was faster, or the answer to a first try got lost.
                if error.status != 409:
                    raise
        found = self.find(name)
        if found is None:
            raise ServiceError(f"the RayJob {name} was deleted while it was made: run again")
        return found

    def delete(self, name: str) -> None:
        """Remove a RayJob and its cluster, and wait until it is gone."""
        with self._plain_errors("delete"):
            self._or_none(
                lambda: self._api.delete_namespaced_custom_object(
                    *self._place, name, propagation_policy="Foreground"
                )
            )
        deadline = time.monotonic() + GONE_SECONDS
        while (job := self.find(name)) is not None:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"the RayJob {name} was deleted and is still there after {GONE_SECONDS:.0f} s: "
                    f"kubectl describe rayjob {name} says what holds it"
                )
            self.wait(job, _LOOK_SECONDS)

    def wait(self, job: Mapping[str, Any], seconds: float) -> None:
        """Return when a RayJob has changed since it was read, at the latest after so many seconds.

        It is only woken by the watch: whatever the watch says, and however it ends, the job is read
        anew.
        """
        from kubernetes.client import ApiException
        from kubernetes.watch import Watch
        from urllib3.exceptions import HTTPError

        began, meta = time.monotonic(), job["metadata"]
        limit = max(1, round(seconds))
        try:
            for _ in Watch().stream(
                self._api.list_namespaced_custom_object,
                *self._place,
                field_selector=f"metadata.name={meta['name']}",
                resource_version=meta["resourceVersion"],
                timeout_seconds=limit,
                _request_timeout=(10, limit + 10),
            ):
                return
        except (ApiException, HTTPError, ValueError):  # ValueError: half a line of JSON
            pass
        if time.monotonic() - began < limit:  # it ended too soon
            time.sleep(self._pause)

    @staticmethod
    def _or_none(ask: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        from kubernetes.client import ApiException

        try:
            return ask()
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    @contextmanager
    def _plain_errors(self, verb: str) -> Iterator[None]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            reason = _reason(error)
            if error.status in (401, 403):
                raise InputError(
                    f"Kubernetes does not let this process {verb} RayJobs in the namespace "
                    f"{self.namespace} ({reason}): give its service account the right"
                ) from error
            if error.status == 404:
                raise InputError(
                    f"the cluster knows no RayJobs ({reason}): install the KubeRay operator, and "
                    f"check that there is a namespace {self.namespace}"
                ) from error
            if error.status in (400, 422):
                raise InputError(f"Kubernetes refused the RayJob: {reason}") from error
            raise ServiceError(f"Kubernetes answered {error.status} ({reason})") from error
        except HTTPError as error:
            raise ServiceError(
                f"the Kubernetes API can't be reached ({type(error).__name__}): try later"
            ) from error


def connect(host: str = "", *, pause: float = 0.5) -> Any:
    """Return a client for the Kubernetes API that asks again while the API is busy.

    Args:
        host: URL of an API that wants no credentials (`kubectl proxy`); by default the pod's
            service account, else what kubectl uses.
        pause: seconds before the second try; it doubles, to half a minute.

    Raises:
        InputError: when neither a pod nor kubectl's configuration says where the API is.
    """
    from kubernetes import client, config
    from urllib3 import Retry

    settings = client.Configuration(host=host or None)
    if not host:
        try:
            config.load_incluster_config(settings)
        except config.ConfigException:
            try:
                config.load_kube_config(client_configuration=settings)
            except (config.ConfigException, OSError) as error:
                raise InputError(
                    f"no Kubernetes cluster is configured ({error}): set KUBECONFIG"
                ) from error
    settings.retries = Retry(
        _TRIES,
        backoff_factor=pause,
        backoff_max=30,
        status_forcelist=_BUSY,
        allowed_methods=None,  # a second create meets the first by its name
        raise_on_status=False,
    )
    return client.ApiClient(settings)


def _own_namespace() -> str:
    """Return the namespace of this pod, or `default`."""
    place = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    return place.read_text().strip() if place.is_file() else "default"


def _reason(error: Any) -> str:
    """Return the message of a Kubernetes error, which is JSON with a `message`."""
    try:
        return str(json.loads(error.body)["message"])[:300]
    except (TypeError, ValueError, KeyError):
        return str(error.reason or "no reason given")[:300]
