"""The whole loop on real tiny models, at every ZeRO stage and world size, without Ray."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.spec import resolve_spec
from components.train.checkpoint import ConceptState, write_state
from components.train.engines import make_engines
from components.train.loop import Block, Watcher
from components.train.members import Member
from model.errors import InputError
from tests.integration.train.packs import (
    ITERATIONS,
    assert_close,
    assert_equal,
    checked_concepts,
    loaded,
    states,
    tiny_spec,
    trained,
    weights,
)
from tests.unit.train.ranks import on_ranks

STAGES = (0, 1, 2, 3)
# One step of plain SGD without decay moves a weight by the rate times its clipped gradient.
SGD = (
    "train.optimizer=sgd",
    "train.weight_decay=0",
    "train.iterations=1",
    "train.student_lr=3e-4",  # at less a step is lost in round-off
    "echo.rounds=0",
)
CLIP = 0.005  # under every gradient's norm
# Parts of the method that are left out, to compare with.
METHODS = {
    "teacher alone": ("method.order=teacher",),
    "sequential": ("method.order=sequential", "train.iterations=3", "echo.rounds=0"),
    "own text": ("method.shared_text=false",),
    "led": ("train.student_lr=0",),
    "led in part": ("train.student_lr=0", "method.follow=0.7"),
    "alone in its way": ("method.follow=0",),
}
Results = dict[str, dict[str, ConceptState]]


class _StoppedError(Exception):
    pass


class StopAt(Watcher):
    """Stops training at the checkpoint after so many iterations."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        self.states: dict[str, ConceptState] = {}
        self._members: list[Member] = []

    def block(self, members: list[Member], block: Block) -> None:
        self._members = members

    def wants_checkpoint(self) -> bool:
        return True

    def checkpoint(self) -> None:
        self.states = {m.concept.id: m.state for m in self._members if m.state}
        if all(state.iteration >= self.iteration for state in self.states.values()):
            raise _StoppedError


def stopped_states(spec: Any, concepts: Any, iteration: int) -> dict[str, ConceptState]:
    watcher = StopAt(iteration)
    with pytest.raises(_StoppedError):
        trained(spec, concepts, watcher=watcher)
    return watcher.states


def every_stage(paths: Any, folder: Path) -> Results:
    """AdamW at every stage over main and echo stage, and one SGD step at every stage."""
    concepts = checked_concepts(folder)
    results = {}
    for stage in STAGES:
        setting = f"train.zero_stage={stage}"
        results[f"adamw.{stage}"] = states(trained(tiny_spec(paths, setting), concepts))
        results[f"sgd.{stage}"] = states(trained(tiny_spec(paths, setting, *SGD), concepts))
    return results


def one_rank(paths: Any, folder: Path) -> dict[str, Any]:
    """What needs one rank only: packs of one, bf16, a stop, a member that fails."""
    concepts = checked_concepts(folder)
    spec = tiny_spec(paths)
    results: dict[str, Any] = every_stage(paths, folder)
    results["alone"] = {
        name: state for one in concepts for name, state in states(trained(spec, [one])).items()
    }
    results["reversed"] = states(trained(spec, concepts[::-1]))
    results["bf16"] = states(trained(tiny_spec(paths, "train.precision=bf16"), concepts))
    clipped = tiny_spec(paths, *SGD, f"train.clip_norm={CLIP}", "method.follow=0")
    results["clipped"] = states(trained(clipped, concepts))
    results["no adversary"] = states(trained(tiny_spec(paths, "loss.adv_weight=0"), concepts))
    results["swd"] = states(trained(tiny_spec(paths, "loss.perceptual=swd"), concepts))
    for name, settings in METHODS.items():
        results[name] = states(trained(tiny_spec(paths, *settings), concepts))
    sequential = tiny_spec(paths, *METHODS["sequential"])
    stopped = stopped_states(sequential, concepts, 3)
    results["teacher is done"] = stopped
    results["sequential, resumed"] = states(trained(sequential, concepts, stopped))
    results["one pass"] = states(trained(tiny_spec(paths, "train.items_at_once=null"), concepts))
    results["blocks"] = states(trained(tiny_spec(paths, "tracking.log_every=1"), concepts))
    results["half"] = stopped_states(spec, concepts, 3)
    results["resumed"] = states(trained(spec, concepts, results["half"]))
    results["one ahead"] = states(trained(spec, concepts, {"dog": results["half"]["dog"]}))
    results["damaged"] = from_a_damaged_checkpoint(spec, concepts, results["half"])
    results["start"] = first_states(spec, concepts)
    results["unlike"] = from_unlike_networks(spec, concepts)
    broken = first_states(spec, concepts)
    broken["dog"].groups["student"]["kv"].fill_(1e38)
    run = trained(spec, concepts, {"dog": broken["dog"]})
    results["broken"] = states(run)
    results["errors"] = {member.concept.id: member.error for member in run.members}
    return results


