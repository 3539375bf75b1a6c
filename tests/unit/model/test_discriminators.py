"""Backbones against their own models and image processors; heads against nn.Sequential."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPModel, CLIPVisionModelWithProjection, Dinov2Model, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from model.discriminators import Backbone, DiscriminatorHeads, load_backbone
from model.errors import InputError
from tests.tiny import TinyPaths


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_clip_features_are_the_models(tiny: TinyPaths) -> None:
    backbone, whole = load_backbone(tiny.clip), CLIPModel.from_pretrained(tiny.clip).eval()
    pixels = backbone.preprocess(pictures(2, 3, 32, 32))
    vision = whole.vision_model(pixels, output_hidden_states=True)
    features = backbone(pictures(2, 3, 32, 32))
    assert torch.allclose(features.pooled, vision.pooler_output, atol=1e-5)
    expected = whole.visual_projection(vision.pooler_output)
    assert features.projected is not None
    assert torch.allclose(features.projected, expected, atol=1e-5)
    assert torch.allclose(features.layers[-1], vision.hidden_states[-1], atol=1e-5)
    assert torch.equal(backbone.features(pictures(2, 3, 32, 32)), features.pooled)
    assert torch.equal(backbone.projected(pictures(2, 3, 32, 32)), features.projected)
    assert backbone.dim == 32


def test_vision_only_clip_directories_load(tiny: TinyPaths, tmp_path: Path) -> None:
    CLIPVisionModelWithProjection.from_pretrained(tiny.clip).save_pretrained(tmp_path)
    shutil.copy(tiny.clip / "preprocessor_config.json", tmp_path)
    x = pictures(1, 3, 32, 32)
    assert torch.equal(load_backbone(tmp_path).features(x), load_backbone(tiny.clip).features(x))


@pytest.mark.parametrize(("name", "kind"), [("dino", Dinov2Model), ("vit", ViTModel)])
def test_cls_features_are_the_models(tiny: TinyPaths, name: str, kind: type) -> None:
    folder = getattr(tiny, name)
    backbone = load_backbone(folder)
    model = kind.from_pretrained(folder).eval()
    x = pictures(2, 3, 48, 48)
    expected = model(backbone.preprocess(x)).last_hidden_state[:, 0]
    assert torch.allclose(backbone.features(x), expected, atol=1e-5)
    assert backbone(x).projected is None
    with pytest.raises(InputError, match="no image projection"):
        backbone.projected(x)


def test_preprocessing_is_the_image_processors(tiny: TinyPaths) -> None:
    """On a picture of another size and shape, to the rounding of 8-bit pixels."""
    small = torch.randint(0, 256, (1, 3, 13, 17), generator=torch.Generator().manual_seed(1))
    smooth = nn.functional.interpolate(small.float(), size=(104, 136), mode="bilinear")[0]
    image = smooth.round().byte()
    processor = CLIPImageProcessorPil.from_pretrained(tiny.clip)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    mine = load_backbone(tiny.clip).preprocess(image[None].float() / 127.5 - 1)
    assert mine.shape == expected.shape == (1, 3, 32, 32)
    assert (mine - expected).abs().max() < 3 / 255 / 0.26  # three grey levels


@pytest.mark.parametrize("name", ["clip", "dino", "vit"])
def test_other_input_sizes(tiny: TinyPaths, name: str) -> None:
    x = pictures(1, 3, 64, 64)
    backbone = load_backbone(getattr(tiny, name), side=56)
    assert backbone.preprocess(x).shape[-1] == 56
    assert backbone.features(x).shape == (1, backbone.dim)


def test_gradient_reaches_the_pixels_and_no_weight(backbones: tuple[Backbone, ...]) -> None:
    for backbone in backbones:
        x = pictures(1, 3, 40, 40).requires_grad_()
        backbone.features(x)[:, 0].sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        assert not backbone.network.training
        assert all(p.grad is None and not p.requires_grad for p in backbone.network.parameters())


def test_bfloat16_backbones_give_float32_features(tiny: TinyPaths) -> None:
    half, full = load_backbone(tiny.dino, torch.bfloat16), load_backbone(tiny.dino)
    x = pictures(2, 3, 32, 32)
    assert half.features(x).dtype == torch.float32
    assert torch.allclose(half.features(x), full.features(x), atol=0.1)


def test_other_directories_are_refused(tiny: TinyPaths, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.json cannot be read"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="'bert' model"):
        load_backbone(tmp_path)
    shutil.copytree(tiny.dino, tmp_path / "dino")
    (tmp_path / "dino" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="preprocessor_config.json"):
        load_backbone(tmp_path / "dino")


def test_heads_are_the_papers_one_a_concept() -> None:
    heads = DiscriminatorHeads([6, 9], ["ada", "bob", "cyd"], seed=1)
    features = [torch.randn(6, dim) for dim in (6, 9)]
    concept = torch.tensor([0, 0, 1, 1, 2, 2])
    logits = heads(features, concept)
    for head, x, out in zip(heads.heads, features, logits, strict=True):
        for n in range(3):
            plain = nn.Sequential(nn.Linear(x.shape[1], 512), nn.ReLU(), nn.Linear(512, 2))
            values = (head.w1[n], head.b1[n], head.w2[n], head.b2[n])
            plain.load_state_dict(
                dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), values, strict=True))
            )
            assert torch.allclose(out[concept == n], plain(x[concept == n]), atol=1e-5)


def test_heads_start_like_linear_layers_whatever_the_pack() -> None:
    packed = DiscriminatorHeads([64, 6], ["ada", "bob"], seed=1)
    alone = DiscriminatorHeads([64, 6], ["bob"], seed=1)
    for ours, theirs in zip(packed.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours[1], theirs[0])
        assert not torch.equal(ours[0], ours[1])
    w1 = packed.heads[0].w1
    assert w1.abs().max() <= 1 / 8
    assert w1.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    other = DiscriminatorHeads([64, 6], ["bob"], seed=2)
    assert not torch.equal(other.heads[0].w1, alone.heads[0].w1)
