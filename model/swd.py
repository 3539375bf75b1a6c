"""The multi-scale sliced Wasserstein distance of METHOD.md's item 3 (released settings of v2).

Two ways to compare what stands on a direction: exactly, by sorting, and by counting in bins, which
is what a GPU does several times as fast.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from model.compiling import allow_variants

SWD_FACTOR = 0.1
SWD_SCALES = 5
SWD_PATCH = 11

_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
_CHANNELS = 64  # what a GPU's matrix units take at once
_VARIANTS = 256  # scales, pack sizes


def ms_swd(
    x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor, *, bins: int | None = None
) -> torch.Tensor:
    """Multi-scale sliced Wasserstein distance in CIELAB.

    On every scale of a Gaussian pyramid all patches of both pictures are projected on the
    directions; the sorted projections are compared by their mean absolute difference; the scales
    are averaged. A scale smaller than a patch is left out, so small pictures have fewer.

    Args:
        x: [R, 3, S, S] in [-1, 1], rows concept-major.
        y: the same; the target.
        directions: [N, P, 3, k, k] of unit norm, one set a concept, used on every scale.
        bins: count projections in so many equal bins instead of sorting them: the distance between
            what is sorted is the area between the two running counts. On a GPU the projections are
            float16 then. tests/bench/README.md says how far that is from sorting.

    Returns:
        [R], in units of CIELAB.
    """
    a, b = (cielab(each.float().contiguous()) for each in (x, y))
    distances = []
    for _ in range(SWD_SCALES):
        if a.shape[-1] < directions.shape[-1]:
            break
        if bins is None:
            distances.append(_Sorted.apply(a, b, directions))
        else:
            distances.append(_Counted.apply(a, b, directions, bins))
        a, b = _halve(a), _halve(b)
    return torch.stack(distances).mean(dim=0)


def unit_directions(values: torch.Tensor) -> torch.Tensor:
    """Scale normal draws [..., 3, k, k] to unit norm each."""
    return values / values.flatten(-3).norm(dim=-1)[..., None, None, None]


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


class _Sorted(torch.autograd.Function):
    """Mean |sort(P a) - sort(P b)| of pictures [R, 3, H, W] projected on directions: [R].

    A projection of `a` moves the distance by the sign of what stands between it and its partner, so
    one byte a projection is all that is kept for the way back, not ranks and differences. `b` gets
    no gradient. Inputs and results are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, directions: torch.Tensor
    ) -> torch.Tensor:
        mine, places = _project(a, directions).sort(dim=-1)
        gap = mine.sub_(_project(b, directions).sort(dim=-1).values)
        if ctx.needs_input_grad[0]:
            signs = gap.sign().to(torch.int8)
            signs = torch.empty_like(signs).scatter_(-1, places, signs)
            ctx.save_for_backward(signs, directions)
            ctx.size = a.shape[-2:]
        return gap.abs_().mean(dim=(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        signs, directions = ctx.saved_tensors
        share = grads[0] / (signs.shape[1] * signs.shape[2])
        back = _project_back(signs.float(), directions, ctx.size)
        return back * share.view(-1, 1, 1, 1), None, None


class _Counted(torch.autograd.Function):
    """As `_Sorted`, with projections counted in equal bins between their least and their largest.

    With A(v) and B(v) the numbers of projections below v, the distance is the area of |A - B|, and
    a projection of `a` moves it by the sign of B - A where it stands: within a bin by that of the
    line from one edge to the other, averaged: a fraction, kept in the projections' type. Signs are
    projected back before they are scaled: in float16 one share of the mean would be zero.
    """

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, directions: torch.Tensor, bins: int
    ) -> torch.Tensor:
        kind = torch.float16 if a.is_cuda else torch.float32
        weights = _row_weights(directions.to(kind))
        mine, theirs = (_project_rows(each.to(kind), weights) for each in (a, b))
        bounds: Any = _compiled(_bounds) if a.is_cuda else _bounds
        low, high = bounds(mine, theirs)
        width = (high - low).clamp_min(1e-6) / bins  # [R, P]
        count: Any = _compiled(_count) if a.is_cuda else _count
        more = count(theirs, low, width, bins) - count(mine, low, width, bins)
        right = more.cumsum(dim=-1)  # B - A at the right edge of every bin; whole numbers
        if ctx.needs_input_grad[0]:
            left = F.pad(right, (1, -1))
            signs = (left + right) / (left.abs() + right.abs()).clamp_min(1)
            look_up: Any = _compiled(_look_up) if a.is_cuda else _look_up
            ctx.save_for_backward(look_up(mine, low, width, signs.to(kind)), weights)
            ctx.size = a.shape[-2:]
        return (right.abs().sum(dim=-1) * width).mean(dim=1) / mine.shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        signs, weights = ctx.saved_tensors
        share = grads[0] / (signs.shape[1] * signs.shape[2])
        back = _project_rows_back(signs, weights, ctx.size)
        return back * share.view(-1, 1, 1, 1), None, None, None


def _bounds(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the least and the largest of both along every direction: [R, P] float32 each."""
    low = torch.minimum(a.amin(dim=1), b.amin(dim=1))
    high = torch.maximum(a.amax(dim=1), b.amax(dim=1))
    return low.float(), high.float()


def _count(lines: torch.Tensor, low: torch.Tensor, width: torch.Tensor, bins: int) -> torch.Tensor:
    """Count projections [R, places, P] in bins: [R, P, bins] float32, whole numbers."""
    rows, _, directions = lines.shape
    where = _where(lines, low, width, bins)
    counts = low.new_zeros(rows, directions * bins)
    counts.scatter_add_(1, where, low.new_ones(()).expand(where.shape))
    return counts.view(rows, directions, bins)


def _look_up(
    lines: torch.Tensor, low: torch.Tensor, width: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Give every projection [R, places, P] what the table [R, P, bins] has for its bin."""
    where = _where(lines, low, width, table.shape[-1])
    return table.flatten(1).gather(1, where).view(lines.shape)


def _where(lines: torch.Tensor, low: torch.Tensor, width: torch.Tensor, bins: int) -> torch.Tensor:
    """Give the place of every projection's bin in a flat [P * bins]: [R, places * P].

    What is not a number has a place too, for it must not reach beyond its row; the row's distance
    is none all the same, as its bins have no width.
    """
    number = ((lines.float() - low[:, None]) / width[:, None]).nan_to_num(0.0)
    number = number.clamp(0, bins - 1).long()
    return (number + bins * torch.arange(low.shape[1], device=low.device)).flatten(1)


@lru_cache(maxsize=3)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have torch make one kernel of a function, for every shape that it sees."""
    allow_variants(_VARIANTS)
    return torch.compile(function, dynamic=False)


@lru_cache(maxsize=64)
def _constant(values: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Put numbers on a device once: every copy there waits for the device's queue."""
    return torch.tensor(values, device=device, dtype=dtype)


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


def _row_weights(directions: torch.Tensor) -> torch.Tensor:
    """Lay directions [N, P, 3, k, k] out for `_project_rows`: [N, P, channels, k, 1]."""
    n, p, c, k, _ = directions.shape
    weights = directions.transpose(-1, -2).reshape(n, p, c * k, k, 1)
    return F.pad(weights, (0, 0, 0, 0, 0, -(c * k) % _CHANNELS))


def _project_rows(image: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Project all patches of [R, 3, H, W] on directions: [R, patches, P].

    A place's row of k pixels becomes its channels first, so that what is left to the convolution is
    a column of k, over channels enough for a GPU's matrix units.
    """
    _, p, channels, k, _ = weights.shape
    rows, c, height, width = image.shape
    spread = image.new_zeros(rows, height, width - k + 1, channels)
    spread[..., : c * k] = image.unfold(3, k, 1).permute(0, 2, 3, 1, 4).flatten(3)
    seen = spread.permute(0, 3, 1, 2)
    out = _by_concept(F.conv2d, seen, weights, (p, height - k + 1, width - k + 1))
    return out.permute(0, 2, 3, 1).view(rows, -1, p)


def _project_rows_back(
    values: torch.Tensor, weights: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Apply the transpose of `_project_rows` to values [R, patches, P]: [R, 3, H, W] float32."""
    _, p, channels, k, _ = weights.shape
    height, width = size
    right = width - k + 1
    given = values.view(values.shape[0], -1, right, p).permute(0, 3, 1, 2)
    rows = _by_concept(F.conv_transpose2d, given, weights, (channels, height, right))
    rows = rows[:, : 3 * k].unflatten(1, (3, k)).float()
    image = rows.new_zeros(rows.shape[0], 3, height, width)
    for j in range(k):
        image[..., j : j + right] += rows[:, :, j]
    return image


def _by_concept(
    convolve: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weights: torch.Tensor,
    size: tuple[int, int, int],
) -> torch.Tensor:
    """Convolve every concept's rows with its own weights: [R, *size], channels last."""
    channels, height, width = size
    out = x.new_empty(len(x), height, width, channels).permute(0, 3, 1, 2)
    parts, rows = (each.unflatten(0, (len(weights), -1)) for each in (out, x))
    for part, own, weight in zip(parts, rows, weights, strict=True):
        # A plain copy: twice as fast as `cat` in this layout.
        part.copy_(convolve(own, weight.contiguous(memory_format=torch.channels_last)))
    return out


def _halve(image: torch.Tensor) -> torch.Tensor:
    """Go one level up the Gaussian pyramid: 5-tap binomial blur, every second pixel."""
    taps = _constant(_TAPS, image.device, image.dtype)
    kernel = torch.outer(taps, taps).expand(image.shape[1], 1, 5, 5)
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(padded, kernel, stride=2, groups=image.shape[1])
