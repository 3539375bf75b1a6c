"""Writes what is installed as a CycloneDX document: `python sbom.py NAME VERSION > sbom.json`."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, distributions
from typing import Any


def component(found: Distribution) -> dict[str, Any]:
    """One package, with its licence as far as it says."""
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    licence = found.metadata.get("License-Expression")
    return {
        "type": "library",
        "name": name,
        "version": found.version,
        "purl": f"pkg:pypi/{name}@{found.version}",
        "bom-ref": f"pkg:pypi/{name}@{found.version}",
        **({"licenses": [{"expression": licence}]} if licence else {}),
    }


def document(name: str, version: str) -> dict[str, Any]:
    """The packages of this Python, sorted by name, in CycloneDX 1.5."""
    made = {item["purl"]: item for item in map(component, distributions())}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": name, "version": version}},
        "components": [made[key] for key in sorted(made)],
    }


if __name__ == "__main__":
    json.dump(document(*sys.argv[1:3]), sys.stdout, indent=1)
