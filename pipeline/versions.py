"""Versions as a person names them (`<id>`, `<id>@<version or alias>`), and what their runs know."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from typing import Any

from components.register.connection import code_of, connect, hide_password, reaching
from components.register.registry import RegisteredVersion, get_version, model_name
from components.spec import RunSpec, resolve_spec, with_settings
from model.errors import InputError
from model.names import CHAMPION, CONCEPT_ID

SPEC_ARTIFACT = "spec.yaml"  # of a concept's run: the resolved run spec


def concept_id_of(name: str) -> str:
    """Return a concept's id as it was given.

    Raises:
        InputError: when it can't be one.
    """
    if not CONCEPT_ID.fullmatch(name):
        likely = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")
        advice = f", such as {likely}" if likely else ""
        raise InputError(
            f"{name!r} is no concept's id, which has a-z, 0-9, _ and - only: give the name "
            f"of its folder{advice}"
        )
    return name


def find_version(name: str, tracking_uri: str, default: str = CHAMPION) -> RegisteredVersion:
    """Return the version that a person names.

    Args:
        name: `<id>`, which means its version `default`, or `<id>@<version or alias>`.
        tracking_uri: of the registry.
        default: an alias.

    Raises:
        InputError: when there is no such concept or version; it says which there are.
        ServiceError: when the registry is out of reach.
    """
    before, _, pointer = name.partition("@")
    concept_id = concept_id_of(before)
    found = get_version(concept_id, pointer or default, tracking_uri=tracking_uri)
    if found is None:
        raise InputError(_what_there_is(concept_id, pointer, default, tracking_uri))
    return found


def _what_there_is(concept_id: str, pointer: str, default: str, tracking_uri: str) -> str:
    """Say which versions a concept has instead of the one that was asked for."""
    client = connect(tracking_uri)
    with reaching(tracking_uri):
        versions = client.search_model_versions(f"name = '{model_name(concept_id)}'")
        aliases = client.get_registered_model(model_name(concept_id)).aliases if versions else {}
    where = f"in the registry at {hide_password(tracking_uri)}"
    if not versions:
        return (
            f"there is no concept {concept_id!r} {where}: train it first, or name another registry "
            "with --tracking-uri"
        )
    numbers = ", ".join(str(number) for number in sorted(int(each.version) for each in versions))
    kind = "version" if pointer.isdecimal() else "alias"
    asked = f"{kind} {pointer}" if pointer else default
    there = f"versions ({numbers})" + (
        f" or aliases ({', '.join(sorted(aliases))})" if aliases else ""
    )
    return f"concept {concept_id!r} has no {asked} {where}: ask for one of its {there}"


def run_of(version: RegisteredVersion, tracking_uri: str) -> Any:
    """Return the MLflow run that made a version, or None when it is gone."""
    if version.run_id is None:
        return None
    client = connect(tracking_uri)
    with reaching(tracking_uri):
        try:
            return client.get_run(version.run_id)
        except Exception as error:
            if code_of(error) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def spec_of(version: RegisteredVersion, sets: Sequence[str], *, tracking_uri: str) -> RunSpec:
    """Return the run spec that a version was trained with, with some settings in place of its own.

    A version whose run has none gets the default one.

    Raises:
        InputError: when a setting is wrong.
        ServiceError: when the tracking server is out of reach.
    """
    if version.run_id is None:
        return resolve_spec(None, None, sets)
    client = connect(tracking_uri)
    with reaching(tracking_uri), tempfile.TemporaryDirectory(prefix="echodistill-spec-") as scratch:
        if SPEC_ARTIFACT not in (item.path for item in client.list_artifacts(version.run_id)):
            return resolve_spec(None, None, sets)
        path = client.download_artifacts(version.run_id, SPEC_ARTIFACT, scratch)
        return with_settings(resolve_spec(None, path), sets)
