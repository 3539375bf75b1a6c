"""Keys and values outside the UNet against the plain diffusers UNet."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from model.base_pair import BasePair
from model.cross_attention import base_weight, expose_keys_values, keys_values
from model.errors import InputError
from model.kv_layout import join, split
from tests.tiny import TinyPaths


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def plain(tiny: TinyPaths) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny.teacher / "unet").eval()


def test_base_equals_the_plain_unet(pair: BasePair, plain: UNet2DConditionModel) -> None:
    z, text, t = randn(2, 4, 8, 8), randn(2, 16, 32, seed=1), torch.tensor([3, 900])
    kv = keys_values(text, pair.teacher_kv[None], torch.tensor([0, 0]))
    assert kv.shape == (2, 16, pair.teacher_layout.width)
    expected = plain(z, t, encoder_hidden_states=text).sample
    assert torch.allclose(pair.denoise(pair.teacher, z, t, kv), expected, atol=1e-5)


@pytest.mark.parametrize("concept", [[0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]])
def test_adapted_rows_equal_plain_unets_with_their_weights(
    pair: BasePair, plain: UNet2DConditionModel, concept: list[int]
) -> None:
    layout = pair.teacher_layout
    weight = pair.teacher_kv + randn(2, *pair.teacher_kv.shape, seed=2) * 0.3
    z, text, t = randn(4, 4, 8, 8), randn(4, 16, 32, seed=1), torch.full((4,), 500)
    kv = keys_values(text, weight, torch.tensor(concept))
    mixed = pair.denoise(pair.teacher, z, t, kv)
    for r, c in enumerate(concept):
        parts = split(layout, weight[c])
        missing, unexpected = plain.load_state_dict(parts, strict=False)
        assert not unexpected and len(parts) == len(layout.names)
        row = slice(r, r + 1)
        expected = plain(z[row], t[row], encoder_hidden_states=text[row]).sample
        assert torch.allclose(mixed[row], expected, atol=1e-5)
    base = pair.denoise(
        pair.teacher, z, t, keys_values(text, pair.teacher_kv[None], torch.zeros(4))
    )
    assert (mixed - base).abs().max() > 1e-2  # the adapter changes the answer at all


def test_gradient_equals_that_of_the_plain_unets_weights(
    pair: BasePair, plain: UNet2DConditionModel
) -> None:
    z, text, t = randn(2, 4, 8, 8), randn(2, 16, 32, seed=1), torch.full((2,), 500)
    weight = pair.teacher_kv[None].clone().requires_grad_()
    kv = keys_values(text, weight, torch.zeros(2, dtype=torch.long))
    pair.denoise(pair.teacher, z, t, kv).square().mean().backward()
    plain(z, t, encoder_hidden_states=text).sample.square().mean().backward()
    assert weight.grad is not None
    named = dict(plain.named_parameters())
    for name, part in split(pair.teacher_layout, weight.grad[0]).items():
        assert torch.allclose(part, named[name].grad, rtol=1e-4, atol=1e-8)
        assert part.abs().sum() > 0


def test_layout_covers_every_cross_attention_matrix_once(
    pair: BasePair, plain: UNet2DConditionModel
) -> None:
    wanted = [n for n, _ in plain.named_parameters() if ".attn2.to_k" in n or ".attn2.to_v" in n]
    layout = pair.teacher_layout
    assert sorted(layout.names) == sorted(wanted)
    stops = [0, *(s.stop for s in layout.slices)]
    assert [s.start for s in layout.slices] == stops[:-1] and stops[-1] == layout.width


def test_exposing_twice_changes_nothing(plain: UNet2DConditionModel) -> None:
    first = expose_keys_values(plain)
    weight = base_weight(plain, first)
    assert expose_keys_values(plain) == first
    assert torch.equal(base_weight(plain, first), weight)
    assert weight.dtype == torch.float32 and not weight.requires_grad


def test_split_and_join_are_inverse_and_checked(pair: BasePair) -> None:
    layout = pair.student_layout
    weight = randn(layout.width, 32)
    parts = split(layout, weight)
    assert torch.equal(join(layout, parts), weight)
    first = layout.names[0]
    with pytest.raises(InputError, match="missing or of another size"):
        join(layout, {n: p for n, p in parts.items() if n != first})
    with pytest.raises(InputError, match="missing or of another size"):
        join(layout, {**parts, first: parts[first][:-1]})
    with pytest.raises(InputError, match="not one of this base's"):
        join(layout, {**parts, "else.to_k.weight": parts[first]})


def test_products_have_the_type_of_the_text_states(pair: BasePair) -> None:
    text = randn(2, 16, 32).bfloat16()
    kv = keys_values(text, pair.teacher_kv[None], torch.zeros(2, dtype=torch.long))
    assert kv.dtype == torch.bfloat16


def test_other_unets_are_refused() -> None:
    small = {
        "sample_size": 8,
        "block_out_channels": (16,),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    none = UNet2DConditionModel(
        **small,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    both = UNet2DConditionModel(
        **small,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        dual_cross_attention=True,
    )
    for unet in (none, both):
        with pytest.raises(InputError, match="Stable Diffusion 1/2 kind"):
            expose_keys_values(unet)
