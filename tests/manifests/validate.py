"""Validates a manifest: core kinds by Kubernetes' own schemas, the others by those kept here."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.manifests.kustomize import Manifest
from tests.manifests.rendered import pod_templates

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.33"
KEPT = {
    "ray.io/v1": "ray.yaml",
    "kueue.x-k8s.io/v1beta2": "kueue.yaml",
    "monitoring.coreos.com/v1": "monitoring.yaml",
    "monitoring.coreos.com/v1alpha1": "monitoring.yaml",
}
_ENVELOPE = {"apiVersion", "kind", "metadata"}


@cache
def schemas(file: str) -> dict[str, Any]:
    """The schemas of a file, by kind, and what they share (`$defs`)."""
    return yaml.safe_load((SCHEMAS / file).read_text("utf-8"))


def validate(manifest: Manifest) -> None:
    """Raises an error of jsonschema or kubernetes_validate for what a cluster would not take."""
    import kubernetes_validate

    file = KEPT.get(manifest["apiVersion"])
    if file is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    kept = schemas(file)
    body = {key: value for key, value in manifest.items() if key not in _ENVELOPE}
    schema = {**kept[manifest["kind"]], "$defs": kept["$defs"]}
    jsonschema.validate(body.get("spec", body), schema)
    for where, template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
        try:
            kubernetes_validate.validate({**pod, "template": template}, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise jsonschema.ValidationError(f"{where}: {error.message}") from error
    # What an operator makes of the metadata is the same everywhere.
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]},
        KUBERNETES,
        strict=True,
    )
