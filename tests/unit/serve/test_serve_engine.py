from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from model.adapter import Adapter, load_adapter
from model.base_pair import BasePair, load_base_pair
from model.errors import InputError
from model.low_rank import Decomposition
from model.sampler import draw
from serve.engine import COMPILED_SIZES, DrawError, Engine, PictureRequest
from serve.fast import Speed, quicken
from serve.replica import sizes_to_prepare
from serve.settings import load_settings
from tests.tiny import build_tiny_pair
from tests.unit.serve.world import write_adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_pair: BasePair) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    shapes = [("dog-a", "dog", ("<new1>",)), ("dog-b", "dog", ("<new1>",))]
    shapes.append(("cat", "cat", ("<a>", "<b>")))
    for seed, (concept, noun, tokens) in enumerate(shapes):
        write_adapter(folder / concept, tiny_pair, concept, seed, noun=noun, tokens=tokens)
    return [load_adapter(folder / concept) for concept, _, _ in shapes]


def mixture(adapters: list[Adapter]) -> list[PictureRequest]:
    dog_a, dog_b, cat = adapters
    return [
        PictureRequest("a photo of <new1> dog", 1, 1, dog_a),
        PictureRequest("a photo of <new1> dog", 1, 2, dog_b),
        PictureRequest("a photo of <a> <b> cat", 7, 4, cat),
        PictureRequest("a photo of a dog", 1, 1, None),
        PictureRequest("the <new1> dog on the beach", 2, 4, dog_a),
        PictureRequest("a photo of <new1> dog", 1, 1, dog_b),
    ]


