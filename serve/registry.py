"""Reading adapters' versions from the MLflow registry. Nothing here writes, or runs at import."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import EchoDistillError, ServiceError
from model.names import ADAPTER_ARTIFACT, BASE_HASH_TAG, CHAMPION, MODEL_PREFIX, SHA256_TAG

_LONGEST_VERSION = 9  # digits; what is longer overflows the registry's column
_MOST_VERSIONS = 200  # that a concept's card tells of
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# MLflow's own defaults keep a request to a dead server busy for many minutes.
_HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class BadVersionError(EchoDistillError):
    """A registered version that cannot be served as it stands."""


@dataclass(frozen=True)
class Pinned:
    """One registered version of a concept: what a request keeps from its start to its answer."""

    concept: str
    version: str
    sha256: str
    base_hash: str


@dataclass(frozen=True)
class Listed:
    """A concept that has a champion."""

    concept: str
    champion: str
    created: int  # seconds since 1970


@dataclass(frozen=True)
class VersionFacts:
    """What the registry says of one version of a concept; `tags` are the version's own."""

    version: str
    created: int  # seconds since 1970
    aliases: tuple[str, ...]
    tags: Mapping[str, str]


class Registry:
    """The registered models `echodistill.<concept>` of one tracking URI."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self._client: Any = None

    def find(self, concept: str, pointer: str) -> Pinned | None:
        """The version that an alias or number points to; None when there is none.

        Raises ServiceError when the registry is out of reach, BadVersionError for a version that
        lacks the tags by which it can be verified.
        """
        if self._empty() or (pointer.isdecimal() and len(pointer) > _LONGEST_VERSION):
            return None
        name = MODEL_PREFIX + concept
        with self._reaching():
            try:
                if pointer.isdecimal():
                    found = self._connection().get_model_version(name, pointer)
                else:
                    found = self._connection().get_model_version_by_alias(name, pointer)
            except Exception as error:
                if getattr(error, "error_code", None) in _ABSENT:
                    return None
                raise
        return _pinned(concept, found)

    def concepts(self) -> list[Listed]:
        """Every concept that has a champion, by id. Raises ServiceError."""
        if self._empty():
            return []
        listed = []
        with self._reaching():
            token = None
            while True:
                page = self._connection().search_registered_models(
                    filter_string=f"name LIKE '{MODEL_PREFIX}%'", max_results=500, page_token=token
                )
                for item in page:
                    champion = item.aliases.get(CHAMPION)
                    if champion is not None:
                        concept = item.name.removeprefix(MODEL_PREFIX)
                        created = int(item.creation_timestamp // 1000)
                        listed.append(Listed(concept, str(champion), created))
                token = page.token
                if not token:
                    return sorted(listed, key=lambda item: item.concept)

    def versions(self, concept: str) -> list[VersionFacts] | None:
        """Every version of a concept, the newest first; None when there is no such concept.

        Raises ServiceError when the registry is out of reach.
        """
        if self._empty():
            return None
        name = MODEL_PREFIX + concept
        with self._reaching():
            try:
                aliases = self._connection().get_registered_model(name).aliases
            except Exception as error:
                if getattr(error, "error_code", None) in _ABSENT:
                    return None
                raise
            found = self._connection().search_model_versions(
                f"name = '{name}'", max_results=_MOST_VERSIONS, order_by=["version_number DESC"]
            )
        return [
            VersionFacts(
                version=str(item.version),
                created=int(item.creation_timestamp // 1000),
                aliases=tuple(sorted(a for a, v in aliases.items() if str(v) == str(item.version))),
                tags=dict(item.tags),
            )
            for item in found
        ]

    def download(self, pinned: Pinned, folder: Path) -> Path:
        """Copies a version's adapter folder below `folder`; returns where it is.

        Raises ServiceError when it cannot be had.
        """
        import mlflow

        name = MODEL_PREFIX + pinned.concept
        with self._reaching():
            source = self._connection().get_model_version_download_uri(name, pinned.version)
            return Path(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"{source.rstrip('/')}/{ADAPTER_ARTIFACT}",
                    dst_path=str(folder),
                    tracking_uri=self.tracking_uri,
                )
            )

    def _empty(self) -> bool:
        # Asking would create the database file, and the endpoint only reads.
        prefix = "sqlite:///"
        if self._client is not None or not self.tracking_uri.startswith(prefix):
            return False
        return not Path(self.tracking_uri.removeprefix(prefix)).exists()

    def _connection(self) -> Any:
        if self._client is None:
            for name, value in _HTTP_LIMITS.items():
                os.environ.setdefault(name, value)
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            from mlflow import MlflowClient

            self._client = MlflowClient(self.tracking_uri, self.tracking_uri)
        return self._client

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except EchoDistillError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise  # the disk's fault, not the registry's: the store tells where
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ServiceError(
                f"the registry at {_without_password(self.tracking_uri)} did not answer "
                f"({_without_password(reason)}): check that it runs and can be reached."
            ) from error


def _pinned(concept: str, found: Any) -> Pinned:
    sha256 = found.tags.get(SHA256_TAG, "")
    base_hash = found.tags.get(BASE_HASH_TAG, "")
    if not _SHA256.fullmatch(sha256) or not base_hash:
        raise BadVersionError(
            f"version {found.version} of '{concept}' has no adapter_sha256 or base_hash tag in "
            "the registry: register it again."
        )
    return Pinned(concept, str(found.version), sha256, base_hash)


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)
