"""Eight bits a weight: names, types and errors of the round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.pretrain.export import mean_of
from model.errors import InputError
from model.pocket.storage import SCALE, SMALLEST, pack, unpack
from tests.unit.pretrain.conftest import POCKET


def matrix(rows: int, columns: int, *more: int) -> Tensor:
    return torch.randn(rows, columns, *more, generator=torch.Generator().manual_seed(rows))


def assert_within_half_a_step(weight: Tensor) -> None:
    """Half a step of the row's scale, and fp16's own rounding of the result."""
    back = unpack(pack({"w": weight}))["w"].float()
    step = (weight.flatten(1).abs().amax(1) / 127).clamp(min=6e-8)[:, None]
    error = (back - weight).flatten(1).abs()
    assert (error <= 0.5 * step * 1.002 + weight.flatten(1).abs() * 2**-11 + 3e-8).all()


@pytest.mark.parametrize("shape", [(64, 32), (32, 16, 3, 3), (6144, 4), (2, 600)])
def test_error_is_half_a_step_at_most(shape: tuple[int, ...]) -> None:
    assert_within_half_a_step(matrix(*shape))


def test_rows_have_scales_of_their_own() -> None:
    weight = matrix(8, 256) * torch.tensor([3e-3, 1e-2, 0.1, 1, 10, 100, 1e3, 1e4])[:, None]
    assert_within_half_a_step(weight)
    stored = pack({"w": weight})
    assert stored["w"].dtype == torch.int8 and stored["w" + SCALE].shape == (8,)
    assert stored["w"].abs().amax(1).tolist() == [127] * 8  # every row uses its whole range


def test_rows_too_small_for_their_scale_are_not_lost() -> None:
    """Their scale is a subnormal fp16 number: a few steps of error, never noughts or infinities."""
    weight = matrix(2, 1024) * torch.tensor([1e-4, 3e-6])[:, None]
    back = unpack(pack({"w": weight}))["w"].float()
    error, largest = (back - weight).abs().amax(1), weight.abs().amax(1)
    assert error[0] < 0.02 * largest[0] and error[1] < 0.4 * largest[1]


def test_the_shipped_rows_are_not_that_small() -> None:
    for path in (POCKET / "weights").iterdir():
        scales = [v.float() for k, v in load_file(path).items() if k.endswith(SCALE)]
        assert torch.cat(scales).min() > 127**-1 * 0.008


def test_rows_of_zeros_stay_zero() -> None:
    weight = matrix(4, 512)
    weight[2] = 0
    back = unpack(pack({"w": weight}))["w"]
    assert back[2].abs().sum() == 0 and torch.isfinite(back).all()


def test_the_largest_weight_of_a_row_survives() -> None:
    weight = torch.zeros(2, 1024)
    weight[0, 5], weight[1, 6] = -3.0, 0.1
    back = unpack(pack({"w": weight}))["w"].float()
    assert back[0, 5] == pytest.approx(-3, rel=1e-3)
    assert back[1, 6] == pytest.approx(0.1, rel=1e-3)


def test_names_and_types_come_back() -> None:
    state = {
        "layer.weight": matrix(64, 64),
        "layer.bias": torch.arange(2048.0) / 7,  # a vector, however long
        "small.weight": matrix(8, 8),
        "position_ids": torch.arange(32)[None],
        "mask": torch.tensor([True, False]),
    }
    assert 8 * 8 < SMALLEST <= 64 * 64
    back = unpack(pack(state))
    assert back.keys() == state.keys()
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    for name in ("layer.bias", "small.weight"):
        assert torch.equal(back[name], state[name].half())
    for name in ("position_ids", "mask"):
        assert torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype
    assert back["layer.weight"].dtype == torch.float16


def test_bfloat16_and_views_can_be_packed() -> None:
    weight = matrix(64, 64).to(torch.bfloat16)
    assert_within_half_a_step(weight.float())
    assert torch.equal(unpack(pack({"w": weight}))["w"], unpack(pack({"w": weight.float()}))["w"])
    assert pack({"w": weight.T})["w"].is_contiguous()


def test_the_mean_of_packed_networks(tmp_path: Path) -> None:
    first, second = ({"w": matrix(rows, 64), "b": torch.ones(3)} for rows in (32, 33))
    second["w"] = second["w"][:32]
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, state in zip(paths, (first, second), strict=True):
        save_file(pack(state), path)
    mean = unpack(mean_of(paths))
    step = first["w"].abs().amax(1, keepdim=True).maximum(second["w"].abs().amax(1, keepdim=True))
    # A half of what each file has lost, and what the mean's own steps lose.
    assert ((mean["w"].float() - (first["w"] + second["w"]) / 2).abs() <= step / 127 * 1.01).all()
    assert (mean["b"] == 1).all()
    save_file(pack({"w": first["w"]}), paths[1])
    with pytest.raises(InputError, match=r"b\.safetensors is not of the same network"):
        mean_of(paths)
    paths[1].write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"b\.safetensors cannot be read"):
        mean_of(paths)