def from_a_damaged_checkpoint(
    spec: Any, concepts: Any, half: dict[str, ConceptState]
) -> dict[str, Any]:
    """Where members start from checkpoints, their own and given ones, whose dog is of no use."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "states"
        for name, state in half.items():
            write_state(folder / name, state)
        weights_file = folder / "dog" / "student.safetensors"
        weights_file.write_bytes(weights_file.read_bytes()[:-8])
        members = loaded(spec, concepts, folder)[1]
        found: dict[str, Any] = {m.concept.id: m.state.iteration for m in members if m.state}
        members = loaded(spec, concepts, None, (work,))[1]
        given = {m.concept.id: m.state.iteration for m in members if m.state}
        with pytest.raises(InputError) as caught:
            loaded(spec, concepts[:1], None, (work,))
        # One whose photos are others by now does not keep the rest from going on.
        shutil.rmtree(folder / "dog")
        write_state(folder / "dog", replace(half["dog"], digest="of other photos"))
        members = loaded(spec, concepts, None, (work,))[1]
        stale = {m.concept.id: m.state.iteration for m in members if m.state}
        with pytest.raises(InputError) as other:
            loaded(spec.model_copy(update={"seed": 9}), concepts[1:], None, (work,))
    told = {"error": str(caught.value), "other": str(other.value)}
    return {"found": found, "given": given, "stale": stale, **told}


def from_unlike_networks(spec: Any, concepts: Any) -> str:
    """What is said of a student that has other cross-attention layers than its teacher."""
    frozen, members = loaded(spec, concepts)
    layout = replace(frozen.pair.student_layout, names=frozen.pair.student_layout.names[::-1])
    other = replace(frozen, pair=replace(frozen.pair, student_layout=layout))
    with pytest.raises(InputError) as caught:
        make_engines(spec, other, [member.state for member in members if member.state])
    return str(caught.value)


def first_states(spec: Any, concepts: Any) -> dict[str, ConceptState]:
    return {m.concept.id: m.state for m in loaded(spec, concepts)[1] if m.state}


def two_ranks(paths: Any, folder: Path, half: dict[str, ConceptState]) -> Results:
    """Every stage, and the states that one rank stopped at, gone on with at two stages."""
    concepts = checked_concepts(folder)
    results = every_stage(paths, folder)
    for stage in (0, 3):
        spec = tiny_spec(paths, f"train.zero_stage={stage}")
        results[f"gone on.{stage}"] = states(trained(spec, concepts, half))
    return results


@pytest.fixture(scope="module")
def one(tiny_paths: Any, concepts_folder: Path) -> dict[str, Any]:
    return on_ranks(1, one_rank, tiny_paths, concepts_folder)[0]


@pytest.fixture(scope="module")
def two(one: dict[str, Any], tiny_paths: Any, concepts_folder: Path) -> list[Results]:
    return on_ranks(2, two_ranks, tiny_paths, concepts_folder, one["half"])


@pytest.mark.parametrize("name", ["dog", "robot"])
@pytest.mark.parametrize("stage", STAGES)
def test_stages_and_worlds_train_the_same_adapter(one, two, stage, name):
    expected = one["adamw.0"][name]
    assert expected.iteration == ITERATIONS and len(expected.echo_prompts) == 2
    for result in (one, *two):
        found = result[f"adamw.{stage}"][name]
        assert_close(found, expected, one["start"][name])
        assert found.echo_prompts == expected.echo_prompts


@pytest.mark.parametrize("name", ["dog", "robot"])
@pytest.mark.parametrize("stage", STAGES)
def test_clipped_gradients_are_the_same(one, two, stage, name):
    expected = one["sgd.0"][name]
    for result in (one, *two):
        assert_close(result[f"sgd.{stage}"][name], expected, one["start"][name])


def test_gradients_are_clipped_to_the_norm_per_concept_and_group(one):
    train = resolve_spec("pocket", None, SGD).train
    rates = {
        "teacher.kv": train.teacher_lr,
        "teacher.rows": train.token_lr,
        "student.kv": train.student_lr,
    }
    for name, state in one["clipped"].items():
        first, last = weights(one["start"][name]), weights(state)
        squares = {
            key: ((last[key] - first[key]) / rates.get(key, train.head_lr)).square().sum()
            for key in last
        }
        for group in ("teacher", "student", "heads"):
            norm = sum(v for key, v in squares.items() if key.startswith(group)) ** 0.5
            assert float(norm) == pytest.approx(CLIP, rel=0.05), (name, group)


def test_a_pack_of_two_is_two_packs_of_one(one):
    for name in ("dog", "robot"):
        assert_close(one["adamw.0"][name], one["alone"][name], one["start"][name])
        assert_close(one["reversed"][name], one["alone"][name], one["start"][name])


def test_one_pass_over_all_items_is_the_same_sum(one):
    for name in ("dog", "robot"):
        expected = one["adamw.0"][name]
        assert_close(one["one pass"][name], expected, one["start"][name], part=0.1)
        for loss, value in expected.losses.items():
            assert one["one pass"][name].losses[loss] == pytest.approx(value, rel=1e-3), loss


def test_logging_oftener_changes_nothing(one):
    for name in ("dog", "robot"):
        assert_equal(one["blocks"][name], one["adamw.0"][name])


def test_a_stopped_run_goes_on_bit_for_bit(one):
    for name in ("dog", "robot"):
        assert one["half"][name].iteration == 3
        assert_equal(one["resumed"][name], one["adamw.0"][name])


def test_a_member_that_is_ahead_waits_for_the_others(one):
    for name in ("dog", "robot"):
        assert_close(one["one ahead"][name], one["adamw.0"][name], one["start"][name])


@pytest.mark.parametrize("stage", [0, 3])
def test_a_state_goes_on_in_another_world(one, two, stage):
    for rank in two:
        for name, found in rank[f"gone on.{stage}"].items():
            assert_close(found, one["adamw.0"][name], one["start"][name])


def test_a_state_that_is_damaged_or_of_other_photos_is_left_out_alone(one):
    found = one["damaged"]
    for name in ("found", "given", "stale"):
        assert found[name] == {"dog": 0, "robot": 3}, name
    assert "not whole" in found["error"] and "student.safetensors" in found["error"]
    assert "other photos, settings or base" in found["other"]


def test_bf16_keeps_float32_masters_and_learns(one):
    for name, state in one["bf16"].items():
        first, exact = weights(one["start"][name]), weights(one["adamw.0"][name])
        for key, value in weights(state).items():
            assert value.dtype == torch.float32 and value.isfinite().all()
            moved = (exact[key] - first[key]).flatten()
            cosine = torch.cosine_similarity((value - first[key]).flatten(), moved, dim=0)
            assert cosine > 0.5, (name, key, cosine)


def test_a_loss_without_weight_trains_nothing(one):
    for name, state in one["no adversary"].items():
        heads = weights(one["start"][name])
        assert all(torch.equal(v, heads[k]) for k, v in weights(state).items() if "heads" in k)
        assert set(state.losses) == {"rec", "mse", "id", "perc"}
    for name, state in one["swd"].items():
        assert not torch.equal(
            state.groups["student"]["kv"], one["adamw.0"][name].groups["student"]["kv"]
        )


def test_a_member_with_a_loss_that_is_not_finite_leaves_alone(one):
    error = one["errors"]["dog"]
    assert one["errors"]["robot"] is None
    assert "not finite at iteration 0" in error and "\n" not in error
    assert one["broken"]["dog"].iteration == 0
    assert (one["broken"]["dog"].groups["student"]["kv"] == 1e38).all()
    assert_close(one["broken"]["robot"], one["adamw.0"]["robot"], one["start"]["robot"])


def unmoved(state: ConceptState, start: ConceptState) -> set[str]:
    first = weights(start)
    return {
        key.split(".")[0] if key.startswith("heads") else key
        for key, value in weights(state).items()
        if key in first and torch.equal(value, first[key])
    }


def test_the_teacher_alone_learns_and_there_is_no_echo(one):
    for name, state in one["teacher alone"].items():
        assert unmoved(state, one["start"][name]) == {"student.kv", "heads"}
        assert state.echo_prompts == () and set(state.losses) == {"rec"}


def movement(state: ConceptState, start: ConceptState, network: str) -> torch.Tensor:
    return state.groups[network]["kv"] - start.groups[network]["kv"]


@pytest.mark.parametrize(("run", "share"), [("led", 1.0), ("led in part", 0.7)])
def test_a_student_without_a_rate_of_its_own_is_led_by_its_share(one, run, share):
    for name, state in one[run].items():
        start = one["start"][name]
        teacher, student = (movement(state, start, each) for each in ("teacher", "student"))
        near = 2e-3 * float(teacher.abs().max())
        assert torch.allclose(student, share * teacher, rtol=0, atol=near)


def test_a_student_that_does_not_follow_learns_by_its_own_loss(one):
    for name, state in one["alone in its way"].items():
        start = one["start"][name]
        teacher, student = (movement(state, start, each) for each in ("teacher", "student"))
        led = movement(one["adamw.0"][name], start, "student")
        assert torch.cosine_similarity(student.flatten(), teacher.flatten(), dim=0) < 0.5
        assert torch.cosine_similarity(led.flatten(), teacher.flatten(), dim=0) > 0.9


def test_a_student_of_other_layers_cannot_follow(one):
    assert "method.follow" in one["unlike"] and "tiny" in one["unlike"]


def test_one_after_the_other_each_network_learns_alone(one):
    for name, state in one["teacher is done"].items():
        assert state.iteration == 3
        start = one["start"][name]
        assert unmoved(state, start) == {"heads"}
        moves = [movement(state, start, each) for each in ("teacher", "student")]
        assert torch.allclose(*moves, rtol=0, atol=2e-3 * float(moves[0].abs().max()))
        end = one["sequential"][name]
        assert end.iteration == 6
        assert unmoved(end, one["start"][name]) == set()
        for part in ("kv", "rows"):
            assert torch.equal(end.groups["teacher"][part], state.groups["teacher"][part])
        assert_equal(one["sequential, resumed"][name], end)


def test_a_student_with_token_rows_of_its_own_leaves_the_teachers_alone(one):
    for name, state in one["own text"].items():
        shared, start = one["adamw.0"][name], one["start"][name]
        own, teachers = (state.groups[group]["rows"] for group in ("student", "teacher"))
        assert not torch.equal(own, teachers)
        assert not torch.equal(own, start.groups["teacher"]["rows"])
        assert "rows" not in shared.groups["student"]
