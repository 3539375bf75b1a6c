"""Settings that save time or memory: they change nothing, or only what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from components.train import loop
from components.train.loop import OUT_OF_MEMORY
from tests.integration.train.packs import (
    ITERATIONS,
    assert_close,
    assert_equal,
    checked_concepts,
    states,
    tiny_spec,
    trained,
)
from tests.integration.train.test_loop import SGD, first_states, stopped_states
from tests.unit.train.ranks import on_ranks

NAMES = ("dog", "robot")


@contextmanager
def room_for(concepts: int) -> Iterator[None]:
    """As on a GPU where the echo stage's batches of more concepts do not fit."""
    draw_batch = loop.draw_batch

    def drawn(data: Any, pair: Any, *, iteration: int, **more: Any) -> Any:
        if iteration >= 4 and len(data) > concepts:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_batch(data, pair, iteration=iteration, **more)

    loop.draw_batch = drawn
    try:
        yield
    finally:
        loop.draw_batch = draw_batch


def again(work: Callable[[], None]) -> Callable[[], None]:
    """Record as a GPU does, on a device that has to do the work itself."""
    work()
    return work


def one_rank(paths: Any, folder: Path) -> dict[str, Any]:
    concepts = checked_concepts(folder)
    spec, banked = tiny_spec(paths), tiny_spec(paths, "views.bank=3")
    sparing = tiny_spec(paths, "train.checkpointing=true")
    whole = tiny_spec(paths, "train.items_at_once=null", "train.zero_stage=2")
    step = tiny_spec(paths, "views.bank=3", *SGD)  # Adam would enlarge round-off
    half = stopped_states(banked, concepts, 3)
    with room_for(1):
        halves = trained(spec, concepts)
    with room_for(0):
        none = trained(spec, concepts)
    return {
        "halves": states(halves),
        "none": {member.concept.id: member for member in none.members},
        "start": first_states(spec, concepts),
        "plain": states(trained(spec, concepts)),
        "ahead": states(trained(spec, concepts, ahead=True)),
        "sparing": states(trained(sparing, concepts)),
        "recorded": states(trained(whole, concepts, record=again)),
        "whole": states(trained(whole, concepts)),
        "bank": states(trained(banked, concepts)),
        "bank, resumed": states(trained(banked, concepts, half)),
        "step": states(trained(step, concepts)),
        "step, alone": {
            name: state
            for each in concepts
            for name, state in states(trained(step, [each], ahead=True)).items()
        },
    }


@pytest.fixture(scope="module")
def runs(tiny_paths: Any, concepts_folder: Path) -> dict[str, Any]:
    return on_ranks(1, one_rank, tiny_paths, concepts_folder)[0]


@pytest.mark.parametrize("name", NAMES)
def test_batches_that_are_drawn_ahead_are_the_same(runs: dict[str, Any], name: str) -> None:
    assert_equal(runs["ahead"][name], runs["plain"][name])


@pytest.mark.parametrize("name", NAMES)
def test_activations_that_are_computed_again_train_the_same(
    runs: dict[str, Any], name: str
) -> None:
    assert_close(runs["sparing"][name], runs["plain"][name], runs["start"][name])


@pytest.mark.parametrize("name", NAMES)
def test_work_that_is_recorded_and_replayed_trains_the_same(
    runs: dict[str, Any], name: str
) -> None:
    assert_close(runs["recorded"][name], runs["whole"][name], runs["start"][name])


@pytest.mark.parametrize("name", NAMES)
def test_a_bank_of_views_is_the_same_after_a_stop_and_in_any_pack(
    runs: dict[str, Any], name: str
) -> None:
    assert len(runs["bank"][name].echo_prompts) == 2  # they join the bank
    assert_equal(runs["bank, resumed"][name], runs["bank"][name])
    # The heads move by a thousand times the last digit of their weights.
    assert_close(runs["step, alone"][name], runs["step"][name], runs["start"][name], part=2e-3)
    with pytest.raises(AssertionError):  # a setting that changes what is seen
        assert_close(runs["bank"][name], runs["plain"][name], runs["start"][name])


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_that_does_not_fit_is_trained_in_halves(runs: dict[str, Any], name: str) -> None:
    assert_close(runs["halves"][name], runs["plain"][name], runs["start"][name])
    assert runs["halves"][name].echo_prompts == runs["plain"][name].echo_prompts
    alone = runs["none"][name]
    assert alone.error == OUT_OF_MEMORY and alone.state.iteration < ITERATIONS
