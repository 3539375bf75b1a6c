"""What must talk to each other can, and nothing else: pods carry the labels of the manifests."""

from __future__ import annotations

import pytest

from tests.manifests.network import Peer, allowed
from tests.manifests.rendered import pod_templates, sets

PROD, DEV = sets()["prod"], sets()["dev"]
COMPONENT = "app.kubernetes.io/component"


def _pods() -> dict[str, Peer]:
    """Our pods by name, with the labels of their templates and those that KubeRay adds."""
    found = {}
    for manifest in DEV:
        for where, template in pod_templates(manifest):
            labels = dict(template["metadata"]["labels"])
            name = labels[COMPONENT]
            for part, role in (("headGroupSpec", "head"), ("workerGroupSpecs", "worker")):
                if part in where:
                    labels["ray.io/node-type"] = role
                    name += f" {role}"
            if "submitterPodTemplate" in where:
                name = "submitter"
            found[name] = Peer(labels)
    return found


PODS = _pods() | {
    "pipeline step": Peer({}, {"echodistill.dev/pipelines": "true"}),
    "client": Peer({"echodistill.dev/client": "true"}),
    "stranger": Peer({"app": "other"}),
    "ingress": Peer({}, {"echodistill.dev/client": "true"}),
    "neighbour": Peer({COMPONENT: "train"}, {"kubernetes.io/metadata.name": "default"}),
    "operator": Peer({}, {"kubernetes.io/metadata.name": "kuberay"}),
    "prometheus": Peer({}, {"kubernetes.io/metadata.name": "monitoring"}),
    "dns": Peer({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}),
    "s3": Peer(ip="52.216.0.1"),
    "metadata service": Peer(ip="169.254.169.254"),
    "api server": Peer(ip="10.96.0.1"),
    "node's names": Peer(ip="169.254.20.10"),
}
OPEN = [
    ("train worker", "train head", 6379),
    ("train head", "train worker", 10017),
    ("submitter", "train head", 8265),
    ("serve worker", "serve head", 6379),
    ("serve head", "serve worker", 52365),
    ("train worker", "mlflow", 5000),
    ("train head", "mlflow", 5000),
    ("serve worker", "mlflow", 5000),
    ("pipeline step", "mlflow", 5000),
    ("pipeline step", "objectstore", 9000),
    ("mlflow", "postgres", 5432),
    ("mlflow", "s3", 443),
    ("train head", "s3", 443),
    ("train worker", "s3", 443),
    ("serve head", "redis", 6379),
    ("train head", "api server", 443),
    ("serve head", "api server", 6443),
    ("operator", "train head", 8265),
    ("operator", "serve head", 8265),
    ("operator", "serve head", 52365),
    ("client", "serve worker", 8000),
    ("ingress", "serve worker", 8000),
    ("prometheus", "train worker", 8080),
    ("prometheus", "serve worker", 8000),
    ("train worker", "objectstore", 9000),
    ("mlflow", "objectstore", 9000),
]
SHUT = [
    ("stranger", "serve worker", 8000),
    ("stranger", "mlflow", 5000),
    ("stranger", "s3", 443),
    ("client", "mlflow", 5000),
    ("ingress", "mlflow", 5000),
    ("pipeline step", "train head", 8265),
    ("pipeline step", "postgres", 5432),
    ("client", "serve head", 8265),
    ("neighbour", "train head", 8265),
    ("neighbour", "mlflow", 5000),
    ("serve worker", "postgres", 5432),
    ("train worker", "postgres", 5432),
    ("train worker", "redis", 6379),
    ("train worker", "serve head", 8265),
    ("serve worker", "train head", 8265),
    ("serve worker", "s3", 443),
    ("serve worker", "objectstore", 9000),
    ("serve worker", "api server", 443),
    ("postgres", "s3", 443),
    ("redis", "mlflow", 5000),
    ("operator", "mlflow", 5000),
    ("prometheus", "serve head", 8265),
    ("train worker", "metadata service", 80),
    ("train worker", "metadata service", 443),
    ("train worker", "metadata service", 53),
]


@pytest.mark.parametrize(("source", "target", "port"), OPEN)
def test_what_must_talk_can(source: str, target: str, port: int) -> None:
    manifests = DEV if target == "objectstore" else PROD
    assert allowed(manifests, PODS[source], PODS[target], port, udp=False)


@pytest.mark.parametrize(("source", "target", "port"), SHUT)
def test_nothing_else_can(source: str, target: str, port: int) -> None:
    manifests = DEV if target == "objectstore" else PROD
    assert not allowed(manifests, PODS[source], PODS[target], port, udp=False)


def test_everybody_may_ask_for_names() -> None:
    for name, pod in PODS.items():
        if pod.namespace is None and not pod.ip:
            assert allowed(PROD, pod, PODS["dns"], 53, udp=True), name
            assert allowed(PROD, pod, PODS["node's names"], 53, udp=True), name


def test_each_open_flow_hangs_on_a_policy() -> None:
    """Without its policies everything of ours is shut, for the first one denies all."""
    (first,) = (one for one in PROD if one["metadata"]["name"] == "deny-all")
    for source, target, port in OPEN:
        if PODS[source].namespace is None or PODS[target].namespace is None:
            assert not allowed([first], PODS[source], PODS[target], port, udp=False)
