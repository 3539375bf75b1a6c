"""The noise schedule `abar_t` and what is computed from it (METHOD.md "Symbols").

All states are variance preserving: `z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps`. Euler
schedulers of diffusers work in `z_t / sqrt(abar_t)`; their first-order steps are the same ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from model.errors import InputError

TRAIN_STEPS = 1000
LAST_STEP = TRAIN_STEPS - 1
NOISE_SCALE = "_noise_scale"
Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of one network and how its output is read.

    Attributes:
        abar: [1000] float32, computed in float64; the cumulative product of alphas.
        prediction: what the network predicts, `epsilon` or `v_prediction`.
        initial_scale: standard deviation of the state that sampling starts from.
        noise_scale: what the noise of a picture in one step is multiplied by first. Under 1,
            pictures are more typical, and less different from each other (the "temperature" of
            Kingma & Dhariwal 2018, section 6).
        spacing: how sampling steps are spread: `leading`, `trailing` or `linspace`.
        steps_offset: added to leading time steps.
        final_abar: `abar` after the last sampling step: 1, or `abar_0` for schedulers with
            `set_alpha_to_one: false`.
    """

    abar: torch.Tensor
    prediction: Prediction
    initial_scale: float
    noise_scale: float
    spacing: str
    steps_offset: int
    final_abar: float
    _copies: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Read a diffusers `scheduler_config.json`.

        `_noise_scale` in it is ours: diffusers passes over names that begin so, and its noise has
        to be multiplied by who calls it.

        Raises:
            InputError: for a schedule or prediction type that the method does not know, or a scale
                of the noise that is none.
        """
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise InputError(
                f"scheduler_config.json: prediction_type {prediction!r} is not supported; "
                "use a network with 'epsilon' or 'v_prediction'."
            )
        steps = config.get("num_train_timesteps", TRAIN_STEPS)
        if steps != TRAIN_STEPS:
            raise InputError(
                f"scheduler_config.json: num_train_timesteps is {steps}, but the method needs "
                f"{TRAIN_STEPS}; use a base that was trained with {TRAIN_STEPS}."
            )
        name = str(config.get("_class_name", "DDIMScheduler"))
        euler = name.startswith("Euler")
        spacing = config.get("timestep_spacing", "linspace" if euler else "leading")
        if spacing not in ("leading", "trailing", "linspace"):
            raise InputError(
                f"scheduler_config.json: timestep_spacing {spacing!r} is not known; "
                "use 'leading', 'trailing' or 'linspace'."
            )
        noise_scale = config.get(NOISE_SCALE, 1.0)
        if type(noise_scale) not in (int, float) or not 0 < noise_scale <= 2:
            raise InputError(
                f"scheduler_config.json: {NOISE_SCALE} must be a number over 0, at most 2, not "
                f"{noise_scale!r}; leave it out for noise as it is."
            )
        abar = _abar(config, keep_last_positive=euler or prediction == "epsilon")
        # Euler starts at sigma_max * eps, so a state has no z_0 part at all; in our coordinates
        # that is sqrt(1 - abar_999) * eps. With leading spacing diffusers adds the 1 back.
        scaled = euler and spacing != "leading"
        to_one = euler or bool(config.get("set_alpha_to_one", True))
        return cls(
            abar=abar.to(torch.float32),
            prediction=prediction,
            initial_scale=float((1 - abar[-1]).sqrt()) if scaled else 1.0,
            noise_scale=float(noise_scale),
            spacing=spacing,
            steps_offset=int(config.get("steps_offset", 0)),
            final_abar=1.0 if to_one else float(abar[0]),
        )

    def start_scale(self, steps: int) -> float:
        """Give what standard normal noise is multiplied by to start a picture in so many steps."""
        return self.initial_scale * (self.noise_scale if steps == 1 else 1.0)

    def at(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Give `abar_t` [R] shaped to multiply `like` [R, ...], float32, on its device."""
        abar = self._abar_on(t.device)[t].to(like.device)
        return abar.view(-1, *([1] * (like.ndim - 1)))

    def add_noise(self, z0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Forward process: `z_t` from latents `z0`, noise `eps` [R, c, h, w] and `t` [R]."""
        abar = self.at(t, z0)
        return abar.sqrt() * z0 + (1 - abar).sqrt() * eps

    def target(self, z0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Give what the network should predict: `eps`, or `v` [R, c, h, w]."""
        if self.prediction == "epsilon":
            return eps
        abar = self.at(t, z0)
        return abar.sqrt() * eps - (1 - abar).sqrt() * z0

    def x0(self, prediction: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Estimate `z_0` [R, c, h, w] from the network's output at `z_t`."""
        abar = self.at(t, z_t)
        if self.prediction == "epsilon":
            return (z_t - (1 - abar).sqrt() * prediction) / abar.sqrt()
        return abar.sqrt() * z_t - (1 - abar).sqrt() * prediction

    def eps(self, prediction: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Estimate the noise `eps` [R, c, h, w] from the network's output at `z_t`."""
        if self.prediction == "epsilon":
            return prediction
        abar = self.at(t, z_t)
        return abar.sqrt() * prediction + (1 - abar).sqrt() * z_t

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Give the alignment weight `abar_t` [R] of time steps `t` [R]."""
        return self._abar_on(t.device)[t]

    def _abar_on(self, device: torch.device) -> torch.Tensor:
        """Give `abar` on a device, copied there once: every copy waits for the device's queue."""
        if device not in self._copies:
            self._copies[device] = self.abar.to(device)
        return self._copies[device]

    def timesteps(self, steps: int, spacing: str | None = None) -> list[int]:
        """Give the sampling time steps, from noise to picture, as diffusers spaces them.

        Args:
            steps: how many.
            spacing: in place of the schedule's own.

        Raises:
            InputError: for a number outside 1..1000.
        """
        spacing = spacing or self.spacing
        if not 1 <= steps <= TRAIN_STEPS:
            raise InputError(f"steps must lie in 1..{TRAIN_STEPS}, not {steps}.")
        if spacing == "trailing":
            return [round(TRAIN_STEPS - i * TRAIN_STEPS / steps) - 1 for i in range(steps)]
        if spacing == "leading":
            stride = TRAIN_STEPS // steps
            first = [i * stride + self.steps_offset for i in reversed(range(steps))]
            return [min(t, LAST_STEP) for t in first]
        return [round(LAST_STEP * i / max(steps - 1, 1)) for i in reversed(range(steps))]


def _abar(config: Mapping[str, Any], *, keep_last_positive: bool) -> torch.Tensor:
    """Compute `abar` [1000] in float64, as diffusers' schedulers do in float32."""
    kind = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, TRAIN_STEPS, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    else:
        raise InputError(
            f"scheduler_config.json: beta_schedule {kind!r} is not supported; "
            "use 'linear' or 'scaled_linear'."
        )
    abar = torch.cumprod(1 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        root = abar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        abar = root**2
        if keep_last_positive:
            abar[-1] = 2.0**-24  # diffusers' Euler does the same: sigma must stay finite
    return abar
