"""What a person reads of losses and money; imports nothing."""

from __future__ import annotations

# What a person calls the losses that programs name shortly.
LOSSES = {
    "rec": "L_rec: teacher learns the references",
    "mse": "L_mse: student against teacher, latent",
    "id": "L_id: identity",
    "perc": "L_perc: perceptual",
    "adv": "L_adv: student against discriminators",
    "disc": "L_D: discriminators",
}


def money(cost: float | None) -> str:
    """Write a cost, in whatever currency the price was."""
    return "–" if cost is None else f"{cost:.4g}"
