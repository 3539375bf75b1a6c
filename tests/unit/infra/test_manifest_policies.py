"""Every overlay keeps our rules, and every rule catches what breaks it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.manifests import policies
from tests.manifests.kustomize import apply_patch
from tests.manifests.rendered import sets
from tests.manifests.validate import SCHEMAS

SETS = sets()
BROKEN: dict[str, list[dict[str, Any]]] = yaml.safe_load(
    (SCHEMAS.parent / "broken.yaml").read_text("utf-8")
)


@pytest.mark.parametrize("overlay", sorted(SETS))
@pytest.mark.parametrize("rule", BROKEN)
def test_manifests_keep_our_rules(rule: str, overlay: str) -> None:
    broken = getattr(policies, rule)(SETS[overlay])
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "change"), [(rule, change) for rule, all_of in BROKEN.items() for change in all_of]
)
def test_every_rule_catches_what_breaks_it(rule: str, change: dict[str, Any]) -> None:
    manifests = copy.deepcopy(SETS["prod"])
    first = next(one for one in manifests if one["kind"] == change["kind"])
    apply_patch(first, [{"op": "add", **change}])
    assert getattr(policies, rule)(manifests)
