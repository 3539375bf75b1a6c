"""The sliced Wasserstein distance against a reference written by hand in float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from model import swd
from model.settings import LossSettings
from tests.unit.model.references import hand_lab, hand_swd


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cielab_by_hand_and_known_colours() -> None:
    known = {(1.0, 0.0, 0.0): (53.24, 80.09, 67.20), (0.0, 0.0, 1.0): (32.30, 79.19, -107.86)}
    colours = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.2, 0.7, 0.03)]
    image = torch.tensor(colours).T.reshape(1, 3, 1, -1) * 2 - 1
    lab = swd.cielab(image)[0, :, 0].T
    for row, colour in zip(lab.tolist(), colours, strict=True):
        assert row == pytest.approx(hand_lab(colour), abs=2e-3)
        if colour in known:
            assert row == pytest.approx(known[colour], abs=0.05)


def test_cielab_gradient_is_finite_at_black_and_outside_the_range() -> None:
    image = torch.tensor([-1.0, -1.5, 1.5]).view(1, 3, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
    swd.cielab(image).sum().backward()
    assert image.grad is not None and torch.isfinite(image.grad).all()


def test_ms_swd_by_hand_for_two_concepts() -> None:
    x, y = (randn(4, 3, 26, 26, seed=s).clamp(-1, 1) for s in (7, 8))
    raw = randn(2, 3, 3, 11, 11)
    directions = swd.unit_directions(raw)
    norms = [math.sqrt(sum(v * v for v in d.flatten().tolist())) for d in directions.flatten(0, 1)]
    assert norms == pytest.approx([1.0] * 6, rel=1e-5)
    result = swd.ms_swd(x, y, directions)
    for r in range(4):  # rows 0, 1 are of concept 0; rows 2, 3 of concept 1
        wanted = hand_swd(*(a.double().numpy() for a in (x[r], y[r], directions[r // 2])))
        assert float(result[r]) == pytest.approx(wanted, rel=1e-4)


def test_ms_swd_has_five_scales_when_they_fit_and_is_zero_on_equals() -> None:
    directions = swd.unit_directions(randn(1, 2, 3, 11, 11))
    flat = torch.zeros(1, 3, 176, 176)
    stripes = flat.clone()
    stripes[..., ::2] = 0.5
    assert float(swd.ms_swd(flat, flat, directions)) == 0
    assert float(swd.ms_swd(stripes, flat, directions)) > 0
    # 176 px have all five: 176 / 16 = 11. Noise is another distance away on every scale.
    x, y = (randn(1, 3, 176, 176, seed=s).clamp(-1, 1) for s in (7, 8))
    wanted = hand_swd(*(a[0].double().numpy() for a in (x, y, directions)))
    assert float(swd.ms_swd(x, y, directions)) == pytest.approx(wanted, rel=1e-4)


def test_sorting_goes_back_as_autograd_would_and_keeps_a_byte_a_projection() -> None:
    a, b = (30 * randn(4, 3, 14, 15, seed=seed) for seed in (4, 5))
    directions = swd.unit_directions(randn(2, 6, 3, 11, 11, seed=6))
    weight, kept = torch.tensor([2.0, -3.0, 1.0, 0.5]), []
    x, plain = a.clone().requires_grad_(), a.double().requires_grad_()
    with saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        found = swd._Sorted.apply(x, b, directions)
    lines = [swd._project(each, directions.double()) for each in (plain, b.double())]
    mine, theirs = (each.sort(dim=-1).values for each in lines)
    expected = (mine - theirs).abs().mean(dim=(1, 2))
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=0)
    for each in (found, expected):
        (each * weight).sum().backward()
    off = (x.grad.double() - plain.grad).norm() / plain.grad.norm()
    assert float(off) < 1e-5
    signs = lines[0].numel()
    assert sum(each.nbytes for each in kept) == signs + 4 * directions.numel()


def test_rows_of_pixels_are_projected_as_patches_are() -> None:
    image = randn(4, 3, 14, 15, seed=4)
    directions = swd.unit_directions(randn(2, 6, 3, 11, 11, seed=6))
    weights = swd._row_weights(directions)
    lines, expected = swd._project_rows(image, weights), swd._project(image, directions)
    assert torch.allclose(lines.transpose(1, 2), expected, atol=1e-5)
    values = randn(*lines.shape, seed=7)
    back = swd._project_rows_back(values, weights, (14, 15))
    expected = swd._project_back(values.transpose(1, 2).contiguous(), directions, (14, 15))
    assert torch.allclose(back, expected, atol=1e-4)


@pytest.mark.parametrize(("bins", "distance", "gradient"), [(64, 3e-2, 0.2), (65536, 1e-4, 2e-2)])
def test_counting_comes_the_nearer_to_sorting_the_more_bins_there_are(
    bins: int, distance: float, gradient: float
) -> None:
    directions = swd.unit_directions(randn(2, 16, 3, 11, 11))
    a, b = (randn(4, 3, 44, 44, seed=s).clamp(-1, 1) for s in (7, 8))
    weight = torch.tensor([2.0, -3.0, 1.0, 0.5])
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    expected, found = swd.ms_swd(x, b, directions), swd.ms_swd(y, b, directions, bins=bins)
    assert torch.allclose(found, expected, rtol=distance, atol=0)
    for each in (expected, found):
        (each * weight).sum().backward()
    off = float((y.grad - x.grad).norm() / x.grad.norm())
    assert 0 < off < gradient


def test_counting_finds_nothing_between_equals_and_all_of_a_shift() -> None:
    directions = swd.unit_directions(randn(1, 2, 3, 11, 11))
    flat = torch.zeros(1, 3, 44, 44, requires_grad=True)
    same = swd.ms_swd(flat, flat.detach(), directions, bins=256)
    same.sum().backward()
    assert float(same.detach()) == 0 and flat.grad is not None and not flat.grad.any()
    lighter = torch.full((1, 3, 44, 44), 0.5)
    expected = float(swd.ms_swd(flat.detach(), lighter, directions))
    found = float(swd.ms_swd(flat.detach(), lighter, directions, bins=256))
    assert found == pytest.approx(expected, rel=1e-2)


def test_what_is_not_a_number_harms_its_own_row_alone() -> None:
    directions = swd.unit_directions(randn(2, 4, 3, 11, 11))
    a, b = (randn(4, 3, 26, 26, seed=s).clamp(-1, 1) for s in (7, 8))
    whole = swd.ms_swd(a, b, directions, bins=64)
    a[1, 0, 5, 5] = math.nan
    x = a.requires_grad_()
    found = swd.ms_swd(x, b, directions, bins=64)
    found[[0, 2, 3]].sum().backward()
    assert torch.equal(found.isnan(), torch.tensor([False, True, False, False]))
    assert torch.equal(found[[0, 2, 3]].detach(), whole[[0, 2, 3]])
    assert x.grad is not None and x.grad[[0, 2, 3]].isfinite().all()


def test_unit_swd_constants_are_the_papers() -> None:
    assert (swd.SWD_SCALES, swd.SWD_PATCH) == (5, 11)
    assert LossSettings().swd_directions == 128
    assert swd.SWD_FACTOR == 0.1
