"""Where this machine's runs are tracked when nobody says otherwise."""

from __future__ import annotations

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
