"""Requests made up from the OpenAPI document: none may meet an error of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve.auth import ApiKeys, key_digest
from serve.gateway import IMAGES_PATH, make_http
from serve.settings import load_settings
from tests.unit.serve.test_serve_gateway import Here
from tests.unit.serve.world import BASE, Shelf

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")

KEY = "sk-echodistill-" + "k" * 40
HEADERS = {"authorization": f"Bearer {KEY}"}
EXAMPLES = 12  # of each operation


def ask(client: TestClient, operation: Any) -> set[int]:
    """Asks for an operation in made-up ways; returns the statuses of the answers."""
    statuses = set()

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def one(case: Any) -> None:
        request = case.as_transport_kwargs(base_url="http://testserver")
        given = {k: v for k, v in request.items() if k in ("json", "data", "params")}
        answer = client.request(request["method"], request["url"], **given)
        assert answer.status_code < 500, (operation.label, given, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        statuses.add(answer.status_code)

    one()
    return statuses


def test_no_request_of_the_document_meets_an_error_of_ours(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add("rex", 1)
    settings = load_settings(
        base=BASE,
        student=tmp_path,
        tracking_uri=shelf.tracking_uri,
        cache=tmp_path / "cache",
        access_log=tmp_path / "access.log",
    )
    app = make_http(Here(shelf, settings), settings, ApiKeys({key_digest(KEY): "ada"}))
    with TestClient(app, headers=HEADERS) as client:
        document = client.get("/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        statuses: dict[str, set[int]] = {}
        for found in schema.get_all_operations():
            operation = found.ok()
            statuses[operation.label] = ask(client, operation)
    assert f"POST {IMAGES_PATH}" in statuses and len(statuses) >= 6, json.dumps(
        {label: sorted(each) for label, each in statuses.items()}
    )
    # Some are right, and are answered: what is tried is more than refusals.
    assert 200 in statuses["GET /v1/models"] and 200 in statuses[f"POST {IMAGES_PATH}"]
