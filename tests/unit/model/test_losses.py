"""Every loss against a reference written by hand in float64 loops."""

from __future__ import annotations

import math

import pytest
import torch

from model import losses
from model.packing import block_size, concept_rows, grouped_linear, per_concept_mean


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
