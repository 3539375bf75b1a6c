"""Settings that save time or memory: they change nothing, or only what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.train.packs import (
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


def one_rank(paths: Any, folder: Path) -> dict[str, Any]:
    concepts = checked_concepts(folder)
    spec, banked = tiny_spec(paths), tiny_spec(paths, "views.bank=3")
    sparing = tiny_spec(paths, "train.checkpointing=true")
    step = tiny_spec(paths, "views.bank=3", *SGD)  # Adam would enlarge round-off
    half = stopped_states(banked, concepts, 3)
    return {
        "start": first_states(spec, concepts),
        "plain": states(trained(spec, concepts)),
        "ahead": states(trained(spec, concepts, ahead=True)),
        "sparing": states(trained(sparing, concepts)),
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
def test_a_bank_of_views_is_the_same_after_a_stop_and_in_any_pack(
    runs: dict[str, Any], name: str
) -> None:
    assert len(runs["bank"][name].echo_prompts) == 2  # they join the bank
    assert_equal(runs["bank, resumed"][name], runs["bank"][name])
    # The heads move by a thousand times the last digit of their weights.
    assert_close(runs["step, alone"][name], runs["step"][name], runs["start"][name], part=2e-3)
    with pytest.raises(AssertionError):  # a setting that changes what is seen
        assert_close(runs["bank"][name], runs["plain"][name], runs["start"][name])
