"""The losses of METHOD.md, items 1 to 5: pure functions of tensors, one number a row.

Rows are averaged per concept with `packing.per_concept_mean` and summed over concepts.
`weight` [R] is the alignment weight `abar_t'`. Loss weights of the run spec come later.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

REAL, FAKE = 1, 0
"""Classes of a discriminator head's two logits."""


def reconstruction(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Item 1, `L_rec = sum(m * (T - target)^2) / sum(m)`.

    Args:
        prediction: [R, c, h, w].
        target: [R, c, h, w].
        mask: [R, 1, h, w], 0 or 1. The sum in the numerator runs over channels too, the one in
            the denominator over places.

    Returns:
        [R].
    """
    squares = mask * (prediction - target) ** 2
    return squares.sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))


def alignment_mse(z_s: torch.Tensor, z_t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Item 3, `L_mse = 0.5 * abar_t' * mean((z_S - z_T)^2)` of latents [R, c, h, w]: [R]."""
    return 0.5 * weight * ((z_s - z_t) ** 2).mean(dim=(1, 2, 3))


def identity(g_s: torch.Tensor, g_t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Item 3, `L_id = abar_t' * (1 - cos(G(x_S), G(x_T)))`.

    Args:
        g_s: identity features of the student's pictures, [R, e] or [R, tokens, e].
        g_t: those of the teacher's answers.
        weight: [R].

    Returns:
        [R]; the cosine is taken per token, then averaged.
    """
    cosine = F.cosine_similarity(g_s, g_t, dim=-1)
    return weight * (1 - cosine.reshape(cosine.shape[0], -1).mean(dim=1))


def lpips(layers_x: Sequence[torch.Tensor], layers_y: Sequence[torch.Tensor]) -> torch.Tensor:
    """Perceptual distance over a backbone's layers (item 3, paper v1).

    LPIPS with unit layer weights: features of unit length per place, squared difference summed
    over channels, averaged over places and layers.

    Args:
        layers_x: hidden states [R, places, d] of some layers.
        layers_y: the same of the target.

    Returns:
        [R].
    """
    terms = [
        ((F.normalize(a, dim=-1) - F.normalize(b, dim=-1)) ** 2).sum(dim=-1).mean(dim=1)
        for a, b in zip(layers_x, layers_y, strict=True)
    ]
    return torch.stack(terms).mean(dim=0)


def adversarial(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Item 4, `L_adv = sum_k CE(h_k(F_k(x_S)), real)` of logits [R, 2] each: [R]."""
    return torch.stack([_cross_entropy(each, REAL) for each in logits]).sum(dim=0)


def discriminator(real: Sequence[torch.Tensor], fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """Item 5, `L_D = sum_k 0.5 * [CE(h_k(F_k(x)), real) + CE(h_k(F_k(sg(x_S))), fake)]`.

    Args:
        real: logits [R, 2] of the reference views, one a backbone.
        fake: those of the student's pictures.

    Returns:
        [R].
    """
    terms = [
        0.5 * (_cross_entropy(r, REAL) + _cross_entropy(f, FAKE))
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).sum(dim=0)


def _cross_entropy(logits: torch.Tensor, label: int) -> torch.Tensor:
    return -F.log_softmax(logits.float(), dim=-1)[:, label]
