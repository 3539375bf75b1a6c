"""Whether network policies let one pod talk to another, as Kubernetes defines it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from tests.manifests.kustomize import Manifest

HOME = "echodistill"


@dataclass(frozen=True)
class Peer:
    """A pod by its labels and its namespace, or an address outside (`ip`)."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: dict[str, str] | None = None  # None: our own
    ip: str = ""


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector fits; the empty one fits everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for item in selector.get("matchExpressions", ()):
        if item["operator"] != "In":
            raise ValueError(f"the operator {item['operator']} is not known here")
        if labels.get(item["key"]) not in item["values"]:
            return False
    return True


def allowed(manifests: list[Manifest], source: Peer, target: Peer, port: int, udp: bool) -> bool:
    """Whether traffic passes the rules at both its ends; ends that are not ours have none."""
    ends = ((source, target, "Egress", "to"), (target, source, "Ingress", "from"))
    return all(_passes(manifests, *end, port, udp) for end in ends)


def _passes(
    manifests: list[Manifest], end: Peer, other: Peer, kind: str, side: str, port: int, udp: bool
) -> bool:
    if end.ip or end.namespace is not None:
        return True
    rules = [
        rule
        for one in manifests
        if one["kind"] == "NetworkPolicy" and kind in one["spec"]["policyTypes"]
        if selects(one["spec"]["podSelector"], end.labels)
        for rule in (None, *one["spec"].get(kind.lower(), ()))
    ]
    if not rules:
        return True  # no policy selects it
    return any(rule is not None and _fits(rule, other, side, port, udp) for rule in rules)


def _fits(rule: dict[str, Any], other: Peer, side: str, port: int, udp: bool) -> bool:
    protocol = "UDP" if udp else "TCP"
    ports = rule.get("ports")
    if ports and not any(p["port"] == port and p["protocol"] == protocol for p in ports):
        return False
    peers = rule.get(side)
    return not peers or any(_is(peer, other) for peer in peers)


def _is(peer: dict[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        if not other.ip:
            return False
        address, block = ipaddress.ip_address(other.ip), peer["ipBlock"]
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(
            address in ipaddress.ip_network(x) for x in block.get("except", ())
        )
    if other.ip:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], other.namespace or {}):
            return False
    elif other.namespace is not None:
        return False
    return selects(peer.get("podSelector", {}), other.labels)
