"""Pictures against diffusers' own pipelines, and what a picture may depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from model.adapter import Adapter, load_adapter, save_adapter
from model.adapter_meta import AdapterInfo
from model.base_pair import BasePair
from model.errors import InputError
from model.kv_layout import split
from model.sampler import (
    draw,
    draw_teacher,
    picture_noise,
    sample_student,
    student_keys_values,
    to_uint8,
)
from tests.tiny import TinyPaths

PROMPTS = ["a photo of a dog", "the red robot on the beach"]


def make_adapter(pair: BasePair, folder: Path, seed: int, token: str = "<new1>") -> Adapter:
    gen = torch.Generator().manual_seed(seed)

    def moved(weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.3 * torch.randn(weight.shape, generator=gen)

    save_adapter(
        folder,
        pair=pair,
        info=AdapterInfo("tiny-dog", "dog", (token,)),
        student_kv=moved(pair.student_kv),
        token_rows=torch.randn(1, 32, generator=gen),
        teacher_kv=moved(pair.teacher_kv),
    )
    return load_adapter(folder)


@pytest.fixture(scope="module")
def adapters(pair: BasePair, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    root = tmp_path_factory.mktemp("adapters")
    tokens = ("<new1>", "<other>")
    return [make_adapter(pair, root / str(n), n, token) for n, token in enumerate(tokens)]


def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: StableDiffusionPipeline, noise: torch.Tensor, **options: object) -> torch.Tensor:
    """A pipeline's pictures as tensors in [-1, 1]."""
    out = pipe(latents=noise, output_type="pt", **options).images
    return out * 2 - 1


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("which", ["tiny", "tiny_swapped"])
def test_student_equals_diffusers_euler(
    request: pytest.FixtureRequest, which: str, steps: int
) -> None:
    """Epsilon student in `tiny`, v student in `tiny_swapped`."""
    paths: TinyPaths = request.getfixturevalue(which)
    pair = request.getfixturevalue("pair" if which == "tiny" else "swapped_pair")
    noise = picture_noise(pair, [1, 2])
    expected = run(
        pipeline(paths.student),
        noise,
        prompt=PROMPTS,
        num_inference_steps=steps,
        guidance_scale=0.0,
    )
    kv = student_keys_values(pair, [None, None], PROMPTS)
    mine = sample_student(pair, kv, noise, steps)
    assert (mine - expected).abs().max() < 2e-3
    assert mine.std() > 0.1


def test_only_rows_of_one_step_take_their_noise_by_the_bases_scale(pair: BasePair) -> None:
    scaled = replace(pair, student_schedule=replace(pair.student_schedule, noise_scale=0.5))
    noise = picture_noise(pair, [1, 2])
    kv = student_keys_values(pair, [None, None], PROMPTS)
    one, four = sample_student(pair, kv, 0.5 * noise, 1)[0], sample_student(pair, kv, noise, 4)[1]
    mixed = sample_student(scaled, kv, noise, [1, 4])
    assert torch.allclose(mixed[0], one, atol=1e-5) and torch.allclose(mixed[1], four, atol=1e-5)
    assert not torch.allclose(mixed[0], sample_student(pair, kv, noise, 1)[0], atol=1e-2)


@pytest.mark.parametrize("which", ["tiny", "tiny_swapped"])
def test_teacher_equals_diffusers_ddim_with_guidance(
    request: pytest.FixtureRequest, which: str
) -> None:
    paths: TinyPaths = request.getfixturevalue(which)
    pair = request.getfixturevalue("pair" if which == "tiny" else "swapped_pair")
    noise = picture_noise(pair, [1, 2])
    expected = run(
        pipeline(paths.teacher), noise, prompt=PROMPTS, num_inference_steps=25, guidance_scale=7.5
    )
    mine = draw_teacher(pair, [None, None], PROMPTS, [1, 2]).float()
    assert (mine - to_uint8(expected).float()).abs().max() <= 2


