"""Echo rounds, identity features and metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPModel

from model.batch import ConceptData
from model.discriminators import Features
from model.echo import CONTEXTS, echo_round
from model.errors import InputError
from model.identity import identity_features, load_image_projection
from model.iteration import Frozen
from model.metrics import clip_i, clip_t, dino, load_clip_text, mean_cosine, without_token
from model.randomness import generator, normal
from model.sampler import sample_student, to_uint8
from model.settings import EchoSettings
from model.text import tokenize
from model.views import TEMPLATES, square
from tests.tiny import TinyPaths
from tests.unit.model.packs import trained

SETTINGS = EchoSettings(samples=10)


def test_a_round_keeps_the_upper_half(frozen: Frozen, concepts: tuple[ConceptData, ...]) -> None:
    own = trained(frozen, concepts)
    rounds = echo_round(frozen, own.teacher, own.student, concepts, SETTINGS, seed=1, iteration=9)
    for concept, result in zip(concepts, rounds, strict=True):
        assert len(result.drawn) == len(result.similarities) == 10 and len(result.kept) == 5
        order = sorted(range(10), key=lambda i: -result.similarities[i])
        for kept, i in zip(result.kept, order, strict=False):
            assert kept is result.drawn[i]
        assert all(s.image.shape == (3, 32, 32) for s in result.drawn)
        phrase = concept.text.phrase
        for i, sample in enumerate(result.drawn):
            choices = CONTEXTS if i % 2 else TEMPLATES
            assert sample.prompt in {choice.format(phrase) for choice in choices}


def test_similarity_is_the_mean_cosine_to_the_references(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    own = trained(frozen, concepts[:1])
    (result,) = echo_round(
        frozen, own.teacher, own.student, concepts[:1], SETTINGS, seed=1, iteration=9
    )
    references = [
        frozen.identity.projected(square(image, 32)[None].float() / 127.5 - 1)
        for image in concepts[0].images
    ]
    for sample, similarity in zip(result.drawn, result.similarities, strict=True):
        feature = frozen.identity.projected(sample.image[None].float() / 127.5 - 1)
        cosines = [float(F.cosine_similarity(feature, other)) for other in references]
        assert similarity == pytest.approx(sum(cosines) / 3, abs=1e-5)


def test_samples_are_the_same_alone_and_in_a_pack_and_differ_by_round(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    def rounds(pack: tuple[ConceptData, ...], iteration: int = 9) -> list[torch.Tensor]:
        own = trained(frozen, pack)
        made = echo_round(
            frozen, own.teacher, own.student, pack, SETTINGS, seed=1, iteration=iteration
        )
        return [torch.stack([s.image for s in result.drawn]).int() for result in made]

    packed, alone = rounds(concepts)[1], rounds(concepts[1:2])[0]
    assert (packed - alone).abs().max() <= 1
    assert (rounds(concepts[1:2], iteration=10)[0] - alone).abs().max() > 10


def test_samples_are_drawn_in_as_many_steps_as_asked(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    own, (concept,) = trained(frozen, concepts[:1]), concepts[:1]
    settings = EchoSettings(samples=2, steps=3)
    (result,) = echo_round(
        frozen, own.teacher, own.student, [concept], settings, seed=1, iteration=9
    )
    prompts = tokenize(
        frozen.pair.tokenizer, [s.prompt for s in result.drawn], [concept.text.token]
    )
    place = torch.zeros(2, dtype=torch.long)
    text_states, _ = own.teacher(frozen.pair.text_encoder, prompts, place)
    kv = own.student(frozen.pair.text_encoder, prompts, place, text_states)
    shape = frozen.pair.latent_shape
    noise = [normal(shape, generator(1, concept.id, 9, "echo-noise", i)) for i in range(2)]
    drawn = torch.stack([sample.image for sample in result.drawn]).int()
    for steps, alike in ((3, True), (1, False)):
        pictures = to_uint8(sample_student(frozen.pair, kv, torch.stack(noise), steps)).int()
        assert (int((pictures - drawn).abs().max()) <= 1) is alike


def test_keeping_rounds_and_never_to_nothing(
    frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    own = trained(frozen, concepts[:1])
    for keep, count in ((0.0, 1), (0.25, 1), (1.0, 4)):
        settings = EchoSettings(samples=4, keep=keep)
        (result,) = echo_round(
            frozen, own.teacher, own.student, concepts[:1], settings, seed=1, iteration=9
        )
        assert len(result.kept) == count


def test_image_projection_by_hand(tmp_path: Path) -> None:
    gen = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3 * 5, 6, generator=gen), torch.randn(15, generator=gen)
    scale, shift = torch.randn(5, generator=gen), torch.randn(5, generator=gen)
    names = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    tensors = dict(zip(names, (weight, bias, scale, shift), strict=True))
    save_file({f"image_proj.{n}": t for n, t in tensors.items()}, tmp_path / "ip.safetensors")
    projection = load_image_projection(tmp_path / "ip.safetensors")
    x = torch.randn(2, 6, generator=gen)
    tokens = projection(x)
    assert tokens.shape == (2, 3, 5)
    for r in range(2):
        for k in range(3):
            v = (weight[5 * k : 5 * k + 5] @ x[r] + bias[5 * k : 5 * k + 5]).double()
            v = (v - v.mean()) / ((v - v.mean()).pow(2).mean() + 1e-5).sqrt()
            assert torch.allclose(tokens[r, k].double(), v * scale + shift, atol=1e-4)
    features = Features(torch.zeros(2, 4), x, ())
    assert torch.equal(identity_features(features, projection), tokens)
    assert torch.equal(identity_features(features, None), x)
    pooled_only = Features(torch.ones(2, 4), None, ())
    assert torch.equal(identity_features(pooled_only, None), torch.ones(2, 4))
    save_file({"image_proj.proj.weight": weight}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=r"lacks 'image_proj\.proj\.bias'"):
        load_image_projection(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        load_image_projection(tmp_path / "none.safetensors")


def test_metrics_by_hand() -> None:
    generated = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    references = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    half = 0.5**0.5
    wanted = pytest.approx([(1 + half) / 2, half / 2])
    for metric in (mean_cosine, clip_i, dino):
        assert metric(generated, references).tolist() == wanted
    assert clip_t(generated, references).tolist() == pytest.approx([1.0, half])
    assert without_token("a <new1> dog in the <new1> snow", ["<new1>"]) == "a dog in the snow"


def test_text_features_are_the_models(tiny: TinyPaths) -> None:
    text = load_clip_text(tiny.clip)
    texts = ["a dog", "the red robot on the beach"]
    whole = CLIPModel.from_pretrained(tiny.clip).eval()
    ids = text.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = whole.text_projection(whole.text_model(ids).pooler_output)
    assert torch.allclose(text(texts), expected, atol=1e-5)
    assert not text(texts).requires_grad
    with pytest.raises(InputError):
        load_clip_text(tiny.dino)
