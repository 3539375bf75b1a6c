"""Every loss against a reference written by hand in float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from model import losses
from model.packing import block_size, concept_rows, grouped_linear, per_concept_mean
from model.settings import LossSettings
from tests.unit.model.references import hand_lab, hand_swd


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_reconstruction_by_hand() -> None:
    prediction, target = randn(2, 3, 4, 5, seed=1), randn(2, 3, 4, 5, seed=2)
    mask = (randn(2, 1, 4, 5, seed=3) > 0).float()
    result = losses.reconstruction(prediction, target, mask)
    for r in range(2):
        top = bottom = 0.0
        for y in range(4):
            for x in range(5):
                m = float(mask[r, 0, y, x])
                bottom += m
                for c in range(3):
                    top += m * (float(prediction[r, c, y, x]) - float(target[r, c, y, x])) ** 2
        assert float(result[r]) == pytest.approx(top / bottom, rel=1e-5)


def test_reconstruction_ignores_what_is_masked() -> None:
    prediction, target = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=1)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1:3] = 1
    changed = prediction.clone()
    changed[..., 0, :] += 100
    before = losses.reconstruction(prediction, target, mask)
    assert torch.equal(before, losses.reconstruction(changed, target, mask))


def test_alignment_mse_by_hand() -> None:
    a, b, weight = randn(2, 2, 3, 3, seed=1), randn(2, 2, 3, 3, seed=2), torch.tensor([0.9, 0.1])
    result = losses.alignment_mse(a, b, weight)
    for r in range(2):
        pairs = zip(a[r].flatten().tolist(), b[r].flatten().tolist(), strict=True)
        squares = [(p - q) ** 2 for p, q in pairs]
        wanted = 0.5 * float(weight[r]) * sum(squares) / len(squares)
        assert float(result[r]) == pytest.approx(wanted, rel=1e-5)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))


def test_identity_by_hand_with_and_without_tokens() -> None:
    weight = torch.tensor([0.7, 0.2])
    a, b = randn(2, 4, 6, seed=1), randn(2, 4, 6, seed=2)
    per_token = losses.identity(a, b, weight)
    single = losses.identity(a[:, 0], b[:, 0], weight)
    for r in range(2):
        cosines = [cosine(a[r, k].tolist(), b[r, k].tolist()) for k in range(4)]
        w = float(weight[r])
        assert float(per_token[r]) == pytest.approx(w * (1 - sum(cosines) / 4), rel=1e-5)
        assert float(single[r]) == pytest.approx(w * (1 - cosines[0]), rel=1e-5)


def test_adversarial_and_discriminator_by_hand() -> None:
    def ce(logits: torch.Tensor, label: int) -> float:
        values = [math.exp(v) for v in logits.tolist()]
        return -math.log(values[label] / sum(values))

    real, fake = [randn(3, 2, seed=s) for s in (1, 2)], [randn(3, 2, seed=s) for s in (3, 4)]
    adversarial = losses.adversarial(fake)
    discriminator = losses.discriminator(real, fake)
    for r in range(3):
        wanted = sum(ce(f[r], losses.REAL) for f in fake)
        assert float(adversarial[r]) == pytest.approx(wanted, rel=1e-5)
        pairs = zip(real, fake, strict=True)
        both = sum(0.5 * (ce(a[r], losses.REAL) + ce(b[r], losses.FAKE)) for a, b in pairs)
        assert float(discriminator[r]) == pytest.approx(both, rel=1e-5)


def test_lpips_by_hand() -> None:
    a, b = [randn(2, 3, 4, seed=s) for s in (1, 2)], [randn(2, 3, 4, seed=s) for s in (3, 4)]
    result = losses.lpips(a, b)
    for r in range(2):
        total = 0.0
        for la, lb in zip(a, b, strict=True):
            for place in range(3):
                u, v = la[r, place].double(), lb[r, place].double()
                u, v = u / u.pow(2).sum().sqrt(), v / v.pow(2).sum().sqrt()
                total += float((u - v).pow(2).sum()) / 3 / 2
        assert float(result[r]) == pytest.approx(total, rel=1e-5)


def test_cielab_by_hand_and_known_colours() -> None:
    known = {(1.0, 0.0, 0.0): (53.24, 80.09, 67.20), (0.0, 0.0, 1.0): (32.30, 79.19, -107.86)}
    colours = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.2, 0.7, 0.03)]
    image = torch.tensor(colours).T.reshape(1, 3, 1, -1) * 2 - 1
    lab = losses.cielab(image)[0, :, 0].T
    for row, colour in zip(lab.tolist(), colours, strict=True):
        assert row == pytest.approx(hand_lab(colour), abs=2e-3)
        if colour in known:
            assert row == pytest.approx(known[colour], abs=0.05)


def test_cielab_gradient_is_finite_at_black_and_outside_the_range() -> None:
    image = torch.tensor([-1.0, -1.5, 1.5]).view(1, 3, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
    losses.cielab(image).sum().backward()
    assert image.grad is not None and torch.isfinite(image.grad).all()


def test_ms_swd_by_hand_for_two_concepts() -> None:
    x, y = (randn(4, 3, 26, 26, seed=s).clamp(-1, 1) for s in (7, 8))
    raw = randn(2, 3, 3, 11, 11)
    directions = losses.unit_directions(raw)
    norms = [math.sqrt(sum(v * v for v in d.flatten().tolist())) for d in directions.flatten(0, 1)]
    assert norms == pytest.approx([1.0] * 6, rel=1e-5)
    result = losses.ms_swd(x, y, directions)
    for r in range(4):  # rows 0, 1 are of concept 0; rows 2, 3 of concept 1
        wanted = hand_swd(*(a.double().numpy() for a in (x[r], y[r], directions[r // 2])))
        assert float(result[r]) == pytest.approx(wanted, rel=1e-4)


def test_ms_swd_has_five_scales_when_they_fit_and_is_zero_on_equals() -> None:
    directions = losses.unit_directions(randn(1, 2, 3, 11, 11))
    flat = torch.zeros(1, 3, 176, 176)
    stripes = flat.clone()
    stripes[..., ::2] = 0.5
    assert float(losses.ms_swd(flat, flat, directions)) == 0
    assert float(losses.ms_swd(stripes, flat, directions)) > 0
    # 176 px have all five: 176 / 16 = 11. Noise is another distance away on every scale.
    x, y = (randn(1, 3, 176, 176, seed=s).clamp(-1, 1) for s in (7, 8))
    wanted = hand_swd(*(a[0].double().numpy() for a in (x, y, directions)))
    assert float(losses.ms_swd(x, y, directions)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_ms_swd_goes_back_as_autograd_would_and_keeps_a_byte_a_projection(half: bool) -> None:
    a, b = (30 * randn(4, 3, 14, 15, seed=seed) for seed in (4, 5))
    directions = losses.unit_directions(randn(2, 6, 3, 11, 11, seed=6))
    weight, kept = torch.tensor([2.0, -3.0, 1.0, 0.5]), []
    x, plain = a.clone().requires_grad_(), a.double().requires_grad_()
    with saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        found = losses._SlicedDistance.apply(x, b, directions, half)
    lines = [losses._project(each, directions.double()) for each in (plain, b.double())]
    mine, theirs = (each.sort(dim=-1).values for each in lines)
    expected = (mine - theirs).abs().mean(dim=(1, 2))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=2e-3 if half else 1e-5, atol=0)
    for each in (found, expected):
        (each * weight).sum().backward()
    off = (x.grad.double() - plain.grad).norm() / plain.grad.norm()
    assert float(off) < (3e-2 if half else 1e-5)
    signs = lines[0].numel()
    assert sum(each.nbytes for each in kept) == signs + directions.numel() * (2 if half else 4)


def test_ms_swd_in_half_precision_is_the_distance_to_three_digits() -> None:
    directions = losses.unit_directions(randn(2, 64, 3, 11, 11))
    x, y = (randn(4, 3, 44, 44, seed=s).clamp(-1, 1) for s in (7, 8))
    expected = losses.ms_swd(x, y, directions)
    found = losses.ms_swd(x, y, directions, half=True)
    assert torch.allclose(found, expected, rtol=2e-3)
    assert not torch.equal(found, expected)


def test_unit_swd_constants_are_the_papers() -> None:
    assert (losses.SWD_SCALES, losses.SWD_PATCH) == (5, 11)
    assert LossSettings().swd_directions == 128
    assert losses.SWD_FACTOR == 0.1


def test_per_concept_mean_and_blocks() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert per_concept_mean(values, concept_rows(3, 2), 3).tolist() == [1.5, 3.5, 5.5]
    mixed = torch.tensor([2, 0, 0, 2, 2, 0])
    assert per_concept_mean(values, mixed, 3).tolist() == pytest.approx([11 / 3, 0.0, 10 / 3])
    assert block_size(concept_rows(3, 2), 3) == 2
    assert block_size(mixed, 3) is None
    assert block_size(torch.tensor([0, 1, 2]), 2) is None


@pytest.mark.parametrize("order", [[0, 0, 1, 1, 2, 2], [2, 0, 0, 1, 2, 0], [1], [2, 2]])
def test_grouped_linear_uses_each_rows_matrix(order: list[int]) -> None:
    concept = torch.tensor(order)
    x, weight, bias = randn(len(order), 4, 5), randn(3, 7, 5, seed=1), randn(3, 7, seed=2)
    flat = grouped_linear(x[:, 0], weight, concept, bias)
    deep = grouped_linear(x, weight, concept)
    for r, c in enumerate(order):
        assert torch.allclose(flat[r], weight[c] @ x[r, 0] + bias[c], atol=1e-5)
        assert torch.allclose(deep[r], x[r] @ weight[c].T, atol=1e-5)
