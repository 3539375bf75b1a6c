"""Networks in another layout, and compiled in blocks: the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch._dynamo.utils import counters

from model.acceleration import accelerate, compile_blocks, use_channels_last
from model.batch import ConceptData
from model.checkpointing import save_memory
from model.iteration import Frozen
from tests.unit.model.packs import assert_same, draw

LAST = torch.channels_last


def test_pictures_keep_their_channels_innermost_from_end_to_end(
    own: Frozen, frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    use_channels_last(own)
    borders: list[bool] = []

    def look(_module: Any, inputs: tuple[torch.Tensor, ...], out: Any) -> None:
        picture = out[0] if isinstance(out, tuple) else out
        borders.append(all(each.is_contiguous(memory_format=LAST) for each in (inputs[0], picture)))

    blocks = [
        block
        for network in (own.pair.teacher, own.pair.student, own.pair.vae)
        for block in network.modules()
        if isinstance(block, ResnetBlock2D | Transformer2DModel)
    ]
    hooks = [block.register_forward_hook(look) for block in blocks]
    assert_same(own, frozen, concepts)
    for hook in hooks:
        hook.remove()
    assert len(borders) > len(blocks) and all(borders)


def test_auto_leaves_a_cpu_as_it_is(own: Frozen) -> None:
    weight = own.pair.teacher.conv_in.weight
    accelerate(own, "auto", compiled=False)
    assert weight.stride() == weight.contiguous().stride()
    accelerate(own, True, compiled=False)
    assert own.pair.teacher.conv_in.weight.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("sparing", [False, True])
def test_compiled_blocks_of_one_shape_share_their_code(
    own: Frozen, frozen: Frozen, concepts: tuple[ConceptData, ...], sparing: bool
) -> None:
    torch._dynamo.reset()
    counters.clear()
    if sparing:
        own = save_memory(own)
    compile_blocks(own, backend="eager")
    pair, batch = own.pair, draw(frozen.pair, concepts[:1])
    kv = torch.randn(2, 16, pair.teacher_layout.width, generator=torch.Generator().manual_seed(0))
    found, graphs = [], []
    for unet in (pair.teacher, pair.student, pair.student):
        x = kv.clone().requires_grad_()
        pair.denoise(unet, batch.noise, batch.t, x).square().sum().backward()
        found.append(x.grad)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] == graphs[2]
    assert not counters["graph_break"]
    plain = frozen.pair
    for unet, gradient in zip((plain.teacher, plain.student), found, strict=False):
        x = kv.clone().requires_grad_()
        plain.denoise(unet, batch.noise, batch.t, x).square().sum().backward()
        assert x.grad is not None and torch.allclose(gradient, x.grad, rtol=1e-4, atol=1e-6)


def test_a_copy_of_a_compiled_network_is_its_own(own: Frozen, frozen: Frozen) -> None:
    compile_blocks(own, backend="eager")
    other = copy.deepcopy(own.pair.vae)
    for parameter in other.parameters():
        parameter.data.zero_()
    z = torch.randn(1, *frozen.pair.latent_shape, generator=torch.Generator().manual_seed(1))
    assert other.decode(z).sample.abs().max() == 0
    assert torch.allclose(own.pair.decode(z), frozen.pair.decode(z), atol=1e-6)
