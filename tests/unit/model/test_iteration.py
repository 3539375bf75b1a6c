"""One iteration: its numbers, precision and work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.batch import ConceptData
from model.discriminators import load_backbone
from model.errors import InputError
from model.iteration import (
    Frozen,
    alignment_target,
    discriminator_loss,
    student_draw,
    student_loss,
    teacher_loss,
)
from model.settings import LossSettings
from tests.tiny import TinyPaths
from tests.unit.model.conftest import load
from tests.unit.model.packs import LOSS, backward, draw, gradients, trained
from tests.unit.model.references import hand_iteration


@pytest.mark.parametrize("which", ["tiny", "tiny_swapped"])
@torch.no_grad()
def test_an_iteration_equals_the_method_by_hand(
    request: pytest.FixtureRequest, which: str, concepts: tuple[ConceptData, ...]
) -> None:
    """v teacher with epsilon student, and the other way round."""
    paths: TinyPaths = request.getfixturevalue(which)
    pair = request.getfixturevalue("pair" if which == "tiny" else "swapped_pair")
    backbones = tuple(load_backbone(folder) for folder in (paths.clip, paths.dino))
    frozen = Frozen.build(pair, backbones)
    own = trained(frozen, concepts[:2])
    batch = draw(pair, concepts[:2])
    assert batch.directions is not None
    batch = replace(batch, directions=batch.directions[:, :4])  # the hand's loops are slow
    rows = hand_iteration(paths, own, batch, pair, backbones)
    expected = {k: [(v[0] + v[1]) / 2, (v[2] + v[3]) / 2] for k, v in rows.items()}

    loss, states = teacher_loss(frozen, own.teacher, batch, LOSS)
    drawn = student_draw(frozen, own.student, states, batch)
    target = alignment_target(frozen, own.teacher, states, drawn, batch, LOSS)
    result = student_loss(frozen, own.heads, drawn, target, batch, LOSS)
    judged = discriminator_loss(frozen, own.heads, batch, result.fake_features)
    found = {"rec": loss, "disc": judged, **result.parts}
    for name, values in expected.items():
        tolerance = {"id": 1e-6}.get(name, 1e-4)
        assert found[name].tolist() == pytest.approx(values, rel=2e-3, abs=tolerance), name
    total = sum(result.parts.values())
    assert torch.allclose(result.total, total)


def test_weights_scale_their_losses(frozen: Frozen, concepts: tuple[ConceptData, ...]) -> None:
    settings = LossSettings(
        rec_weight=3.0, mse_weight=2.0, id_weight=0.5, perc_weight=0.25, adv_weight=4.0
    )
    batch = draw(frozen.pair, concepts[:1])
    plain = backward(frozen, trained(frozen, concepts[:1]), batch)
    scaled = backward(frozen, trained(frozen, concepts[:1]), batch, settings)
    assert torch.allclose(scaled["rec"], 3 * plain["rec"])
    wanted = 2 * plain["mse"] + plain["id"] / 2 + plain["perc"] / 4 + 4 * plain["adv"]
    assert torch.allclose(scaled["total"], wanted, rtol=1e-4)


def test_without_discriminators_the_identity_encoder_is_enough(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    lone = Frozen.build(frozen.pair, [], identity=frozen.identity)
    settings = LossSettings(adv_weight=0, perceptual="lpips")
    own, batch = trained(lone, concepts[:1]), draw(lone.pair, concepts[:1], loss=settings)
    _, states = teacher_loss(lone, own.teacher, batch, settings)
    drawn = student_draw(lone, own.student, states, batch)
    target = alignment_target(lone, own.teacher, states, drawn, batch, settings)
    result = student_loss(lone, own.heads, drawn, target, batch, settings)
    assert set(result.parts) == {"mse", "id", "perc"} and not result.fake_features
    with pytest.raises(InputError, match="No feature backbone"):
        Frozen.build(frozen.pair, [])


def test_guidance_changes_the_target(frozen: Frozen, concepts: tuple[ConceptData, ...]) -> None:
    own, batch = trained(frozen, concepts[:1]), draw(frozen.pair, concepts[:1])
    _, states = teacher_loss(frozen, own.teacher, batch, LOSS)
    drawn = student_draw(frozen, own.student, states, batch)
    targets = [
        alignment_target(
            frozen, own.teacher, states, drawn, batch, LossSettings(guidance=guidance)
        ).latents
        for guidance in (0.0, 1.0, 3.0)
    ]
    # x0 is affine in guidance, so the third lies on the line through the first two
    assert torch.allclose(targets[2], targets[0] + 3 * (targets[1] - targets[0]), atol=1e-3)
    assert not torch.allclose(targets[0], targets[1], atol=1e-3)


def test_guidance_may_leave_the_targets_colours_alone(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    own, batch = trained(frozen, concepts), draw(frozen.pair, concepts)
    _, states = teacher_loss(frozen, own.teacher, batch, LOSS)
    drawn = student_draw(frozen, own.student, states, batch)

    def latents(guidance: float, share: float) -> torch.Tensor:
        settings = LossSettings(guidance=guidance, guidance_rescale=share)
        return alignment_target(frozen, own.teacher, states, drawn, batch, settings).latents

    plain, guided, half, calm = latents(1, 0), latents(9, 0), latents(9, 0.5), latents(9, 1)
    for statistic in (torch.mean, torch.std):
        wanted = statistic(plain, dim=(2, 3))
        assert torch.allclose(statistic(calm, dim=(2, 3)), wanted, atol=1e-4)
        assert not torch.allclose(statistic(guided, dim=(2, 3)), wanted, atol=1e-2)
    assert torch.allclose(half, (guided + calm) / 2, atol=1e-5)
    shapes = torch.stack([calm[0, 0].flatten(), guided[0, 0].flatten()])
    assert torch.corrcoef(shapes)[0, 1] > 0.9999  # what is drawn stays


def test_a_shared_backbone_sees_the_students_pictures_once(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    """Identity, discriminator and LPIPS share one pass; the target needs a second, no more."""
    settings = LossSettings(perceptual="lpips")
    own, batch = trained(frozen, concepts[:1]), draw(frozen.pair, concepts[:1], loss=settings)
    assert batch.directions is None
    _, states = teacher_loss(frozen, own.teacher, batch, settings)
    drawn = student_draw(frozen, own.student, states, batch)
    target = alignment_target(frozen, own.teacher, states, drawn, batch, settings)
    passes: list[bool] = []
    handle = frozen.backbones[0].network.register_forward_hook(
        lambda _m, _i, out: passes.append(out.last_hidden_state.requires_grad)
    )
    student_loss(frozen, own.heads, drawn, target, batch, settings)
    handle.remove()
    assert passes.count(True) == 1  # of x_S, with gradient
    assert passes.count(False) == 1  # of x_T


def test_ms_swd_counts_when_the_settings_say_so(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    plain, counted = LossSettings(adv_weight=0), LossSettings(adv_weight=0, swd_bins=64)
    own, batch = trained(frozen, concepts[:1]), draw(frozen.pair, concepts[:1], loss=plain)
    _, states = teacher_loss(frozen, own.teacher, batch, plain)
    drawn = student_draw(frozen, own.student, states, batch)
    target = alignment_target(frozen, own.teacher, states, drawn, batch, plain)
    found = [
        student_loss(frozen, own.heads, drawn, target, batch, settings).parts["perc"]
        for settings in (plain, counted)
    ]
    assert not torch.equal(*found)
    assert torch.allclose(*found, rtol=5e-2)


def test_bfloat16_networks_train_float32_masters(
    tiny: TinyPaths, frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    half = Frozen.build(
        load(tiny, torch.bfloat16),
        tuple(load_backbone(folder, torch.bfloat16) for folder in (tiny.clip, tiny.dino)),
    )
    own, exact = trained(half, concepts[:1]), trained(frozen, concepts[:1])
    losses = backward(half, own, draw(half.pair, concepts[:1]))
    reference = backward(frozen, exact, draw(frozen.pair, concepts[:1]))
    for name in ("rec", "mse", "adv", "disc"):
        assert float(losses[name]) == pytest.approx(float(reference[name]), rel=0.1)
    for name, gradient in gradients(own).items():
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()
        wanted = gradients(exact)[name]
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.9, name
