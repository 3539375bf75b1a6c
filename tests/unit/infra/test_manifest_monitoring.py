"""Dashboards and alerts: every metric exists, every alert fires when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray
import yaml

from serve.metrics import Metrics
from tests.manifests.rendered import INFRA
from tests.manifests.validate import validate

REPOSITORY = INFRA.parent
ALERTS = INFRA / "prometheus" / "alerts.yaml"
DASHBOARDS = sorted((INFRA / "grafana").glob("*.json"))


def metrics_in(expression: str) -> set[str]:
    """Names of the metrics of a PromQL expression; ValueError where it is none."""
    found = set()

    def look(part: promql_parser.Expr) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            found.add(str(part.name))

    # What Grafana fills in; the other variables are words within quotes.
    promql_parser.walk(promql_parser.parse(expression.replace("$__rate_interval", "5m")), look)
    return found


def _expressions() -> Iterator[tuple[str, str]]:
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]
    for rule in _rules():
        yield rule["alert"], rule["expr"]


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _known() -> set[str]:
    """Metrics of our code, and of Ray as its own dashboards name them."""
    found: set[str] = set()
    for line in Metrics().text().decode().splitlines():
        if line.startswith("# TYPE"):
            name, kind = line.split()[2:]
            found |= {name, f"{name}_bucket"} if kind == "histogram" else {name}
    source = (REPOSITORY / "pipeline/metrics.py").read_text("utf-8")
    found |= {f"ray_{name}" for name in re.findall(r'"(echodistill_[a-z_]+)"', source)}
    panels = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
    for path in panels.glob("*_panels.py"):
        found |= set(re.findall(r"\bray_(?:node|serve)_[a-z_]+", path.read_text("utf-8")))
    return found


def test_every_metric_exists() -> None:
    known = _known()
    used = set()
    for where, expression in _expressions():
        unknown = metrics_in(expression) - known
        assert not unknown, f"{where}: {sorted(unknown)}"
        used |= metrics_in(expression)
    assert len(used) > 20
    assert metrics_in('sum by (a) (rate(b_total{c="d_e"}[5m])) / on (f) g') == {"b_total", "g"}
    for wrong in ("sum(rate(b[5m])", "rat(b[5m])", "rate(b)"):
        with pytest.raises(ValueError):
            metrics_in(wrong)


def test_every_metric_of_a_batch_is_looked_at() -> None:
    used = set().union(*(metrics_in(expression) for _, expression in _expressions()))
    assert {name for name in _known() if name.startswith("ray_echodistill_")} <= used


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_whole(path: Path) -> None:
    board = json.loads(path.read_text("utf-8"))
    assert board["uid"] and board["title"].startswith("EchoDistill")
    variables = {item["name"] for item in board["templating"]["list"]}
    text = json.dumps(board["panels"])
    asked = set(re.findall(r"\$\{?([a-z]+)\}?", text)) - {"__rate_interval"}
    assert asked <= variables
    places = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24 and (x, y) not in places, panel["title"]
                places.add((x, y))
        assert panel["targets"] and panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_dashboards_have_what_they_are_for() -> None:
    titles = {
        path.stem: " ".join(
            item["title"].lower() for item in json.loads(path.read_text())["panels"]
        )
        for path in DASHBOARDS
    }
    for word in ("concepts per hour", "loss", "failed", "gpu", "cost"):
        assert word in titles["training"]
    for word in ("latency", "mix", "cache", "errors"):
        assert word in titles["serving"]


def test_every_alert_says_what_to_do() -> None:
    guide = (INFRA / "README.md").read_text("utf-8")
    names = [rule["alert"] for rule in _rules()]
    assert len(names) == len(set(names))
    for rule in _rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "runbook"}
        assert f"| `{rule['alert']}` |" in guide, rule["alert"]


def test_the_operator_takes_the_alerts() -> None:
    """As the guide makes a PrometheusRule of them: a head, and the file moved in by two."""
    head = (INFRA / "prometheus" / "rule-head.yaml").read_text("utf-8")
    body = "".join(f"  {line}" for line in ALERTS.read_text("utf-8").splitlines(keepends=True))
    rule = yaml.safe_load(head + body)
    validate(rule)
    assert rule["kind"] == "PrometheusRule"
    assert len(rule["spec"]["groups"]) == 2


def _promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.system
@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_takes_the_rules() -> None:
    assert _promtool("check", "rules", str(ALERTS)).returncode == 0
    config = str(INFRA / "prometheus" / "prometheus.yaml")
    assert _promtool("check", "config", "--syntax-only", config).returncode == 0


@pytest.mark.system
@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    cases = (Path(__file__).parent / "alerts.test.yaml").read_text("utf-8")
    tried = {
        case["alertname"]
        for one in yaml.safe_load(cases)["tests"]
        for case in one["alert_rule_test"]
    }
    assert tried == {rule["alert"] for rule in _rules()}
    rules = tmp_path / "alerts.yaml"
    told = tmp_path / "test.yaml"
    told.write_text(cases.replace("ALERTS", str(rules)))
    rules.write_text(ALERTS.read_text("utf-8"))
    good = _promtool("test", "rules", str(told))
    assert good.returncode == 0, good.stdout + good.stderr
    rules.write_text(ALERTS.read_text("utf-8").replace("< 0.1", "< 0.01"))
    assert _promtool("test", "rules", str(told)).returncode == 1
