"""Builds a kustomization: the few things that those of `infra/` use, and an error for any other.

A test compares the result with that of `kubectl kustomize` where that is installed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

KNOWN = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "images",
    "patches",
    "configMapGenerator",
    "generatorOptions",
}
CLUSTER_WIDE = {"Namespace", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass"}


def build(folder: Path) -> list[Manifest]:
    """Every manifest of a kustomization, patched."""
    facts = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    unknown = set(facts) - KNOWN
    if unknown:
        raise ValueError(f"{folder}: this builder knows no {sorted(unknown)}")
    found: list[Manifest] = []
    for name in facts.get("resources", ()):
        path = folder / name
        found += build(path) if path.is_dir() else load(path)
    options = facts.get("generatorOptions", {})
    found += [_config_map(folder, item, options) for item in facts.get("configMapGenerator", ())]
    for patch in facts.get("patches", ()):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text("utf-8")
        apply_patch(_target(found, patch["target"]), yaml.safe_load(text))
    for image in facts.get("images", ()):
        for manifest in found:
            _rename(manifest, image)
    if "namespace" in facts:
        for manifest in found:
            _move(manifest, facts["namespace"])
    return found


def load(path: Path) -> list[Manifest]:
    """The documents of a file, without what anchors share between them."""
    text = path.read_text("utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    return [copy.deepcopy(item) for item in yaml.load_all(text, loader) if item is not None]


def apply_patch(manifest: Manifest, operations: list[dict[str, Any]]) -> None:
    """Changes a manifest by the operations add, replace and remove of RFC 6902."""
    for operation in operations:
        path = operation["path"].lstrip("/").split("/")
        keys = [key.replace("~1", "/").replace("~0", "~") for key in path]
        node: Any = manifest
        for key in keys[:-1]:
            node = node[int(key) if isinstance(node, list) else key]
        last: Any = keys[-1]
        if isinstance(node, list):
            last = len(node) if last == "-" else int(last)
        if operation["op"] == "add" and isinstance(node, list):
            node.insert(last, operation["value"])
        elif operation["op"] == "add":
            node[last] = operation["value"]
        elif operation["op"] == "replace":
            node[last]  # a KeyError or IndexError for what is not there
            node[last] = operation["value"]
        elif operation["op"] == "remove":
            del node[last]
        else:
            raise ValueError(f"this builder knows no operation {operation['op']!r}")


def _target(found: list[Manifest], target: dict[str, str]) -> Manifest:
    (one,) = (
        item
        for item in found
        if (item["kind"], item["metadata"]["name"]) == (target["kind"], target["name"])
    )
    return one


def _config_map(folder: Path, item: dict[str, Any], options: dict[str, Any]) -> Manifest:
    if not options.get("disableNameSuffixHash"):
        raise ValueError("this builder adds no hashes to names")
    data = {Path(name).name: (folder / name).read_text("utf-8") for name in item["files"]}
    metadata = {"name": item["name"], "labels": dict(options.get("labels", {}))}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _rename(node: Any, image: dict[str, str]) -> None:
    """Names another image wherever containers are, as kustomize does for every kind."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key in ("containers", "initContainers"):
            for container in value:
                name, colon, tag = container["image"].partition(":")
                if name == image["name"]:
                    end = f"@{image['digest']}" if image.get("digest") else None
                    end = end or (f":{image['newTag']}" if "newTag" in image else colon + tag)
                    container["image"] = image.get("newName", name) + end
        elif isinstance(value, dict | list):
            _rename(value, image)


def _move(manifest: Manifest, namespace: str) -> None:
    if manifest["kind"] in CLUSTER_WIDE:
        return
    manifest["metadata"]["namespace"] = namespace
