"""Rewritten networks: the same numbers, and less to do."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from model import rewriting
from model.acceleration import compile_blocks, use_channels_last
from model.batch import ConceptData
from model.compiling import table
from model.iteration import Frozen
from model.rewriting import MergedUpsampling, NormAndActivation, rewrite
from tests.unit.model.packs import assert_same


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rewritten_networks_train_as_before(
    own: Frozen, frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    rewrite(own)
    use_channels_last(own)
    layers = [layer for unet in (own.pair.teacher, own.pair.vae) for layer in unet.modules()]
    assert not any(isinstance(layer, Upsample2D) for layer in layers)
    assert sum(isinstance(layer, MergedUpsampling) for layer in layers) >= 2
    assert sum(isinstance(layer, NormAndActivation) for layer in layers) == 3
    assert not any(isinstance(layer, GEGLU) for layer in layers)
    blocks = [layer for layer in layers if isinstance(layer, ResnetBlock2D)]
    # Bound methods, which torch types as any callable.
    forwards = {block.forward.__func__ for block in blocks}  # type: ignore[attr-defined]
    assert len(blocks) > 10 and forwards == {rewriting._residual_block}
    assert_same(own, frozen, concepts)
    count = len(layers)
    rewrite(own)  # once more changes nothing
    pair = own.pair
    assert sum(1 for unet in (pair.teacher, pair.vae) for _ in unet.modules()) == count


def test_networks_that_are_rewritten_and_compiled_train_as_before(
    own: Frozen, frozen: Frozen, concepts: tuple[ConceptData, ...]
) -> None:
    rewrite(own)
    use_channels_last(own)
    compile_blocks(own, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    assert_same(own, frozen, concepts)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 10
    # transformers looks into its layers' attention by hooks, which torch does not compile.
    assert all("ContextVar" in reason for reason in counters["graph_break"])


def test_a_table_is_a_copy_in_both_directions() -> None:
    values = randn(2, 3, 4).transpose(0, 1).requires_grad_()
    torch.library.opcheck(table, (values,))
    assert torch.autograd.gradcheck(table, values.detach().double().requires_grad_())


@pytest.mark.parametrize("outlier", [0.0, 150.0])
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_by_channels_is_torchs(last: bool, outlier: float) -> None:
    norm = nn.GroupNorm(4, 12, eps=1e-6).requires_grad_(False).double()
    norm.weight.copy_(randn(12, seed=1))
    norm.bias.copy_(randn(12, seed=2))
    x = 3 * randn(2, 12, 5, 7) + 10 * randn(1, 12, 1, 1, seed=3)  # channels far from each other
    x[..., 0, 0] += outlier  # the pixel from which distances are summed
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    plain, mine = x.double().requires_grad_(), x.clone().requires_grad_()
    weight = randn(2, 12, 5, 7, seed=4)
    expected = norm(plain)
    (expected * weight).sum().backward()
    found = rewriting._group_norm(norm.float(), mine)
    (found * weight).sum().backward()
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert plain.grad is not None and mine.grad is not None
    assert torch.allclose(mine.grad.double(), plain.grad, atol=1e-4)


def test_merged_upsampling_is_upsampling_and_convolution() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
    x = randn(2, 3, 4, 6)
    merged = MergedUpsampling(conv)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.allclose(merged(x), expected, atol=1e-5)
    assert torch.equal(merged(x), merged(x, (8, 12)))
    with pytest.raises(ValueError, match="twice"):
        merged(x, (7, 12))
