"""What `infra/` puts into a cluster: every overlay as built, and the batch as it is handed in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.manifests.kustomize import Manifest, apply_patch, build, load

INFRA = Path(__file__).resolve().parents[2] / "infra"
OVERLAYS = INFRA / "k8s" / "overlays"
BATCH = INFRA / "k8s" / "base" / "rayjob.yaml"
BATCH_URI = "s3://echodistill/.echodistill/batches/b-1"


def sets() -> dict[str, list[Manifest]]:
    """Manifests by where they go; the batch is in each, as that overlay's users create it."""
    cpu = yaml.safe_load((OVERLAYS / "dev" / "batch-on-cpu.yaml").read_text("utf-8"))
    small = batch()
    apply_patch(small, cpu)
    return {
        "dev": [*build(OVERLAYS / "dev"), small],
        "prod": [*build(OVERLAYS / "prod"), batch()],
    }


def batch() -> Manifest:
    """The RayJob of a batch."""
    (job,) = load(BATCH)
    job["spec"]["entrypoint"] = job["spec"]["entrypoint"].replace("BATCH_URI", BATCH_URI)
    return job


def pod_templates(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template inside a manifest, with where it is."""
    yield from _templates(manifest, f"{manifest['kind']}/{manifest['metadata']['name']}")


def _templates(node: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("template", "submitterPodTemplate") and "containers" in value.get(
                "spec", {}
            ):
                yield f"{where}.{key}", value
            else:
                yield from _templates(value, f"{where}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _templates(value, f"{where}[{number}]")


def containers(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every container of a manifest's pods, with where it is."""
    for where, template in pod_templates(manifest):
        for key in ("initContainers", "containers"):
            for container in template["spec"].get(key, ()):
                yield f"{where}.{key}.{container['name']}", container


def images() -> set[str]:
    """Names of the images that run in a cluster, without their tags."""
    return {
        container["image"].partition(":")[0]
        for manifests in sets().values()
        for manifest in manifests
        for _, container in containers(manifest)
    }
