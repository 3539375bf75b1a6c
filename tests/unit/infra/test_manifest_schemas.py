"""Every file of infra/ parses, and every manifest is one that a cluster takes."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.manifests.check_crds import differences, strict
from tests.manifests.kustomize import Manifest, apply_patch, build
from tests.manifests.rendered import INFRA, OVERLAYS, sets
from tests.manifests.validate import schemas, validate

MANIFESTS = [
    pytest.param(manifest, id=f"{name}-{manifest['kind']}-{manifest['metadata']['name']}")
    for name, manifests in sets().items()
    for manifest in manifests
]
WRONG = (jsonschema.ValidationError, kubernetes_validate.ValidationError)


def test_every_yaml_and_json_parses() -> None:
    files = [path for path in INFRA.rglob("*") if path.suffix in (".yaml", ".yml", ".json")]
    assert len(files) > 20
    for path in files:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            json.loads(text)
        else:
            assert list(yaml.safe_load_all(text)), path


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_are_valid(manifest: Manifest) -> None:
    validate(manifest)


def test_every_manifest_is_used() -> None:
    """A file that no kustomization names would be checked by nothing."""
    used = {path.name for path in INFRA.glob("k8s/**/kustomization.yaml")}
    for path in INFRA.glob("k8s/**/kustomization.yaml"):
        facts = yaml.safe_load(path.read_text("utf-8"))
        used |= set(facts["resources"])
        used |= {item["path"] for item in facts.get("patches", ()) if "path" in item}
    alone = {"rayjob.yaml", "batch-on-cpu.yaml"}  # created once a batch
    assert {path.name for path in INFRA.glob("k8s/**/*.yaml")} == (used & _names()) | alone


def _names() -> set[str]:
    return {path.name for path in INFRA.glob("k8s/**/*.yaml")}


def _first(kind: str) -> Manifest:
    return next(copy.deepcopy(one) for one in sets()["prod"] if one["kind"] == kind)


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        ("RayJob", {"op": "add", "path": "/spec/ttlSeconds", "value": 1}),
        ("RayJob", {"op": "remove", "path": "/spec/shutdownAfterJobFinishes"}),
        (
            "RayJob",
            {"op": "add", "path": "/spec/rayClusterSpec/authOptions/mode", "value": "disabled"},
        ),
        ("RayService", {"op": "add", "path": "/spec/rayClusterSpec", "value": {}}),
        (
            "RayService",
            {
                "op": "add",
                "path": "/spec/rayClusterConfig/headGroupSpec/template/spec/containers/0/volumes",
                "value": [],
            },
        ),
        ("ClusterQueue", {"op": "add", "path": "/spec/cohort", "value": "all"}),
        ("PodMonitor", {"op": "add", "path": "/spec/endpoints", "value": []}),
        ("Deployment", {"op": "add", "path": "/spec/template/spec/container", "value": []}),
        ("NetworkPolicy", {"op": "replace", "path": "/spec/policyTypes", "value": "Ingress"}),
    ],
)
def test_a_wrong_field_is_refused(kind: str, operation: dict[str, Any]) -> None:
    manifest = _first(kind)
    validate(manifest)
    apply_patch(manifest, [operation])
    with pytest.raises(WRONG):
        validate(manifest)


def test_a_patch_of_what_is_not_there_is_an_error() -> None:
    with pytest.raises((KeyError, IndexError)):
        apply_patch({"spec": {}}, [{"op": "replace", "path": "/spec/replicas", "value": 2}])
    with pytest.raises(ValueError, match="no operation"):
        apply_patch({"spec": {}}, [{"op": "move", "path": "/spec/replicas"}])


@pytest.mark.system
@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_overlays_build_as_kubectl_builds_them(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    command = ["kubectl", "kustomize", str(OVERLAYS / overlay)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    theirs = [item for item in yaml.safe_load_all(answer.stdout) if item]

    def key(item: Manifest) -> tuple[str, str]:
        return item["kind"], item["metadata"]["name"]

    assert sorted(build(OVERLAYS / overlay), key=key) == sorted(theirs, key=key)


def test_kept_schemas_are_compared_with_the_published_ones() -> None:
    kept = schemas("ray.yaml")
    theirs = {
        "type": "object",
        "required": ["entrypoint", "tenant"],
        "properties": {
            "entrypoint": {"type": "integer"},
            "submissionMode": {"type": "string", "enum": ["HTTPMode"]},
        },
    }
    found = list(differences(kept["RayJob"], theirs, kept["$defs"], "RayJob"))
    assert "RayJob.entrypoint is integer, not string" in found
    assert "RayJob.submissionMode may not be ['K8sJobMode']" in found
    assert "RayJob.backoffLimit does not exist" in found
    assert "RayJob.tenant is required" in found
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"other": 1}, strict(theirs))
