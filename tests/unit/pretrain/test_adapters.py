"""Made-up concepts: adapters that the teacher learns, and lessons under them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from components.pretrain import networks
from components.pretrain.adapters import let_move, train_adapters
from components.pretrain.diffusion import guided, predict
from components.pretrain.latents import ADAPTED, LatentSet, Lessons, Noising
from components.pretrain.pair import Pair, shipped_pair
from components.pretrain.training import Clock, Stage
from components.pretrain.world import World


@pytest.fixture(scope="module")
def pair() -> Pair:
    return shipped_pair()


def test_movements_are_those_of_the_weights(pair: Pair) -> None:
    gen = torch.Generator().manual_seed(0)
    unet = networks.unet()
    unet.load_state_dict(pair.teacher.state_dict())
    z, text = torch.randn(2, 8, 16, 16, generator=gen), torch.randn(2, 32, 192, generator=gen)
    t = torch.tensor([5, 500])
    with torch.no_grad():
        plain = predict(unet, z, t, text, torch.float32)
        shapes = let_move(unet)
        moves = [torch.randn(2, *shape, generator=gen) * 0.05 for shape in shapes]
        still = [torch.zeros_like(move) for move in moves]
        assert torch.equal(predict(unet, z, t, text, torch.float32), plain)
        assert torch.allclose(predict(unet, z, t, text, torch.float32, still), plain, atol=1e-5)
        moved = predict(unet, z, t, text, torch.float32, moves)
        noising = Noising(networks.alphas_cumprod("cpu"))
        asked = guided(unet, noising, z, t, text, text[:1], torch.float32, 3.0, moves)
        for item in (0, 1):
            other = networks.unet()
            other.load_state_dict(pair.teacher.state_dict())
            layers = [m for name, m in other.named_modules() if name.endswith(".attn2")]
            linears = [linear for layer in layers for linear in (layer.to_k, layer.to_v)]
            for linear, move in zip(linears, moves, strict=True):
                linear.weight += move[item]
            only = slice(item, item + 1)
            at = z[only], t[only], text[only]
            expected = predict(other, *at, torch.float32)
            assert torch.allclose(moved[only], expected, atol=1e-4)
            assert not torch.allclose(moved[only], plain[only], atol=1e-2)
            by_hand = guided(other, noising, *at, text[:1], torch.float32, 3.0)
            assert torch.allclose(asked[only], by_hand, atol=1e-4)


def test_a_lesson_has_its_own_adapter_or_none() -> None:
    rows = torch.zeros(5, 1, 1, 1)
    data = LatentSet(rows, rows, torch.zeros(5, 1, 1), torch.zeros(1, 1, 1))
    adapters = [torch.arange(3.0).view(3, 1, 1)]  # row 0 moves nothing
    lessons = Lessons(data, adapters, torch.tensor([1, 2]))
    found = lessons.moves(torch.tensor([0, 2, 3, 4]))
    assert found is not None and found[0].flatten().tolist() == [0, 0, 1, 2]
    half = lessons.moves(torch.tensor([4, 3]), torch.tensor([0.5, 2.0]))
    assert half is not None and half[0].flatten().tolist() == [1, 2]
    drawn = lessons.draw(4000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(5))
    assert abs((drawn >= 3).float().mean() - ADAPTED) < 0.05
    plain = Lessons(data)
    assert plain.moves(drawn) is None
    assert set(plain.draw(100, torch.Generator().manual_seed(0)).tolist()) == set(range(5))


def test_the_teacher_learns_made_up_concepts(
    tmp_path: Path, world: World, world_folder: Path, pair: Pair
) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(world_folder / "tokenizer")

    def learned(steps: int) -> tuple[LatentSet, list[torch.Tensor], torch.Tensor]:
        stage = Stage("adapters", tmp_path, steps, Clock(1e9))
        parts = pair.teacher, pair.vae, pair.text_encoder
        return train_adapters(stage, world, *parts, tokenizer, torch.float32, 2, 3, batch=4)

    data, moves, which = learned(2)
    assert len(data) == 6 and which.tolist() == [1, 1, 1, 2, 2, 2]
    assert all(move.shape[0] == 3 and not move[0].any() for move in moves)
    assert all(move[1].any() and not torch.equal(move[1], move[2]) for move in moves)
    # Once more from its state: nothing is left to learn.
    again = learned(2)
    assert all(torch.equal(a, b) for a, b in zip(moves, again[1], strict=True))
    assert torch.equal(data.text, again[0].text) and torch.equal(data.latents, again[0].latents)
    texts = data.text.unflatten(0, (2, 3))
    assert not torch.allclose(texts[0, 0], texts[1, 0], atol=1e-2)
