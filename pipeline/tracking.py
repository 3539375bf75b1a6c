"""Where this machine's runs are tracked when nobody says otherwise."""

from __future__ import annotations

from components.register.connection import hide_password, sqlite_path
from components.spec import RunSpec, resolve_spec
from components.train.tracking import resolve_tracking
from model.errors import InputError


def tracking_uri(given: str | None = None, spec: RunSpec | None = None) -> str:
    """Return the MLflow URI that `echodistill train` registers adapters in.

    What is given wins, then the spec's `tracking.uri`, MLFLOW_TRACKING_URI and the database beside
    the runs.

    Raises:
        InputError: when the spec turns tracking off, for then nothing is registered.
    """
    spec = spec or resolve_spec()
    if given:
        tracking = spec.tracking.model_copy(update={"uri": given})
        spec = spec.model_copy(update={"tracking": tracking})
    found = resolve_tracking(spec)
    if found is None:
        raise InputError(
            "tracking.enabled is false, but adapters live in the tracking server's registry: leave "
            "it on"
        )
    return found.uri


def registry_to_read(given: str | None = None) -> str:
    """Return the MLflow URI of a registry that is there: who only reads must not make one.

    Raises:
        InputError: when it is a SQLite file, and there is none.
    """
    uri = tracking_uri(given)
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise InputError(
            f"there is no registry at {hide_password(uri)}: train a concept first, or name another "
            "with --tracking-uri"
        )
    return uri
