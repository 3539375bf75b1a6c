"""Planning packs, and training's events as ours."""

from typing import Any

import pytest

from components.ingest.concept_folder import Concept
from components.promote.promote import Decision
from components.register.registry import RegisteredVersion
from components.spec import resolve_spec
from components.train.job import TrainedConcept
from components.train.progress import TrainEvent
from model.errors import InputError, ServiceError
from pipeline.pack_run import PackOrder, PackRun
from pipeline.progress import Event
from pipeline.run import Assessed, PackRunner, packs, refuse_full_disk, relay


def named(count: int) -> list[Concept]:
    return [Concept(f"c{i}", "dog", "<new1>", "dog", True, ()) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(0, 4, []), (1, 4, [1]), (4, 4, [4]), (5, 4, [2, 3]), (9, 4, [3, 3, 3]), (3, 1, [1, 1, 1])],
)
def test_packs_are_even_and_keep_the_order(count: int, size: int, sizes: list[int]) -> None:
    concepts = named(count)
    planned = list(packs(concepts, size))
    assert [len(pack) for pack in planned] == sizes
    assert [concept for pack in planned for concept in pack] == concepts


def test_training_events_say_iterations_pace_and_losses() -> None:
    heard: list[Event] = []
    listen = relay(heard.append)
    listen(TrainEvent("fox", 10, 100, "main", {"mse": 0.12345}, 0.5))
    listen(TrainEvent("fox", 100, 100, "done"))
    assert heard == [
        Event("train", "fox", "0.50 s/it mse 0.123", 10, 100),
        Event("train", "fox", "done", 100, 100),
    ]


def test_a_pack_names_the_machine_that_trains_and_not_its_own() -> None:
    order = PackOrder(resolve_spec("pocket"), "", "pack-0", (), {}, {}, False)
    pack = PackRun(order)
    assert pack.look().worker and not pack.look().began
    pack._hear(TrainEvent("fox", 10, 100, "main", worker="gpu-node-7"))
    look = pack.look()
    assert look.began and look.concepts["fox"]["worker"] == "gpu-node-7"


def test_what_is_wrong_with_a_registered_concept_is_that_concepts_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken:
        def finish(self, version: RegisteredVersion, concept: Concept) -> Assessed:
            if concept.id == "c0":
                raise InputError("its adapter is damaged")
            return version, Decision(True, ())

    broken: Any = Broken()
    runner = PackRunner(resolve_spec("pocket"), "sqlite:///x.db", assessor=broken)
    found = RegisteredVersion("echodistill.c", 1, "0" * 64, {})
    monkeypatch.setattr(runner, "registered", lambda concept: found)
    results = runner.already(named(2))
    assert (results["c0"].state, results["c0"].error) == ("failed", "its adapter is damaged")
    assert (results["c1"].state, results["c1"].promoted) == ("already", True)


def test_a_full_disk_is_no_fault_of_a_concept() -> None:
    full = "training broke: [Errno 28] Error writing bytes. Detail: No space left on device"
    refuse_full_disk([TrainedConcept("fox", "failed", error="it diverged")], "runs/train")
    with pytest.raises(ServiceError, match="no space left on the disk.*runs/train"):
        refuse_full_disk([TrainedConcept("fox", "failed", error=full)], "runs/train")