def off(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_mixed_batch_draws_what_each_request_draws_alone(
    tiny_pair: BasePair, adapters: list[Adapter]
) -> None:
    requests = mixture(adapters)
    together = Engine(tiny_pair).draw(requests)
    assert together.shape == (len(requests), 32, 32, 3) and together.dtype == np.uint8
    for request, picture in zip(requests, together, strict=True):
        assert off(Engine(tiny_pair).draw([request])[0], picture) <= 1


def test_engine_draws_the_same_as_the_sampler_of_the_model(
    tiny_pair: BasePair, adapters: list[Adapter]
) -> None:
    for request in mixture(adapters):
        expected = draw(
            tiny_pair, [request.adapter], [request.prompt], [request.seed], request.steps
        )
        picture = Engine(tiny_pair).draw([request])[0]
        assert np.array_equal(picture, expected[0].permute(1, 2, 0).numpy())


def test_every_part_of_a_request_counts(tiny_pair: BasePair, adapters: list[Adapter]) -> None:
    dog_a, dog_b, _ = adapters
    prompt = "a photo of <new1> dog"
    pictures = Engine(tiny_pair).draw(
        [
            PictureRequest(prompt, 1, 1, dog_a),
            PictureRequest(prompt, 1, 1, dog_b),
            PictureRequest(prompt, 2, 1, dog_a),
            PictureRequest(prompt, 1, 2, dog_a),
            PictureRequest("the red <new1> dog", 1, 1, dog_a),
            PictureRequest(prompt, 1, 1, None),
        ]
    )
    for i in range(len(pictures)):
        for j in range(i):
            assert off(pictures[i], pictures[j]) > 1


def test_versions_of_one_concept_are_never_mixed_up(tmp_path: Path, tiny_pair: BasePair) -> None:
    versions = []
    for seed in range(3):
        write_adapter(tmp_path / str(seed), tiny_pair, "rex", seed)
        versions.append(load_adapter(tmp_path / str(seed)))
    requests = [PictureRequest("a photo of <new1> dog", 1, 1, version) for version in versions * 2]
    engine = Engine(tiny_pair)
    pictures = engine.draw(requests)
    assert engine.keys_values_misses == 3
    for request, picture in zip(requests, pictures, strict=True):
        assert off(Engine(tiny_pair).draw([request])[0], picture) <= 1
    assert off(pictures[0], pictures[1]) > 1 and off(pictures[1], pictures[2]) > 1


def test_order_of_a_batch_does_not_matter(tiny_pair: BasePair, adapters: list[Adapter]) -> None:
    requests = mixture(adapters)
    forward = Engine(tiny_pair).draw(requests)
    backward = Engine(tiny_pair).draw(requests[::-1])[::-1]
    assert off(forward, backward) <= 1


def test_within_a_padded_size_a_picture_is_the_same_to_the_last_bit(
    tiny_pair: BasePair, adapters: list[Adapter]
) -> None:
    """Whatever else is in the batch, and wherever in it the request is."""
    dog_a, dog_b, cat = adapters
    mine = PictureRequest("a photo of <new1> dog", 1, 1, dog_a)
    others = [
        PictureRequest("the <new1> dog on the beach", seed, 1, dog_b) for seed in range(3)
    ] + [PictureRequest("a photo of <a> <b> cat", 9, 2, cat), PictureRequest("a cat", 8, 2)]
    engine = Engine(tiny_pair, batch_sizes=(2, 4))
    batches = [
        [mine, *others[:2]],  # padded to four
        [*others[:2], mine],
        [*others[:3], mine],  # full
        [mine, mine, mine, mine],
        [others[3], others[0], others[4], mine, others[1]],  # among others of another step count
    ]
    drawn = [engine.draw(batch)[batch.index(mine)] for batch in batches]
    assert all(np.array_equal(picture, drawn[0]) for picture in drawn)
    # A size of its own may change round-off, by a level at most.
    assert off(engine.draw([mine])[0], drawn[0]) <= 1


def test_forwards_are_of_one_step_count_and_a_padded_size(tiny_pair: BasePair) -> None:
    engine = Engine(tiny_pair, batch_sizes=(4, 2))
    assert engine.forwards([1]) == [([0], 2)]
    assert engine.forwards([1, 4, 1, 1, 4]) == [([0, 2, 3], 4), ([1, 4], 2)]
    assert engine.forwards([1] * 5) == [([0, 1, 2, 3], 4), ([4], 2)]
    on_cpu = [size for _, size in Engine(tiny_pair).forwards([1] * 19)]
    assert on_cpu == [8, 8, 4]


def test_warming_draws_a_batch_of_every_size(tiny_pair: BasePair) -> None:
    engine, seen = Engine(tiny_pair, batch_sizes=(1, 2, 4)), []
    watch = tiny_pair.student.register_forward_pre_hook(
        lambda _, states: seen.append(len(states[0]))
    )
    engine.warm()
    watch.remove()
    assert seen == [1, 2, 4]


@pytest.mark.parametrize(
    ("speed", "max_batch", "given", "device", "sizes"),
    [
        ("eager", 8, "", "cuda", None),
        ("compile", 8, "1,8", "cpu", None),
        ("compile", 1, "", "cuda", (1,)),
        ("compile", 9, "", "cuda", (1, 2, 4, 8, 16)),
        ("compile", 256, "", "cuda", COMPILED_SIZES),
        ("compile", 32, "32,1,8,8", "cuda", (1, 8, 32)),
        ("graphs", 8, "", "cuda", (1, 2, 4, 5, 6, 8)),
    ],
)
def test_sizes_that_a_replica_prepares(
    speed: Speed, max_batch: int, given: str, device: str, sizes: tuple[int, ...] | None
) -> None:
    settings = load_settings(speed=speed, max_batch=max_batch, max_n=1, batch_sizes=given)
    assert sizes_to_prepare(settings, device) == sizes


def test_where_there_is_no_gpu_a_fast_pair_draws_the_same(
    tmp_path: Path, tiny_pair: BasePair, adapters: list[Adapter]
) -> None:
    requests = mixture(adapters)
    for speed in get_args(Speed):
        student = build_tiny_pair(tmp_path / speed).student
        pair = load_base_pair(student, student, name="tiny")
        fast = quicken(pair, speed, channels_last=True)
        assert off(Engine(fast).draw(requests), Engine(tiny_pair).draw(requests)) <= 1


def test_keys_and_values_are_kept_per_adapter_and_prompt(
    tiny_pair: BasePair, adapters: list[Adapter]
) -> None:
    engine = Engine(tiny_pair)
    requests = mixture(adapters)
    first = engine.draw(requests)
    # dog_b's two requests differ in steps only, which keys and values do not depend on.
    assert (engine.keys_values_misses, engine.keys_values_hits) == (5, 1)
    second = engine.draw(requests)
    assert (engine.keys_values_misses, engine.keys_values_hits) == (5, 7)
    assert np.array_equal(first, second)


def test_no_room_for_keys_and_values_changes_no_picture(
    tiny_pair: BasePair, adapters: list[Adapter]
) -> None:
    requests = mixture(adapters)
    engine = Engine(tiny_pair, keys_values_bytes=0)
    assert np.array_equal(engine.draw(requests), Engine(tiny_pair).draw(requests))
    engine.draw(requests)
    assert engine.keys_values_misses == 10  # nothing was kept for the second time


def test_base_is_never_changed_by_drawing(tiny_pair: BasePair, adapters: list[Adapter]) -> None:
    networks = (tiny_pair.student, tiny_pair.vae, tiny_pair.text_encoder)
    before = [tensor.clone() for net in networks for tensor in net.state_dict().values()]
    Engine(tiny_pair).draw(mixture(adapters))
    after = [tensor for net in networks for tensor in net.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_prove_draws_only_when_the_last_picture_is_old(tiny_pair: BasePair) -> None:
    now = 100.0
    engine = Engine(tiny_pair, clock=lambda: now)
    assert engine.prove(10.0) == 0.0
    misses = engine.keys_values_misses + engine.keys_values_hits
    now = 104.0
    assert engine.prove(10.0) == 4.0
    assert engine.keys_values_misses + engine.keys_values_hits == misses
    now = 111.0
    assert engine.prove(10.0) == 0.0
    assert engine.keys_values_misses + engine.keys_values_hits == misses + 1


def test_prove_notices_a_base_that_changed(tmp_path: Path) -> None:
    student = build_tiny_pair(tmp_path).student
    pair = load_base_pair(student, student, name="tiny")
    engine = Engine(pair)
    engine.prove()
    assert engine.prove() == 0.0
    with torch.no_grad():
        pair.vae.decoder.conv_out.bias.add_(0.3)
    with pytest.raises(DrawError, match="proof picture"):
        engine.prove()


def test_values_that_are_not_finite_are_no_picture(tmp_path: Path) -> None:
    student = build_tiny_pair(tmp_path).student
    pair = load_base_pair(student, student, name="tiny")
    with torch.no_grad():
        pair.student.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DrawError, match="not finite"):
        Engine(pair).draw([PictureRequest("a photo of a dog", 0)])


def test_check_refuses_adapters_that_would_spoil_a_batch(
    tmp_path: Path, tiny_pair: BasePair, adapters: list[Adapter]
) -> None:
    engine = Engine(tiny_pair)
    good = adapters[0]
    engine.check(good)
    factors = Decomposition.of(good.kv_delta).at_rank(2)
    engine.check(replace(good, kv_delta=factors))
    name, delta = next(iter(good.kv_delta.items()))
    wrong = [
        replace(good, kv_delta={**good.kv_delta, name: torch.full_like(delta, torch.inf)}),
        replace(good, kv_delta={k: v for k, v in good.kv_delta.items() if k != name}),
        replace(good, kv_delta=dict(list(factors.items())[1:])),
        replace(good, kv_delta={k: v[:, :-1] for k, v in good.kv_delta.items()}),
        replace(good, token_rows=good.token_rows * torch.nan),
        replace(good, token_rows=good.token_rows[:, :-1]),
    ]
    for adapter in wrong:
        with pytest.raises(InputError):
            engine.check(adapter)
    other = build_tiny_pair(tmp_path, seed=5).student
    with pytest.raises(InputError, match="made for base"):
        Engine(load_base_pair(other, other, name="other")).check(good)
