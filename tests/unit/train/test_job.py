"""How many iterations a run has, and who takes part in which."""

from __future__ import annotations

import pytest

from components.spec import RunSpec, resolve_spec, with_settings
from components.train.job import (
    echo_iterations,
    learning_rates,
    main_iterations,
    steps_done,
    taking_part,
    total_iterations,
)
from model.errors import InputError


def spec(order: str) -> RunSpec:
    sets = ["train.iterations=8", "echo.rounds=2", "echo.iterations_share=0.25"]
    return resolve_spec("pocket", None, [*sets, f"method.order={order}"])


@pytest.mark.parametrize(
    ("order", "main", "echo", "total"),
    [("together", 8, 2, 12), ("sequential", 16, 2, 20), ("teacher", 8, 0, 8)],
)
def test_iterations(order: str, main: int, echo: int, total: int) -> None:
    own = spec(order)
    assert (main_iterations(own), echo_iterations(own), total_iterations(own)) == (
        main,
        echo,
        total,
    )


@pytest.mark.parametrize("order", ["together", "sequential", "teacher"])
def test_steps_done_counts_those_who_took_part(order: str) -> None:
    own, done = spec(order), [0, 0]
    for iteration in range(total_iterations(own)):
        assert steps_done(own, iteration) == tuple(done)
        done = [n + part for n, part in zip(done, taking_part(own, iteration), strict=True)]
    assert steps_done(own, total_iterations(own)) == tuple(done)


@pytest.mark.parametrize(
    ("order", "first", "share", "teacher", "student"),
    [
        ("together", 5, 0.5, [1, 1, 5 / 6, 4 / 6], [1, 1, 5 / 6, 4 / 6]),
        ("together", 0, 0, [1, 1], [1, 1]),
        ("together", 11, 1, [1 / 12, 0], [1 / 12, 0]),  # after the end there is no rate left
        # One after the other, each counts its own twelve steps.
        ("sequential", 6, 0.5, [1, 5 / 6, 4 / 6], [1, 1, 1]),
        ("sequential", 17, 0.5, [3 / 6, 2 / 6, 1 / 6], [3 / 6, 2 / 6, 1 / 6]),
        ("teacher", 3, 0.5, [1, 1, 3 / 4], [1, 1, 1]),
    ],
)
def test_rates_fall_over_the_last_share_of_a_networks_own_steps(
    order: str, first: int, share: float, teacher: list[float], student: list[float]
) -> None:
    own = with_settings(spec(order), [f"train.cooldown={share}"])
    for offset, expected in enumerate(zip(teacher, student, strict=True)):
        rates, plain = learning_rates(own, first + offset), own.train
        factors = rates["teacher"]["kv"] / plain.teacher_lr, rates["heads"][""] / plain.head_lr
        assert factors == pytest.approx(expected)
        assert rates["student"]["kv"] == pytest.approx(factors[1] * plain.student_lr)
        assert rates["teacher"]["rows"] == pytest.approx(factors[0] * plain.token_lr)
        assert rates["student"]["rows"] == pytest.approx(factors[1] * plain.token_lr)


def test_rates_grow_with_the_batch_but_for_the_heads() -> None:
    alone, two = (
        learning_rates(with_settings(spec("together"), [f"train.scale_lr={scale}"]), 0)
        for scale in ("false", "true")
    )
    assert two["student"] == {name: 2 * rate for name, rate in alone["student"].items()}
    assert two["teacher"] == {name: 2 * rate for name, rate in alone["teacher"].items()}
    assert two["heads"] == alone["heads"]


def test_a_spec_with_other_settings_is_checked_like_any() -> None:
    changed = with_settings(spec("together"), ["train.student_lr=0.5", 'base.teacher="x"'])
    assert (changed.train.student_lr, changed.base.teacher) == (0.5, "x")
    assert changed.train.iterations == 8
    with pytest.raises(InputError, match=r"did you mean 'train\.student_lr'"):
        with_settings(changed, ["train.student_rl=1"])
