"""What a benchmark is made of: its measures, its search for the largest pack, its random base."""

from __future__ import annotations

import time
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from model.errors import InputError
from pipeline.bench import BenchSettings, _next_size, bench_train
from pipeline.bench_bases import MINI, bench_spec, build_frozen, random_pair
from pipeline.bench_measure import OutOfTime, Parts, count_flops, summary, within
from pipeline.bench_serve_parts import TOKEN, saved_base, served_base
from pipeline.bench_serve_ways import ways_of
from pipeline.cli.bench_serve import numbers_of
from serve.engine import Engine, PictureRequest

CPU = torch.device("cpu")


def tried(largest: int) -> list[int]:
    """The sizes that a series tries where packs up to `largest` fit."""
    fits, fails, sizes = 0, 257, []
    while (size := _next_size(fits, fails)) is not None:
        sizes.append(size)
        if size <= largest:
            fits = size
        else:
            fails = size
    assert fits == largest
    return sizes


def test_the_series_finds_the_largest_pack() -> None:
    assert tried(1) == [1, 2]
    assert tried(6) == [1, 2, 4, 8, 6, 7]
    assert tried(256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert tried(0) == [1]


def test_parts_count_each_call_once_and_leave_no_trace() -> None:
    class Engine:
        def step(self) -> str:
            return "stepped"

    room, engine, parts = types.ModuleType("room"), Engine(), Parts(CPU)
    room.outer = lambda: engine.step()  # type: ignore[attr-defined]
    outer = room.outer
    with parts.watching(
        [(room, "outer", "outside"), (engine, "step", "inside"), (room, "absent", "nowhere")]
    ):
        assert room.outer() == "stepped"
    assert set(parts.seconds) == {"outside", "inside"}
    assert room.outer is outer and "step" not in vars(engine)


def test_operations_are_counted_through_the_backward_pass() -> None:
    weight = torch.ones(5, 7, requires_grad=True)
    x = torch.ones(3, 5)
    assert count_flops(lambda: x @ weight) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (x @ weight).sum().backward()) == 2 * 2 * 3 * 5 * 7


def test_attention_is_counted_on_a_cpu_too() -> None:
    q = torch.randn(2, 4, 64, 16, requires_grad=True)
    product = 2 * 2 * 4 * 64 * 64 * 16
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * product
    both = count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert both == 2 * product + 5 * product


def test_a_summary_has_the_median_and_the_spread() -> None:
    assert summary([0.001, 0.004, 0.002]) == {"ms": 2.0, "ms_min": 1.0, "ms_max": 4.0}


def test_a_random_base_is_the_same_every_time() -> None:
    spec = bench_spec(MINI, None, "bf16")
    assert (spec.resolution, spec.train.precision, spec.loss.perceptual) == (64, "bf16", "swd")
    a, b = (build_frozen(MINI, spec, "float32", CPU) for _ in range(2))
    assert torch.equal(a.pair.teacher_kv, b.pair.teacher_kv)
    assert not torch.equal(a.pair.teacher_kv, a.pair.student_kv)
    assert a.identity is a.backbones[-1] and a.pair.latent_shape == (4, 8, 8)
    assert a.pair.teacher_schedule.prediction == "v_prediction"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (BenchSettings(device="tpu"), "tpu"),
        (BenchSettings(base="no-such-base", device="cpu"), "no-such-base"),
        (BenchSettings(precision="int4", device="cpu"), "int4"),
        (BenchSettings(sets=("views.bank=0",), device="cpu"), "bank must lie in"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    settings: BenchSettings, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        bench_train(settings, lambda event: None, lambda document: None)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("packs", ["0", "1,x", "300", ""])
def test_wrong_pack_sizes_are_refused(packs: str) -> None:
    words = ("sizes", "1,2,4")
    assert numbers_of("--packs", "1,2,16", *words) == (1, 2, 16)
    with pytest.raises(InputError, match="1,2,4"):
        numbers_of("--packs", packs, *words)


def test_what_takes_too_long_ends_and_no_library_can_take_it_for_its_own_error() -> None:
    def work() -> None:
        while True:
            try:
                time.sleep(10)
            except Exception:
                continue

    with pytest.raises(OutOfTime, match="longer than 0 s"), within(0.05):
        work()
    with within(0.05):
        pass
    time.sleep(0.1)


def test_a_way_of_running_leaves_the_networks_of_others_as_they_are() -> None:
    pair = random_pair(MINI, 64, 0, torch.float32, CPU)
    eager, last, compiled = ways_of(["eager", "graphs:channels_last:benchmark", "compile"], False)
    assert eager.pair(pair) is pair
    assert compiled.pair(pair) is pair  # on a CPU nothing is compiled, nor laid out for it
    assert last.benchmark and not compiled.benchmark
    turned = last.pair(pair)

    def innermost(network: torch.nn.Module) -> bool:
        weights = [each for each in network.parameters() if each.ndim == 4 and each.shape[2] > 1]
        return all(each.is_contiguous(memory_format=torch.channels_last) for each in weights)

    assert innermost(turned.student) and innermost(turned.vae)
    assert not innermost(pair.student) and not innermost(pair.vae)
    with last.on():
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
    for name in ("fast", "eager:fast"):
        with pytest.raises(InputError, match="'fast'"):
            ways_of([name], False)


def test_what_was_counted_is_compiled_all_the_same() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    product = torch.compile(lambda x: x @ x, dynamic=False, backend=backend)
    assert count_flops(lambda: product(torch.ones(4, 4))) == 2 * 4**3
    assert not compiled
    product(torch.ones(4, 4))
    assert len(compiled) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_random_base_draws_the_same_pictures(tmp_path: Path, dtype: torch.dtype) -> None:
    # So `--clients` measures over HTTP, in another process, what it measured in this one.
    made, saved = served_base(MINI, dtype, CPU), saved_base(MINI, dtype, CPU, tmp_path / "base")
    assert (saved.pair.name, saved.pair.resolution) == (MINI, made.pair.resolution)
    assert saved.student == tmp_path / "base" and saved.pair.dtype == dtype
    request = [PictureRequest(f"a photo of a {TOKEN} dog", 3)]
    mine, theirs = (Engine(base.pair).draw(request) for base in (made, saved))
    # Weights lie elsewhere in memory, and round-off with them: a step of colour now and then.
    assert abs(mine.astype(int) - theirs.astype(int)).max() <= (1 if dtype == torch.float32 else 2)
