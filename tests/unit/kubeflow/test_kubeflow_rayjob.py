"""The train step's RayJob, against a server that speaks the Kubernetes API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.ingest import documents
from components.report.step import report_run
from components.steps import run_document
from components.train.batch import (
    Batch,
    batch_uri,
    content_id,
    find_batch,
    plan_batch,
    save_batch,
)
from components.train.claims import Lease
from components.train.rayjob import (
    BATCH_WORD,
    RUN_LABEL,
    drive_as_rayjob,
    end_rayjob,
    job_name,
)
from components.train.rayjob_api import RayJobs, connect
from components.train.state import BatchStatus, BatchView, ConceptState, write_states
from components.train.step import train_batch
from model.errors import InputError, ServiceError
from tests.conftest import REPOSITORY
from tests.kubernetes_api import BREAK, END, EXPIRED, GONE, KubernetesApi, kubernetes_api
from tests.unit.pipeline.test_batch import checked, spec_at

MANIFEST = yaml.safe_dump(
    {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "batch", "labels": {"queue": "batches"}},
        "spec": {"entrypoint": f"python -m pipeline.drive {BATCH_WORD}"},
    }
)
PENDING = {"jobDeploymentStatus": "Initializing", "jobStatus": "PENDING"}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
RETRYING = {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "failed": 1}
COMPLETE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {
    "jobDeploymentStatus": "Failed",
    "jobStatus": "FAILED",
    "reason": "DeadlineExceeded",
    "message": "the job took too long",
}


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with kubernetes_api() as served:
        yield served


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    every = [checked(name) for name in ("a", "b", "c")]
    planned, concepts = plan_batch(
        "photos/", every, spec_at(tmp_path), registry="", train_only=True
    )
    save_batch(planned, concepts)
    return planned


def jobs_of(api: KubernetesApi) -> RayJobs:
    return RayJobs("team", connect(api.url, pause=0.0), pause=0.0)


def drive(
    api: KubernetesApi, batch: Batch, run: str = "run-1", manifest: str = MANIFEST
) -> tuple[BatchStatus, list[str]]:
    said: list[str] = []
    status = drive_as_rayjob(batch.uri, manifest, jobs_of(api), said.append, run=run)
    return status, said


def driver(batch: Batch, end: str | None = "done", **ended: str) -> Callable[[], dict[str, Any]]:
    """What the driver in the RayJob leaves: these states, and its lease as it ends."""

    def work() -> dict[str, Any]:
        lease = Lease(batch.uri, "job")
        states: Any = {name: ConceptState(name, state) for name, state in ended.items()}  # type: ignore[arg-type]
        for name, one in states.items():
            if one.state == "failed":
                states[name] = replace(one, error="the loss of a is not finite")
        write_states(batch, states.values())
        lease._stop.set()
        if end is not None:
            lease.end(end)
        return COMPLETE

    return work


def test_a_rayjob_is_made_watched_and_removed(api: KubernetesApi, batch: Batch) -> None:
    api.script += [PENDING, RUNNING, driver(batch, a="trained", b="trained", c="failed")]
    status, said = drive(api, batch)
    assert {one.id: one.state for one in status.concepts} == {
        "a": "trained",
        "b": "trained",
        "c": "failed",
    }
    assert status.concepts[2].error == "the loss of a is not finite"  # its own, not the job's
    (made,) = api.made
    assert made["metadata"]["name"] == job_name(batch) and made["metadata"]["namespace"] == "team"
    assert made["metadata"]["labels"]["queue"] == "batches"  # the manifest's own stay
    assert made["spec"]["entrypoint"] == f"python -m pipeline.drive {batch.uri} --failed"
    assert not api.jobs  # removed, and waited for
    told = "\n".join(said)
    assert "Initializing, PENDING" in told and "Running, RUNNING" in told and "a: trained" in told
    assert "c: failed the loss of a is not finite" in told


def test_a_second_look_at_a_finished_batch_makes_no_rayjob(
    api: KubernetesApi, batch: Batch
) -> None:
    driver(batch, a="trained", b="already", c="trained")()
    status, said = drive(api, batch)
    assert status.state == "done" and not api.asked and said == ["nothing is left to train"]


def test_broken_watches_and_a_busy_api_cost_nothing(api: KubernetesApi, batch: Batch) -> None:
    api.faults += [
        ("GET", 429, {"Retry-After": "0"}),
        ("POST", 503, {}),
        ("WATCH", 500, {}),
        ("GET", 500, {}),
        ("DELETE", 429, {"Retry-After": "0"}),
    ]
    api.script += [BREAK, PENDING, EXPIRED, END, RUNNING, RETRYING, BREAK]
    api.script += [driver(batch, a="trained", b="trained", c="trained")]
    status, said = drive(api, batch)
    assert [one.state for one in status.concepts] == 3 * ["trained"]
    assert len(api.made) == 1 and not api.faults and not api.script
    assert any("Retrying" in line for line in said)  # a cluster that KubeRay replaces is no end


def test_a_step_that_is_started_again_adopts_its_rayjob(api: KubernetesApi, batch: Batch) -> None:
    """The step dies while it watches; the next one finds the job by its name."""

    def dies() -> None:
        raise KeyboardInterrupt

    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "RUNNING" in line:
            dies()

    api.script += [RUNNING]
    with pytest.raises(KeyboardInterrupt):
        drive_as_rayjob(batch.uri, MANIFEST, jobs_of(api), say, run="run-1")
    assert len(api.jobs) == 1  # it works on
    api.script += [driver(batch, a="trained", b="trained", c="trained")]
    status, told = drive(api, batch)
    assert len(api.made) == 1 and "goes on (Running, RUNNING)" in told[0]
    assert [one.state for one in status.concepts] == 3 * ["trained"]


def test_two_steps_that_create_at_once_share_one_rayjob(api: KubernetesApi, batch: Batch) -> None:
    jobs = jobs_of(api)
    manifest = yaml.safe_load(MANIFEST)
    first = jobs.create(manifest)
    again = jobs.create(manifest)  # 409
    assert first["metadata"]["uid"] == again["metadata"]["uid"] and len(api.made) == 1


def test_what_a_failed_rayjob_left_undone_failed_with_it(api: KubernetesApi, batch: Batch) -> None:
    """Its driver was killed: what it had trained goes on, the others say why they do not."""
    work = driver(batch, None, a="trained")
    api.script += [RUNNING, lambda: (work(), FAILED)[1]]
    status, _ = drive(api, batch)
    states = {one.id: one for one in status.concepts}
    assert states["a"].state == "trained" and status.state == "interrupted"
    for name in ("b", "c"):
        assert states[name].state == "failed"
        assert "DeadlineExceeded, the job took too long" in str(states[name].error)
    assert len(api.jobs) == 1  # its pods are kept, for their logs
    # The same run again (its step was started anew) takes that result; another run tries again.
    drive(api, batch)
    assert len(api.made) == 1
    api.script += [driver(batch, a="trained", b="trained", c="trained")]
    status, said = drive(api, batch, run="run-2")
    assert len(api.made) == 2 and "an earlier run's is removed" in said[0]
    assert api.made[1]["metadata"]["labels"][RUN_LABEL] == "run-2"
    assert [one.state for one in status.concepts] == 3 * ["trained"]


def test_a_rayjob_that_never_began_ends_the_step_and_leaves_nothing(
    api: KubernetesApi, batch: Batch
) -> None:
    refused = {"jobDeploymentStatus": "ValidationFailed", "message": "no such image"}
    api.script += [refused]
    with pytest.raises(ServiceError, match="trained nothing: .*no such image"):
        drive(api, batch)
    assert not api.jobs  # the next try makes a new one
    api.script += [driver(batch, a="trained", b="trained", c="trained")]
    assert [one.state for one in drive(api, batch)[0].concepts] == 3 * ["trained"]


def test_a_rayjob_that_somebody_deletes_is_told(api: KubernetesApi, batch: Batch) -> None:
    work = driver(batch, None, a="trained")
    api.script += [RUNNING, lambda: (work(), GONE)[1]]
    status, said = drive(api, batch)
    assert "it was deleted" in said[-1]
    assert ["it was deleted" in str(one.error) for one in status.concepts] == [False, True, True]


def test_the_drivers_own_word_wins(api: KubernetesApi, batch: Batch) -> None:
    def work() -> dict[str, Any]:
        lease = Lease(batch.uri, "job")
        lease.end("failed", "the base tiny can't be loaded")
        return FAILED

    api.script += [work]
    with pytest.raises(ServiceError, match="the base tiny can't be loaded"):
        drive(api, batch)


def test_refusals_say_what_to_do(api: KubernetesApi, batch: Batch) -> None:
    api.faults += [("GET", 403, {})]
    with pytest.raises(InputError, match="does not let this process get RayJobs in the namespace"):
        drive(api, batch)
    api.faults += [("POST", 404, {})]
    with pytest.raises(InputError, match="install the KubeRay operator"):
        drive(api, batch)
    api.faults += 9 * [("GET", 503, {})]
    with pytest.raises(ServiceError, match="answered 503"):
        drive(api, batch)
    with pytest.raises(InputError, match="0 RayJobs"):
        drive(api, batch, manifest="kind: Service")
    with pytest.raises(InputError, match=BATCH_WORD):
        drive(api, batch, manifest="kind: RayJob")
    with pytest.raises(InputError, match="not YAML"):
        drive(api, batch, manifest="a: [")
    away = RayJobs("team", connect("http://127.0.0.1:9", pause=0.0), pause=0.0)
    with pytest.raises(ServiceError, match="can't be reached"):
        away.find("x")


def test_a_run_that_is_given_up_leaves_no_rayjob(api: KubernetesApi, batch: Batch) -> None:
    jobs = jobs_of(api)
    assert not end_rayjob(batch.uri, jobs)
    jobs.create({**yaml.safe_load(MANIFEST), "metadata": {"name": job_name(batch)}})
    assert end_rayjob(batch.uri, jobs) and not api.jobs
    assert BatchView(batch.uri).read().state == "cancelled"


def test_the_role_of_the_train_step_has_the_rights_that_it_uses(
    api: KubernetesApi, batch: Batch
) -> None:
    """And no other: it is what infra/README.md binds the pipeline's account to."""
    accounts = (REPOSITORY / "infra/k8s/base/accounts.yaml").read_text(encoding="utf-8")
    (role,) = (each for each in yaml.safe_load_all(accounts) if each["kind"] == "Role")
    (rule,) = role["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    api.script += [RUNNING, driver(batch, a="trained", b="trained", c="trained")]
    drive(api, batch)
    names = {"GET": "get", "WATCH": "watch", "POST": "create", "DELETE": "delete"}
    assert {names[method] for method, _ in api.asked} == set(rule["verbs"])
    read = {path for method, path in api.asked if method == "GET"}
    assert all(path.endswith(f"/rayjobs/{job_name(batch)}") for path in read)  # else it is a list


@pytest.fixture
def as_kubectl(api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of kubectl names the server: no step is handed a client."""
    entry = {
        "clusters": [{"name": "here", "cluster": {"server": api.url}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
    }
    place = tmp_path / "kubeconfig"
    place.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **entry}))
    # The library reads KUBECONFIG once, when it is imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(place))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)  # in a pod its account comes first


def test_the_steps_train_by_a_rayjob_and_end_the_one_of_a_run_that_stopped(
    api: KubernetesApi, batch: Batch, as_kubectl: None
) -> None:
    said: list[str] = []
    api.script += [RUNNING, driver(batch, a="trained", b="trained", c="failed")]
    status = train_batch(batch.uri, said.append, rayjob=MANIFEST, namespace="team", run="run-1")
    assert status.counts == {"trained": 2, "failed": 1} and not api.jobs

    RayJobs("team").create({**yaml.safe_load(MANIFEST), "metadata": {"name": job_name(batch)}})
    documents.write(run_document(batch.storage, "run-2"), {"batch": batch.uri})

    def reports() -> str:
        return report_run(
            batch.prefix,
            batch.spec,
            said.append,
            storage=batch.storage,
            run="run-2",
            state="FAILED",
            error="the step train was evicted",
            namespace="team",
        )

    api.faults += [("GET", 403, {})]  # the report is worth more
    assert "the step train was evicted\n\n| concept |" in reports() and len(api.jobs) == 1
    assert any("its RayJob could not be looked at" in line for line in said)
    told = reports()
    assert "its RayJob was removed; what it had begun goes on in the next run" in said
    assert not api.jobs and "| c | failed |  |  | the loss of a is not finite |" in told


def test_a_batch_is_named_after_its_content(batch: Batch, tmp_path: Path) -> None:
    concepts = {one.id: one.concept for one in (checked("a"), checked("b")) if one.concept}
    same = content_id(batch, concepts)
    assert content_id(replace(batch, submitted=0.0, id="other"), concepts) == same
    other = spec_at(tmp_path, "train.iterations=3")
    assert content_id(replace(batch, spec=other), concepts) != same
    assert content_id(batch, {"a": concepts["a"]}) != same
    assert len(job_name(replace(batch, id=same))) <= 47
    # The newest batch is found among those that are named so and those that are dated.
    assert find_batch(None, batch.storage) == batch.uri
    named = replace(batch, id=same, uri=batch_uri(batch.storage, same), submitted=2e10)
    save_batch(named, concepts)
    assert find_batch(None, batch.storage) == named.uri