def test_an_adapter_draws_what_plain_diffusers_draws_with_its_weights(
    tiny: TinyPaths, pair: BasePair, adapters: list[Adapter]
) -> None:
    pipe = pipeline(tiny.student)
    adapter = adapters[0]
    pipe.unet.load_state_dict(
        split(pair.student_layout, adapter.student_weight(pair)), strict=False
    )
    pipe.tokenizer.add_tokens(["<new1>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    pipe.text_encoder.get_input_embeddings().weight.data[-1] = adapter.token_rows[0]
    prompt = "a photo of a <new1> dog"
    noise = picture_noise(pair, [7])
    expected = run(pipe, noise, prompt=prompt, num_inference_steps=1, guidance_scale=0.0)
    mine = draw(pair, [adapter], [prompt], [7]).float()
    assert (mine - to_uint8(expected).float()).abs().max() <= 1
    base = draw(pair, [None], ["a photo of a dog"], [7]).float()
    assert (mine - base).abs().mean() > 1


def test_a_picture_does_not_depend_on_its_batch(pair: BasePair, adapters: list[Adapter]) -> None:
    first, second = adapters
    rows: list[tuple[Adapter | None, str, int]] = [
        (first, "a <new1> dog", 1),
        (None, "a dog", 2),
        (second, "the <other> dog on the beach", 3),
        (first, "a <new1> dog on the beach", 1),
    ]
    together = draw(pair, *(list(column) for column in zip(*rows, strict=True)))
    for r, (adapter, prompt, seed) in enumerate(rows):
        alone = draw(pair, [adapter], [prompt], [seed])[0]
        assert (together[r].int() - alone.int()).abs().max() <= 1
    assert together.shape == (4, 3, 32, 32) and together.dtype == torch.uint8


def test_rows_may_have_their_own_numbers_of_steps(pair: BasePair) -> None:
    counts = [4, 1, 2, 1]
    together = draw(pair, [None] * 4, ["a dog"] * 4, [1, 2, 3, 4], counts)
    for r, count in enumerate(counts):
        alone = draw(pair, [None], ["a dog"], [r + 1], count)[0]
        assert (together[r].int() - alone.int()).abs().max() <= 1
    one = draw(pair, [None], ["a dog"], [1], 1)[0]
    assert (together[0].int() - one.int()).abs().max() > 1


def test_a_token_means_nothing_without_its_adapter(pair: BasePair, adapters: list[Adapter]) -> None:
    """Another concept's token string is ordinary text, never that concept's row."""
    first, second = adapters
    kv = student_keys_values(pair, [second, second], ["a <new1> dog", "a <other> dog"])
    swapped = student_keys_values(pair, [second, first], ["a <new1> dog", "a <new1> dog"])
    assert torch.allclose(kv[0], swapped[0], atol=1e-5)
    assert not torch.allclose(kv[0], kv[1], atol=1e-2)
    assert not torch.allclose(swapped[0], swapped[1], atol=1e-2)


def test_seeds_and_prompts_decide_the_picture(pair: BasePair) -> None:
    one, again, other = draw(pair, [None] * 3, ["a dog"] * 3, [1, 1, 2])
    assert (one.int() - again.int()).abs().max() <= 1
    assert (one.int() - other.int()).abs().float().mean() > 5
    assert torch.equal(picture_noise(pair, [5])[0], picture_noise(pair, [4, 5])[1])


def test_guidance_one_leaves_the_empty_prompt_out(pair: BasePair) -> None:
    plain = draw_teacher(pair, [None], ["a dog"], [1], steps=3, guidance=1)
    guided = draw_teacher(pair, [None], ["a dog"], [1], steps=3, guidance=9)
    near = draw_teacher(pair, [None], ["a dog"], [1], steps=3, guidance=1.0001)
    assert (plain.int() - near.int()).abs().max() <= 1
    assert (plain.int() - guided.int()).abs().max() > 1


def test_the_adapted_teacher_draws_otherwise(pair: BasePair, adapters: list[Adapter]) -> None:
    adapted = draw_teacher(pair, [adapters[0]], ["a <new1> dog"], [1], steps=3)
    base = draw_teacher(pair, [None], ["a dog"], [1], steps=3)
    assert (adapted.int() - base.int()).abs().float().mean() > 1


def test_uint8_is_diffusers_rounding() -> None:
    values = torch.tensor([-1.2, -1.0, 0.0, 0.5, 1.0, 3.0])
    expected = ((values / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(to_uint8(values), expected)


def test_steps_are_checked(pair: BasePair) -> None:
    with pytest.raises(InputError, match="steps"):
        draw(pair, [None], ["a dog"], [1], steps=0)
