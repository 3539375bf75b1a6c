"""The noise schedule against float64 loops and against diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from model.errors import InputError
from model.schedule import NoiseSchedule
from tests.unit.model.references import hand_abar

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM = {"_class_name": "DDIMScheduler", **SD}
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", **SD}


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_abar_is_the_cumulative_product(kind: str) -> None:
    schedule = NoiseSchedule.from_config({**DDIM, "beta_schedule": kind})
    expected = torch.tensor(hand_abar(kind, 0.00085, 0.012), dtype=torch.float64)
    assert schedule.abar.shape == (1000,)
    assert schedule.abar.dtype == torch.float32
    assert torch.allclose(schedule.abar.double(), expected, rtol=1e-6)


def test_abar_agrees_with_diffusers_also_with_zero_terminal_snr() -> None:
    for config in (
        DDIM,
        {**DDIM, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ):
        theirs = DDIMScheduler.from_config(config).alphas_cumprod
        assert torch.allclose(NoiseSchedule.from_config(config).abar, theirs, rtol=2e-4, atol=1e-7)
    snr = {**EULER, "rescale_betas_zero_snr": True}
    assert NoiseSchedule.from_config(snr).abar[-1] == 2**-24


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_forward_process_and_targets_by_hand(prediction: str) -> None:
    schedule = NoiseSchedule.from_config({**DDIM, "prediction_type": prediction})
    abar = hand_abar("scaled_linear", 0.00085, 0.012)
    gen = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 3, 2, 2, 2, generator=gen)
    t = torch.tensor([0, 500, 999])
    z_t, target = schedule.add_noise(z0, eps, t), schedule.target(z0, eps, t)
    for r, step in enumerate(t.tolist()):
        a, b = math.sqrt(abar[step]), math.sqrt(1 - abar[step])
        for index in [(c, y, x) for c in range(2) for y in range(2) for x in range(2)]:
            clean, noise = float(z0[r][index]), float(eps[r][index])
            assert float(z_t[r][index]) == pytest.approx(a * clean + b * noise, abs=1e-5)
            wanted = noise if prediction == "epsilon" else a * noise - b * clean
            assert float(target[r][index]) == pytest.approx(wanted, abs=1e-5)
    # the right prediction gives back what went in
    assert torch.allclose(schedule.x0(target, z_t, t), z0, atol=2e-5)
    assert torch.allclose(schedule.eps(target, z_t, t), eps, atol=2e-5)
    assert schedule.weight(t).tolist() == pytest.approx(
        [abar[step] for step in t.tolist()], rel=1e-5
    )


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 25, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_diffusers(steps: int, spacing: str) -> None:
    config = {**DDIM, "timestep_spacing": spacing, "steps_offset": 1, "clip_sample": False}
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(steps)
    mine = NoiseSchedule.from_config(config).timesteps(steps)
    assert mine == theirs.timesteps.tolist()


def test_trailing_student_steps() -> None:
    schedule = NoiseSchedule.from_config(EULER)
    assert schedule.timesteps(1) == [999]
    assert schedule.timesteps(2) == [999, 499]
    assert schedule.timesteps(4) == [999, 749, 499, 249]


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_initial_scale_is_diffusers_after_scaling(spacing: str) -> None:
    config = {**EULER, "timestep_spacing": spacing}
    theirs = EulerDiscreteScheduler.from_config(config)
    start = torch.ones(1) * theirs.init_noise_sigma
    # What the network would get at sigma_max: the sample over sqrt(sigma^2 + 1).
    shown = start / (theirs.sigmas.max() ** 2 + 1) ** 0.5
    mine = NoiseSchedule.from_config(config).initial_scale
    assert mine == pytest.approx(float(shown), rel=1e-5)
    assert NoiseSchedule.from_config(DDIM).initial_scale == 1.0


def test_the_noise_of_one_step_is_scaled_as_the_config_says() -> None:
    plain = NoiseSchedule.from_config(EULER)
    scaled = NoiseSchedule.from_config({**EULER, "_noise_scale": 0.75})
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert plain.noise_scale == 1.0 and scaled.initial_scale == plain.initial_scale
    assert torch.allclose(noise * scaled.start_scale(1), 0.75 * noise * plain.start_scale(1))
    assert scaled.start_scale(4) == plain.start_scale(1) == plain.initial_scale
    # What diffusers does not know it keeps, and leaves alone.
    theirs = EulerDiscreteScheduler.from_config({**EULER, "_noise_scale": 0.75})
    assert theirs.init_noise_sigma == EulerDiscreteScheduler.from_config(EULER).init_noise_sigma


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "0.75", None, float("nan")])
def test_a_scale_of_the_noise_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match=f"at most 2, not {wrong!r}; leave it out"):
        NoiseSchedule.from_config({**EULER, "_noise_scale": wrong})


def test_final_abar_follows_set_alpha_to_one() -> None:
    assert NoiseSchedule.from_config(DDIM).final_abar == 1.0
    kept = NoiseSchedule.from_config({**DDIM, "set_alpha_to_one": False})
    assert kept.final_abar == pytest.approx(1 - 0.00085, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 500},
        {"timestep_spacing": "odd"},
    ],
)
def test_unknown_schedules_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        NoiseSchedule.from_config({**DDIM, **change})


def test_number_of_steps_is_checked() -> None:
    with pytest.raises(InputError, match="steps must lie"):
        NoiseSchedule.from_config(DDIM).timesteps(0)
