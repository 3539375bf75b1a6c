"""Compares our schemas and manifests with KubeRay's own definitions.

`python -m tests.manifests.check_crds DIR`, where DIR holds the CRDs of a release of KubeRay. They
are megabytes, so the tests use `schemas/ray.yaml`, which this shows to be a part of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.manifests.rendered import sets
from tests.manifests.validate import schemas

FILES = {"RayJob": "ray.io_rayjobs.yaml", "RayService": "ray.io_rayservices.yaml"}


def definition(folder: Path, kind: str) -> dict[str, Any]:
    """The schema of a kind's v1, as the API server has it."""
    crd = yaml.load((folder / FILES[kind]).read_text("utf-8"), Loader=_loader())
    (found,) = (item for item in crd["spec"]["versions"] if item["name"] == "v1")
    return found["schema"]["openAPIV3Schema"]


def differences(
    ours: dict[str, Any], theirs: dict[str, Any], defs: dict[str, Any], where: str
) -> Iterator[str]:
    """Sentences about fields of ours that are not theirs, or are something else there."""
    if "$ref" in ours:
        ours = defs[ours["$ref"].rpartition("/")[2]]
    if "type" in ours and "type" in theirs and ours["type"] != theirs["type"]:
        yield f"{where} is {theirs['type']}, not {ours['type']}"
    strange = set(ours.get("enum", ())) - set(theirs.get("enum", ours.get("enum", ())))
    if strange:
        yield f"{where} may not be {sorted(strange)}"
    for name, schema in ours.get("properties", {}).items():
        if name not in theirs.get("properties", {}):
            yield f"{where}.{name} does not exist"
            continue
        yield from differences(schema, theirs["properties"][name], defs, f"{where}.{name}")
    if ours.get("properties"):
        for name in set(theirs.get("required", ())) - set(ours.get("required", ())):
            yield f"{where}.{name} is required"
    if "items" in ours:
        yield from differences(ours["items"], theirs["items"], defs, f"{where}[]")


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses unknown fields instead of dropping them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items() if key != "format"}
    open_ended = (
        "additionalProperties" in schema or "x-kubernetes-preserve-unknown-fields" in schema
    )
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made["properties"] = {name: strict(item) for name, item in schema["properties"].items()}
        if not open_ended:
            made["additionalProperties"] = False
    return made


def main(arguments: list[str]) -> int:
    """Prints what differs; 1 when something does."""
    if len(arguments) != 1:
        print("usage: python -m tests.manifests.check_crds DIR", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    kept = schemas("ray.yaml")
    found: list[str] = []
    for kind in FILES:
        theirs = definition(folder, kind)
        spec = theirs["properties"]["spec"]
        found += differences(kept[kind], spec, kept["$defs"], kind)
        checker = jsonschema.Draft7Validator(strict(spec))
        for name, manifests in sets().items():
            for manifest in manifests:
                if manifest["kind"] == kind:
                    for error in checker.iter_errors(manifest["spec"]):
                        path = ".".join(map(str, error.absolute_path))
                        found.append(f"{name} {kind} {path}: {error.message[:200]}")
    for line in found:
        print(line)
    print(f"{len(found)} differences")
    return 1 if found else 0


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
