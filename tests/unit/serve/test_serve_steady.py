"""Convolutions that do not depend on the place: on a CPU, with a made-up kernel that does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from serve import steady as module
from serve.steady import SteadyConv2d, patches, rows, steady, ways_taken, whole

LAYERS = [
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(0, 2)),
    nn.Conv2d(3, 5, 1),
]
OTHERS = [
    nn.Conv2d(4, 4, 3, padding=1, groups=2),
    nn.Conv2d(4, 4, 3, dilation=2),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 4, 3, padding="same"),
]
PLAIN = module.whole


def moody(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A kernel whose values depend on the row's place."""
    places = torch.arange(x.shape[0], device=x.device, dtype=x.dtype)
    return PLAIN(layer, x) + 1e-5 * places[:, None, None, None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, stride=2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_way_is_the_convolution(layer: nn.Conv2d, layout: torch.memory_format) -> None:
    layer = copy.deepcopy(layer).double().to(memory_format=layout)
    x = torch.randn(4, 3, 9, 8, dtype=torch.float64).to(memory_format=layout)
    expected = whole(layer, x)
    for way in (patches, rows):
        found = way(layer, x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert found.is_contiguous(memory_format=layout)


def test_a_steady_kernel_is_kept() -> None:
    plain, changed, x = network(), network(), torch.randn(4, 3, 9, 8)
    steady(changed)
    assert torch.equal(changed(x), plain(x))
    assert torch.equal(changed(x[:2]), plain(x[:2]))
    assert ways_taken(changed) == {"whole": 4}


def test_weights_stay_what_they_were_and_twice_is_once() -> None:
    changed, x = network(), torch.randn(4, 3, 9, 8)
    weights = [each.data_ptr() for each in changed.parameters()]
    steady(changed)
    changed(x)
    steady(changed)
    assert [type(each) for each in changed] == [SteadyConv2d, nn.SiLU, SteadyConv2d]
    assert [each.data_ptr() for each in changed.parameters()] == weights
    assert changed.state_dict().keys() == network().state_dict().keys()
    assert ways_taken(changed) == {"whole": 2}


def test_a_kernel_that_depends_on_the_place_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "whole", moody)
    changed, x = network(), torch.randn(4, 3, 9, 8)
    steady(changed)
    assert torch.equal(changed(x), changed(x.flip(0)).flip(0))
    assert ways_taken(changed) == {"patches": 2}
    torch.testing.assert_close(changed(x), network()(x))
    changed(x[:2])
    changed(x[:1])  # a single row has one place only
    assert ways_taken(changed) == {"patches": 4}


@pytest.mark.parametrize("layer", OTHERS, ids=str)
def test_what_has_no_patches_goes_row_by_row(
    layer: nn.Conv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "whole", moody)
    changed, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(4, 4, 9, 8)
    steady(changed)
    torch.testing.assert_close(changed(x), layer(x))
    assert ways_taken(changed) == {"rows": 1}


def test_patches_that_depend_on_the_place_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "whole", moody)
    monkeypatch.setattr(module, "patches", moody)
    changed = network()
    steady(changed)
    changed(torch.randn(4, 3, 9, 8))
    assert ways_taken(changed) == {"rows": 2}


def test_a_way_without_memory_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("patches take nine times the picture")

    monkeypatch.setattr(module, "whole", moody)
    monkeypatch.setattr(module, "patches", too_much)
    changed, x = network(), torch.randn(4, 3, 9, 8)
    steady(changed)
    torch.testing.assert_close(changed(x), network()(x))
    assert ways_taken(changed) == {"rows": 2}


def test_each_layout_is_tried_and_no_random_number_is_used_up() -> None:
    changed, x = network(), torch.randn(4, 3, 9, 8)
    steady(changed)
    before = torch.get_rng_state()
    with torch.inference_mode():
        changed(x)
        changed(x.to(memory_format=torch.channels_last))
    assert torch.equal(torch.get_rng_state(), before)
    assert ways_taken(changed) == {"whole": 4}


def test_a_compiled_network_takes_the_ways_that_were_chosen_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "whole", moody)
    changed = network()
    steady(changed)
    compiled = torch.compile(changed, backend="eager", fullgraph=True, dynamic=False)
    for size in (4, 2):
        x = torch.randn(size, 3, 9, 8)
        expected = changed(x)
        assert torch.equal(compiled(x), expected)
    assert ways_taken(changed) == {"patches": 4}
    x = torch.randn(3, 3, 9, 8)  # new while tracing: as torch does it
    compiled(x)
    assert ways_taken(changed) == {"patches": 4}
