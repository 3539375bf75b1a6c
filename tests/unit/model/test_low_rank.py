"""Low rank against float64, and the choice of the rank by pictures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapter import Adapter, load_adapter, trained_adapter, write_adapter
from model.adapter_meta import AdapterInfo
from model.base_pair import BasePair
from model.errors import InputError
from model.kv_layout import split
from model.low_rank import DOWN, UP, Decomposition, weight_error, whole
from model.rank_choice import TEACHER_STEPS, error_pictures, picture_error, with_rank
from model.sampler import draw, draw_teacher

INFO = AdapterInfo("my-dog", "dog", ("<new1>",))
BOUND = 0.5


@pytest.fixture(scope="module")
def trained(pair: BasePair) -> Adapter:
    """Deltas as training makes them: a few strong directions, and many weak ones."""
    gen = torch.Generator().manual_seed(3)

    def moved(weight: torch.Tensor) -> torch.Tensor:
        rank = 0.2 ** torch.arange(12).float()
        a = torch.randn(12, weight.shape[1], generator=gen)
        b = torch.randn(weight.shape[0], 12, generator=gen)
        return weight + 0.3 * (b * rank) @ a

    return trained_adapter(
        pair=pair,
        info=INFO,
        student_kv=moved(pair.student_kv),
        teacher_kv=moved(pair.teacher_kv),
        token_rows=torch.randn(1, 32, generator=gen),
    )


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_a_rank_is_the_nearest_matrix_in_float64(trained: Adapter, rank: int) -> None:
    parts = Decomposition.of(trained.kv_delta).at_rank(rank)
    near = whole(parts)
    off = size = 0.0
    for name, delta in trained.kv_delta.items():
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert (near[name] - exact).abs().max() < 2e-3 * s[0]  # the factors are fp16
        off += float(s[rank:].square().sum())
        size += float(s.square().sum())
    assert weight_error(trained.kv_delta, parts) == pytest.approx((off / size) ** 0.5, abs=5e-4)
    count = sum(part.numel() for part in parts.values())
    assert count == Decomposition.of(trained.kv_delta).numbers(rank)
    assert all(part.dtype == torch.float16 for part in parts.values())


def test_deltas_that_are_zero_have_no_error(pair: BasePair) -> None:
    none = {
        name: torch.zeros_like(w) for name, w in split(pair.student_layout, pair.student_kv).items()
    }
    parts = Decomposition.of(none).at_rank(1)
    assert weight_error(none, parts) == 0.0
    assert all(not delta.any() for delta in whole(parts).values())


def test_sizes_at_stable_diffusion_2_1_are_as_documented() -> None:
    """Its UNet has 5, 5 and 6 cross-attention layers of width 320, 640 and 1280 over text of 1024.

    The decompositions are given by their shapes alone.
    """
    factors = {}
    for width, layers in ((320, 5), (640, 5), (1280, 6)):
        for n in range(2 * layers):
            m = min(width, 1024)
            empty = (torch.empty(width, m, device="meta"), torch.empty(m, device="meta"))
            factors[f"{width}.{n}"] = (*empty, torch.empty(m, 1024, device="meta"))
    found = Decomposition(factors)
    rows = sum(u.shape[0] for u, _, _ in factors.values())
    assert (rows, rows * 1024 * 2) == (24960, 51_118_080)
    assert [found.numbers(r) * 2 for r in (8, 16, 32)] == [923_648, 1_847_296, 3_694_592]


def test_factors_that_do_not_fit_are_refused(trained: Adapter) -> None:
    parts = Decomposition.of(trained.kv_delta).at_rank(2)
    layer = next(iter(parts)).removesuffix(DOWN)
    for bad in (
        {name: part for name, part in parts.items() if name != layer + UP},
        {name: part for name, part in parts.items() if name != layer + DOWN},
        {**parts, layer + UP: parts[layer + UP][:, :1]},
        {**parts, f"{layer}.weight": trained.kv_delta[f"{layer}.weight"]},
    ):
        with pytest.raises(InputError, match="do not fit"):
            whole(bad)


def test_auto_takes_the_lowest_rank_that_keeps_the_bound(pair: BasePair, trained: Adapter) -> None:
    found = with_rank(pair, trained, "auto", BOUND)
    pictures = error_pictures(pair, trained)
    assert found.meta["rank"] > 1 and found.meta["teacher_rank"] > 1
    error = picture_error(pictures, error_pictures(pair, found))
    assert error == found.meta["rank_error"]["pictures"] <= BOUND
    assert weight_error(trained.kv_delta, found.kv_delta) == found.meta["rank_error"]["weights"] > 0
    lower = with_rank(pair, trained, found.meta["rank"] // 2, BOUND)
    assert lower.meta["rank_error"]["pictures"] > BOUND
    draws = partial(draw_teacher, steps=TEACHER_STEPS)
    teacher = (error_pictures(pair, adapter, draws) for adapter in (trained, found))
    assert picture_error(*teacher) == found.meta["teacher_rank_error"]["pictures"] <= BOUND
    assert torch.equal(found.token_rows, trained.token_rows)


def test_auto_stays_whole_where_no_rank_keeps_the_bound(pair: BasePair, trained: Adapter) -> None:
    gen = torch.Generator().manual_seed(4)
    noise = torch.randn(pair.student_kv.shape, generator=gen)
    wild = trained_adapter(
        pair=pair, info=INFO, student_kv=pair.student_kv + noise, token_rows=trained.token_rows
    )
    for found in (with_rank(pair, wild, "auto", 0.0), with_rank(pair, trained, "full", BOUND)):
        assert found.meta["rank"] is found.meta["rank_error"] is None
        assert set(found.kv_delta) == set(pair.student_layout.names)
    assert with_rank(pair, wild, 3, 0.0).meta["rank"] == 3  # a number is taken as it is


def test_picture_error_is_the_worst_pictures_mean_in_levels() -> None:
    one = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = one.clone()
    other[0, 0, 0, 0] = 48
    other[1, :] = 3
    assert picture_error(one, other) == 3.0
    assert picture_error(one[:1], other[:1]) == 1.0


def test_a_low_rank_adapter_travels(pair: BasePair, trained: Adapter, folder: Path) -> None:
    small = with_rank(pair, trained, 4, BOUND)
    sha256 = write_adapter(folder, small)
    data = (folder / "adapter.safetensors").read_bytes()
    assert sha256 == hashlib.sha256(data).hexdigest()
    loaded = load_adapter(folder, sha256)
    assert torch.equal(loaded.student_weight(pair), small.student_weight(pair))
    assert torch.equal(loaded.teacher_weight(pair), small.teacher_weight(pair))
    assert loaded.meta["rank"] == loaded.meta["teacher_rank"] == 4
    assert 0 < loaded.meta["rank_error"]["weights"] < 0.1
    assert "rank 4" in (folder / "README.md").read_text()
    whole_file = folder.parent / "whole"
    write_adapter(whole_file, trained)
    assert len(data) < 0.6 * (whole_file / "adapter.safetensors").stat().st_size
    prompt = "a photo of a <new1> dog"
    mine, exact = (draw(pair, [a], [prompt], [1])[0].float() for a in (loaded, trained))
    base = draw(pair, [replace(trained, kv_delta=zeros(trained))], [prompt], [1])[0].float()
    assert (mine - base).abs().mean() > 10 * (mine - exact).abs().mean()


def zeros(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(delta) for name, delta in adapter.kv_delta.items()}


def test_adapters_of_schema_version_1_load(pair: BasePair, trained: Adapter, folder: Path) -> None:
    """As the first release wrote them: no teacher_rank, a null rank, whole deltas."""
    write_adapter(folder, trained)
    path = folder / "adapter.json"
    meta = json.loads(path.read_text())
    meta["schema_version"] = 1
    del meta["teacher_rank"], meta["teacher_rank_error"]
    path.write_text(json.dumps(meta))
    loaded = load_adapter(folder, meta["sha256"])
    assert torch.equal(loaded.student_weight(pair), trained.student_weight(pair))
    assert torch.equal(loaded.teacher_weight(pair), trained.teacher_weight(pair))


def test_broken_factors_in_a_file_are_refused(
    pair: BasePair, trained: Adapter, folder: Path
) -> None:
    write_adapter(folder, with_rank(pair, trained, 2, BOUND))
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(UP))
    for bad, when in (
        ({n: t for n, t in tensors.items() if n != name}, "used"),
        ({**tensors, name: tensors[name].float()}, "loaded"),
        ({**tensors, name.replace("to_", "to_x"): tensors[name].clone()}, "loaded"),
    ):
        save_file(bad, path)
        meta = json.loads((folder / "adapter.json").read_text())
        meta["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "adapter.json").write_text(json.dumps(meta))
        with pytest.raises(InputError):
            adapter = load_adapter(folder)
            assert when == "used"
            adapter.student_weight(pair)
