"""Many concepts are looked for in the registry at once, and found as one by one."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient

from components.register import registry
from components.register.registry import find_versions, model_name
from model.names import CHAMPION, CONCEPT_DIGEST_TAG, SPEC_DIGEST_TAG


def test_many_are_found_as_one_by_one(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(tracking_uri, tracking_uri)
    run = client.create_run(client.create_experiment("e")).info.run_id

    def add(name: str, digest: str, spec: str = "spec") -> None:
        tags = {CONCEPT_DIGEST_TAG: digest, SPEC_DIGEST_TAG: spec}
        client.create_model_version(model_name(name), "file:///nowhere", run_id=run, tags=tags)

    for name in ("fox", "owl", "cat", "dog"):
        client.create_registered_model(model_name(name))
    add("fox", "old-fox")
    add("fox", "fox")  # the one that is asked for, twice: the newest counts
    add("fox", "fox")
    add("owl", "owl")
    add("cat", "other photos")
    add("dog", "dog", "another spec")
    client.set_registered_model_alias(model_name("fox"), CHAMPION, "1")
    wanted = {name: name for name in ("fox", "owl", "cat", "hen")}

    one_by_one = find_versions(wanted, "spec", tracking_uri=tracking_uri)
    monkeypatch.setattr(registry, "_ONE_BY_ONE", 0)
    monkeypatch.setattr(registry, "_PAGE", 2)
    assert find_versions(wanted, "spec", tracking_uri=tracking_uri) == one_by_one
    found = {name: (version.version, champion) for name, (version, champion) in one_by_one.items()}
    assert found == {"fox": (3, 1), "owl": (1, None)}
