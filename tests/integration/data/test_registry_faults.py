"""Registering through a proxy that breaks answers: one version a digest, or one sentence."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient

from components.ingest.concept_folder import Concept
from components.register.connection import Patience, RegistryAwayError
from components.register.registry import fetch_adapter, register_adapter
from tests.faults import Faults, everything, faulty_proxy
from tests.integration.data.conftest import MakeAdapter


@pytest.mark.parametrize("fault", ["503", "drop", "lose", "cut"])
def test_no_fault_on_the_way_makes_a_second_version(
    fault: str,
    mlflow_server: str,
    make_adapter: MakeAdapter,
    concept: Concept,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    client = MlflowClient(mlflow_server, mlflow_server)
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)
    said: list[str] = []
    folder = make_adapter()
    # Every other answer; but of half a body MLflow does not ask again: then we do.
    every = [fault, "ok"] if fault != "cut" else [fault, *["ok"] * 9]
    faults = Faults(plan=every * 40, only=everything)
    with faulty_proxy(mlflow_server, faults) as proxy:
        patience = Patience(60, said.append, lambda seconds: None)
        made = patience.ask(lambda: register_adapter(folder, concept, tracking_uri=proxy))
        again = patience.ask(lambda: register_adapter(folder, concept, tracking_uri=proxy))
    assert faults.done[fault] > 2 and bool(said) == (fault == "cut")
    assert again == made
    (version,) = client.search_model_versions(f"name = '{made.name}'")
    assert int(version.version) == made.version
    fetch_adapter(made, tmp_path_factory.mktemp("down"), tracking_uri=mlflow_server)

    # Forced, the same run makes one more, however often it is asked.
    faults = Faults(plan=every * 40, only=everything)
    run = client.create_run("0").info.run_id
    with faulty_proxy(mlflow_server, faults) as proxy:
        for _ in range(2):
            forced = Patience(60, said.append, lambda seconds: None).ask(
                lambda: register_adapter(
                    folder, concept, tracking_uri=proxy, run_id=run, force=True
                )
            )
    numbers = {int(v.version) for v in client.search_model_versions(f"name = '{made.name}'")}
    assert numbers == {made.version, forced.version}


def test_a_registry_that_stays_away_is_waited_for_and_told_in_a_sentence(
    mlflow_server: str,
    make_adapter: MakeAdapter,
    concept: Concept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder, waited = make_adapter(), list[float]()
    faults, said = Faults(only=everything), list[str]()
    with faulty_proxy(mlflow_server, faults) as proxy:
        faults.away.set()
        patience = Patience(0.0, said.append, waited.append)
        with pytest.raises(RegistryAwayError, match="did not answer") as caught:
            patience.ask(lambda: register_adapter(folder, concept, tracking_uri=proxy))
        assert "\n" not in str(caught.value) and waited == []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                faults.away.clear()

        patience = Patience(600.0, said.append, sleep)
        made = patience.ask(lambda: register_adapter(folder, concept, tracking_uri=proxy))
    assert made.version and waited == [1.0, 2.0, 4.0]
    assert len(said) == 3 and "waits 1 s: the MLflow server at" in said[0]
