"""The losses of METHOD.md, items 1 to 5: pure functions of tensors, one number a row.

Rows are averaged per concept with `packing.per_concept_mean` and summed over concepts.
`weight` [R] is the alignment weight `abar_t'`. Loss weights of the run spec come later.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

REAL, FAKE = 1, 0
"""Classes of a discriminator head's two logits."""

SWD_FACTOR = 0.1
SWD_SCALES = 5
SWD_PATCH = 11

_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


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


def ms_swd(
    x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor, *, half: bool = False
) -> torch.Tensor:
    """Multi-scale sliced Wasserstein distance in CIELAB (item 3, released settings of v2).

    On every scale of a Gaussian pyramid all patches of both pictures are projected on the
    directions; the sorted projections are compared by their mean absolute difference; the scales
    are averaged. A scale smaller than a patch is left out, so small pictures have fewer.

    Args:
        x: [R, 3, S, S] in [-1, 1], rows concept-major.
        y: the same; the target.
        directions: [N, P, 3, k, k] of unit norm, one set a concept, used on every scale.
        half: project and sort in float16: on matrix units, half the bytes. Colours, blurs and means
            stay float32. The distance keeps three digits; its gradient loses more the nearer the
            pictures are, where rounding swaps ranks (tests/bench/README.md).

    Returns:
        [R], in units of CIELAB.
    """
    a, b = (cielab(each.float().contiguous()) for each in (x, y))
    distances = []
    for _ in range(SWD_SCALES):
        if a.shape[-1] < directions.shape[-1]:
            break
        distances.append(_SlicedDistance.apply(a, b, directions, half))
        a, b = _halve(a), _halve(b)
    return torch.stack(distances).mean(dim=0)


def unit_directions(values: torch.Tensor) -> torch.Tensor:
    """Scale normal draws [..., 3, k, k] to unit norm each."""
    return values / values.flatten(-3).norm(dim=-1)[..., None, None, None]


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


def cielab(x: torch.Tensor) -> torch.Tensor:
    """Convert sRGB [R, 3, H, W] in [-1, 1] (clamped) to CIELAB, white point D65.

    L lies in 0..100, a and b about -128..127.
    """
    rgb = ((x + 1) / 2).clamp(0, 1)
    # Both branches of a `where` get gradients, so each is kept where it is finite.
    curved = ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4
    linear = torch.where(rgb > 0.04045, curved, rgb / 12.92)
    to_xyz = _constant(_TO_XYZ, linear.device, linear.dtype)
    white = to_xyz.sum(dim=1)
    xyz = torch.einsum("ij,rjhw->rihw", to_xyz / white[:, None], linear)
    delta = 6 / 29
    root = xyz.clamp_min(delta**3) ** (1 / 3)
    f = torch.where(xyz > delta**3, root, xyz / (3 * delta**2) + 4 / 29)
    fx, fy, fz = f.unbind(dim=1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=1)


class _SlicedDistance(torch.autograd.Function):
    """Mean |sort(P a) - sort(P b)| of pictures [R, 3, H, W] projected on directions: [R].

    A projection of `a` moves the distance by the sign of what stands between it and its partner, so
    one byte a projection is all that is kept for the way back, not ranks and differences. Signs are
    projected back before they are scaled: in float16 one share of the mean would be zero. `b` gets
    no gradient. Inputs and results are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, directions: torch.Tensor, half: bool
    ) -> torch.Tensor:
        kind = torch.float16 if half else torch.float32
        directions = directions.to(kind)
        mine, places = _project(a.to(kind), directions).sort(dim=-1)
        gap = mine.sub_(_project(b.to(kind), directions).sort(dim=-1).values)
        if ctx.needs_input_grad[0]:
            signs = gap.sign().to(torch.int8)
            signs = torch.empty_like(signs).scatter_(-1, places, signs)
            ctx.save_for_backward(signs, directions)
            ctx.size = a.shape[-2:]
        return gap.abs_().mean(dim=(1, 2), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        signs, directions = ctx.saved_tensors
        share = grads[0] / (signs.shape[1] * signs.shape[2])
        back = _project_back(signs.to(directions.dtype), directions, ctx.size)
        return back.float() * share.view(-1, 1, 1, 1), None, None, None


@lru_cache(maxsize=64)
def _constant(values: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Put numbers on a device once: every copy there waits for the device's queue."""
    return torch.tensor(values, device=device, dtype=dtype)


def _cross_entropy(logits: torch.Tensor, label: int) -> torch.Tensor:
    return -F.log_softmax(logits.float(), dim=-1)[:, label]


def _project(image: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Project all patches of [R, 3, H, W] on the concepts' directions: [R, P, patches]."""
    n, p, c, k, _ = directions.shape
    rows, _, height, width = image.shape
    items = rows // n
    # One convolution for the pack: concepts are groups of channels, items are the batch.
    stacked = image.view(n, items, c, height, width).transpose(0, 1)
    stacked = stacked.reshape(items, n * c, height, width)
    out = F.conv2d(stacked, directions.reshape(n * p, c, k, k), groups=n)
    return out.view(items, n, p, -1).transpose(0, 1).reshape(rows, p, -1)


def _project_back(
    values: torch.Tensor, directions: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Apply the transpose of `_project` to values [R, P, patches]: [R, 3, H, W]."""
    n, p, c, k, _ = directions.shape
    (height, width), rows = size, values.shape[0]
    items, down, right = rows // n, height - k + 1, width - k + 1
    stacked = values.view(n, items, p, down, right).transpose(0, 1)
    stacked = stacked.reshape(items, n * p, down, right)
    out = F.conv_transpose2d(stacked, directions.reshape(n * p, c, k, k), groups=n)
    return out.view(items, n, c, height, width).transpose(0, 1).reshape(rows, c, height, width)


def _halve(image: torch.Tensor) -> torch.Tensor:
    """Go one level up the Gaussian pyramid: 5-tap binomial blur, every second pixel."""
    taps = _constant(_TAPS, image.device, image.dtype)
    kernel = torch.outer(taps, taps).expand(image.shape[1], 1, 5, 5)
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(padded, kernel, stride=2, groups=image.shape[1])
