"""The gate between candidate and champion."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest

from components.promote.promote import judge
from components.register import registry
from components.register.registry import RegisteredVersion, set_metrics
from components.spec import GateSpec
from model.names import MEASURED

GOOD = {"clip_i": 0.7, "dino": 0.5, "clip_t": 0.3, "before_clip_i": 0.6, "before_dino": 0.3}


def version(number: int, models: str = "clip A", **changes: float) -> RegisteredVersion:
    tags = {f"metric.{name}": repr(value) for name, value in {**GOOD, **changes}.items()}
    tags |= {"metric_models": models, "metric_protocol": "dreambench 25x4"}
    return RegisteredVersion("echodistill.dog", number, "0" * 64, tags)


def test_a_version_counts_as_measured_when_all_its_figures_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Client:
        written: ClassVar[list[str]] = []

        def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
            self.written.append(key)

    monkeypatch.setattr(registry, "connect", lambda _: Client())
    set_metrics(bare(1), GOOD, tracking_uri="sqlite:///x.db")
    assert set(Client.written) == {f"metric.{name}" for name in GOOD}
    assert Client.written[-1] == f"metric.{MEASURED}"


def bare(number: int) -> RegisteredVersion:
    return RegisteredVersion("echodistill.dog", number, "0" * 64, {})


def test_the_first_version_is_promoted_whatever_its_figures() -> None:
    strict = GateSpec(min_clip_i=0.99)
    for candidate in (version(1), version(1, clip_i=-1.0), bare(1)):
        decision = judge(candidate, None, strict)
        assert decision.promoted and decision.reasons == ("there was no champion",)
        assert decision.champion_before is None


def test_the_champion_itself_stays() -> None:
    decision = judge(bare(3), bare(3), GateSpec())
    assert decision.promoted and decision.champion_before == 3


def test_an_equal_or_better_version_passes() -> None:
    assert judge(version(2), version(1), GateSpec()).promoted
    assert judge(version(2, clip_i=0.69), version(1), GateSpec(max_drop=0.02)).promoted
    decision = judge(version(2, dino=0.6), version(1), GateSpec(min_dino=0.55))
    assert decision.promoted and decision.reasons == ("it passed the gate against version 1",)


def test_a_champion_of_other_photos_is_told() -> None:
    versions = [version(2), version(1)]
    tagged = [
        replace(each, tags={**each.tags, "metric_photos": photos})
        for each, photos in zip(versions, ("a", "b"), strict=True)
    ]
    for candidate, champion, told in (
        (*tagged, True),
        (*versions, False),
        (*tagged[:1] * 2, False),
    ):
        decision = judge(replace(candidate, version=2), replace(champion, version=1), GateSpec())
        assert decision.promoted and ("against other photos" in decision.reasons[0]) is told


@pytest.mark.parametrize(
    ("candidate", "gate", "expected"),
    [
        (version(2, clip_i=0.65), GateSpec(), "clip_i 0.650 is more than 0.020 under the champion"),
        (version(2, clip_t=0.2), GateSpec(), "clip_t 0.200 is more than 0.020 under"),
        (version(2), GateSpec(min_clip_t=0.31), "clip_t 0.300 is under the gate's 0.310"),
        (
            version(2, before_clip_i=0.8, before_dino=0.5),
            GateSpec(),
            "identity is no nearer to the references than the class noun's (-0.050)",
        ),
        (version(2, models="clip B"), GateSpec(), "were measured differently (clip B and clip A)"),
        (version(2, dino=float("nan")), GateSpec(), "version 2 has no dino: evaluate it first"),
        (bare(2), GateSpec(), "version 2 has no clip_i: evaluate it first"),
    ],
)
def test_a_worse_or_unmeasured_version_is_refused_with_the_reason(
    candidate: RegisteredVersion, gate: GateSpec, expected: str
) -> None:
    decision = judge(candidate, version(1), gate)
    assert not decision.promoted and decision.champion_before == 1
    assert len(decision.reasons) == 1 and expected in decision.reasons[0]


def test_every_reason_is_given() -> None:
    decision = judge(
        version(2, clip_i=0.1, dino=0.1, clip_t=0.1), version(1), GateSpec(min_clip_i=0.5)
    )
    assert len(decision.reasons) == 5


def test_figures_against_an_unmeasured_champion_are_not_compared() -> None:
    decision = judge(version(2), bare(1), GateSpec())
    assert not decision.promoted and "evaluate version 1 again" in decision.reasons[0]
